"""Metrics of a run: a line on the terminal, a jsonl file that survives kills, and TensorBoard when a folder is asked for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from radit_jax import artifacts, distributed


def say(text: str) -> None:
    """One line for the person who waits: stderr, so that stdout holds answers alone. Of several processes the leader speaks."""
    if distributed.leads():
        print(text, file=sys.stderr, flush=True)


class Logbook:
    """Appends {"step", "time", metric: value} lines to `metrics.jsonl`; after a resume, lines past the resumed step are dropped first.

    Of several processes the leader writes.
    """

    def __init__(self, folder: Path, *, resumed_at: int = 0, tensorboard: bool = False):
        self.path = Path(folder) / "metrics.jsonl"
        self.kept = [line for line in read(self.path) if line["step"] <= resumed_at]
        self._file = self._writer = None
        if not distributed.leads():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._file = self.path.open("a")
        if tensorboard:
            from tensorboardX import SummaryWriter  # its import is slow and most runs do without

            self._writer = SummaryWriter(str(self.path.parent / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file:
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            self._file.flush()
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._writer:
            self._writer.close()


def read(path: Path) -> list[dict]:
    """The whole lines of a metrics file; a torn last line (killed while writing) is left out."""
    lines = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return lines
