"""SIGTERM, the notice before a machine is taken away: training saves a checkpoint, every other stage has its shards, and the run exits 0.

Outside `hold` the notice ends the run where it stands, as Ctrl-C does: artifacts are whole or resumable at any moment. Inside, it waits
until the one who holds looks.
"""

from __future__ import annotations

import contextlib
import signal
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


def install() -> None:
    """From here on SIGTERM is a notice. After `jax.distributed`, whose own handler would otherwise replace this one."""
    _notice.given = False
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _notice)


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
