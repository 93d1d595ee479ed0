"""Metrics of a run: a line on the terminal, a jsonl file that survives kills, TensorBoard and Weights & Biases where they are asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from radit_jax import artifacts, distributed
from radit_jax.errors import InputError

QUIET = "RADIT_QUIET"  # set: nobody is told how far it is (--quiet); errors and answers are


def speaks() -> bool:
    """Whether this process tells a person what it does: of several the leader, and none that was asked to be quiet."""
    return distributed.leads() and not os.environ.get(QUIET)


def say(text: str) -> None:
    """One line for the person who waits: stderr, so that stdout holds answers alone."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


class Logger(Protocol):
    """What gets the metrics beside the file."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path):
        from tensorboardX import SummaryWriter  # its import is slow and most runs do without

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """Metrics and nothing else: no machine, no environment, no code, no output of the terminal. A resumed run goes on under its name."""

    def __init__(self, folder: Path):
        import wandb

        told = {"x_disable_meta": True, "x_disable_machine_info": True, "x_disable_stats": True, "x_save_requirements": False}
        settings = wandb.Settings(**told, disable_code=True, disable_git=True, save_code=False, console="off")
        self._run = wandb.init(project="radit_jax", id=folder.name.partition(".")[0], resume="allow", dir=str(folder), settings=settings)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path], Logger]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def check_loggers(names: Sequence[str]) -> None:
    """InputError where one does not exist or is not installed."""
    for name in names:
        if name not in LOGGERS:
            raise InputError(f"config.loggers names {name!r}, expected some of {', '.join(LOGGERS)}")
        if name == "wandb" and importlib.util.find_spec("wandb") is None:
            raise InputError("config.loggers names wandb, which is not installed (pip install wandb)")


class Logbook:
    """Appends {"step", "time", metric: value} lines to `metrics.jsonl`; after a resume, lines past the resumed step are dropped first.

    Of several processes the leader writes.
    """

    def __init__(self, folder: Path, *, resumed_at: int = 0, loggers: Sequence[str] = ()):
        self.path = Path(folder) / "metrics.jsonl"
        self.kept = [line for line in read(self.path) if line["step"] <= resumed_at]
        self._file, self._loggers = None, []
        if not distributed.leads():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        artifacts.write_whole(self.path, "".join(json.dumps(line) + "\n" for line in self.kept))
        self._file = self.path.open("a")
        self._loggers = [LOGGERS[name](self.path.parent) for name in loggers]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._file:
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
            self._file.flush()
        for logger in self._loggers:
            logger.write(step, metrics)

    def close(self) -> None:
        if self._file:
            self._file.close()
        for logger in self._loggers:
            logger.close()


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
