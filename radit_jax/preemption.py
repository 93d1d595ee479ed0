"""SIGTERM, the notice before a machine is taken away: training saves a checkpoint, every other stage has its shards, and the run exits 0.

Outside `hold` the notice ends the run where it stands, as Ctrl-C does: artifacts are whole or resumable at any moment. Inside, it waits
until the one who holds looks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator


class Preempted(BaseException):
    """The run is to end now, with nothing lost. Not an Exception: nobody handles it but the launch scripts."""


class _Notice:
    """What the signal handler and the run share."""

    def __init__(self):
        self.given = False
        self.held = False

    def __call__(self, *_) -> None:
        self.given = True
        if not self.held:
            raise Preempted


_notice = _Notice()
AGAIN = 0.01  # seconds after which a notice that was lost is given again


def install() -> None:
    """From here on SIGTERM is a notice. After `jax.distributed`, whose own handler would otherwise replace this one."""
    _notice.given = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _notice)
    if not isinstance(sys.unraisablehook, _Unraisable):
        sys.unraisablehook = _Unraisable(sys.unraisablehook)


class _Unraisable:
    """Gives a notice again that fell into a finalizer or a callback of the garbage collector, where Python drops what is raised."""

    def __init__(self, other: Callable):
        self.other = other

    def __call__(self, unraisable) -> None:
        if unraisable.exc_type is not Preempted:
            return self.other(unraisable)
        # Not at once: it would be raised in this call, and dropped too.
        threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGTERM)).start()


@contextlib.contextmanager
def hold() -> Iterator[Callable[[], bool]]:
    """Within the block the notice does not interrupt; what it yields tells whether it was given. Raises Preempted behind the block."""
    _notice.held = True
    try:
        yield lambda: _notice.given
    finally:
        _notice.held = False
    if _notice.given:
        raise Preempted
