"""How far a stage is: a bar with its rate and the time left on a terminal, a plain line every ten seconds elsewhere.

Everything goes to stderr, because the answers of the launch scripts go to stdout.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from radit_jax import logbook

LINE_EVERY_S = 10.0  # a log that grows slowly enough to be read


class Bar:
    """Counts what is done of `total`: call it with how many more are done.

    `start` were done by an earlier run: they count as done but not in the rate.
    """

    def __init__(self, stage: str, total: int | None, *, unit: str, start: int = 0, clock: Callable[[], float] = time.monotonic):
        self.stage, self.total, self.unit = stage, total, unit
        self.start, self.done = start, start
        self._clock, self._began, self._ended = clock, clock(), None

    def __call__(self, count: int = 1) -> None:
        self.done += count
        self._show()

    @property
    def elapsed(self) -> float:
        """Seconds from the start to now, or to the end."""
        return (self._clock() if self._ended is None else self._ended) - self._began

    @property
    def rate(self) -> float:
        """Units per second in this run (0 before the first)."""
        return (self.done - self.start) / self.elapsed if self.elapsed > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the present rate; None while it cannot be known."""
        return None if self.total is None or self.rate == 0 else max(self.total - self.done, 0) / self.rate

    def summary(self, verb: str = "") -> str:
        """One line for the log: what was done, in how long, how fast."""
        before = f", {self.start:,} already there" if self.start else ""
        counted = self.done - self.start
        return f"{self.stage}: {verb}{counted:,} {self.unit} in {duration(self.elapsed)} ({figure(self.rate)} {self.unit}/s{before})"

    def status(self) -> str:
        """Rate and time left, as shown while it runs."""
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return f"{figure(self.rate)} {self.unit}/s{left}"

    def _end(self) -> None:
        self._ended = self._clock()

    def _show(self) -> None:
        """Overridden by the two ways of showing."""


class _Lines(Bar):
    def __init__(self, stage: str, total: int | None, *, stream: TextIO, **settings):
        super().__init__(stage, total, **settings)
        self._stream, self._last = stream, 0.0

    def _show(self) -> None:
        if self.elapsed - self._last < LINE_EVERY_S:
            return
        self._last = self.elapsed
        of = "" if self.total is None else f" of {self.total:,} ({100 * self.done / max(self.total, 1):.0f} %)"
        print(f"{self.stage}: {self.done:,}{of} {self.unit}, {self.status()}", file=self._stream, flush=True)


class _Silent(Bar):
    def summary(self, verb: str = "") -> str:
        return ""


class _Terminal(Bar):
    def __init__(self, stage: str, total: int | None, *, display: Progress, **settings):
        super().__init__(stage, total, **settings)
        self._display = display
        self._task: TaskID = display.add_task(stage, total=total, completed=self.done, status="")

    def _show(self) -> None:
        self._display.update(self._task, completed=self.done, status=self.status())


@contextlib.contextmanager
def bar(
    stage: str,
    total: int | None,
    *,
    unit: str,
    start: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Bar]:
    """Shows the progress of `stage` while the block runs and one summary line after it.

    Yields a `Bar`, called as ``advance(n)``; its `rate` and `elapsed` stay readable after the block. `total` None: no time left is shown.
    Of several processes the leader shows its own part; with --quiet none does.
    """
    stream = sys.stderr if stream is None else stream
    settings = {"unit": unit, "start": start, "clock": clock}
    with contextlib.ExitStack() as stack:
        if not logbook.speaks():
            shown: Bar = _Silent(stage, total, **settings)
        elif stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
            display = stack.enter_context(Progress(*columns, console=Console(file=stream), transient=True))
            shown = _Terminal(stage, total, display=display, **settings)
        else:
            shown = _Lines(stage, total, stream=stream, **settings)
        verb = "stopped after "
        try:
            yield shown
            verb = ""
        finally:
            shown._end()
            stack.close()  # the bar goes before the summary comes
            if summary := shown.summary(verb):
                print(summary, file=stream, flush=True)


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 4.2 s, 3 min 05 s, 2 h 07 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def figure(value: float) -> str:
    """A rate with about three digits: 0.412, 41.2, 4,120."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
