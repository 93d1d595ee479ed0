"""The run, told in order: restore → batches → steps → checkpoints → done. The same loop trains the LM and the query encoder."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from radit_jax import sharding
from radit_jax.checkpoint import Checkpoints
from radit_jax.errors import TrainingDiverged
from radit_jax.logbook import Logbook, say
from radit_jax.training.steps import Step
from radit_jax.types import TrainState

CHECKPOINTS = "checkpoints"  # inside the folder of a run


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How long, and how often something is written."""

    steps: int
    checkpoint_every: int = 100
    log_every: int = 10
    evaluate_every: int = 0  # 0: never inside training
    keep: int = 2  # checkpoints


def run(
    name: str,
    step: Step,
    state: TrainState,
    batches: Iterator[tuple[Any, np.ndarray]],
    folder: Path,
    options: LoopOptions,
    *,
    place: Callable[[Any], Any],
    evaluate: Callable[[Any, int], dict[str, float]] | None = None,
    describe: Callable[[np.ndarray], str] = str,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to `options.steps` and returns the last state with the facts of the run (seconds, tokens, last metrics).

    `batches` is a checkpointable iterator (get_state, set_state) of (host batch, example numbers); `place` puts a host batch on the mesh;
    `evaluate(params, step)` gives validation metrics; `describe` names the examples of a batch whose loss is not finite.
    A run that finds checkpoints in `folder` goes on from the last one and ends bit for bit where the unkilled run ends.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS, keep=options.keep)
    if checkpoints.latest is not None:
        state, data_state = checkpoints.restore(state)
        batches.set_state(data_state)
        say(f"{name}: going on from step {checkpoints.latest} of {options.steps}")
    done = int(state.step)
    book = Logbook(folder, resumed_at=done)
    meter = Meter(name, book, options, last_good=lambda: checkpoints.latest, describe=describe)
    while done < options.steps:
        batch, numbers = next(batches)
        state, metrics = step(state, place(batch))
        done += 1
        meter.after(done, metrics, numbers)  # reads the metrics of the step before this one, so the device never waits for the host
        last = done == options.steps
        # Before the checkpoint: a run that goes on from it does not evaluate its step again.
        if evaluate and options.evaluate_every and (last or done % options.evaluate_every == 0):
            meter.settle()
            book.write(done, results := evaluate(state.params, done))
            say(f"{name}: step {done} " + " ".join(f"{key} {value:.4f}" for key, value in results.items()))
        if last or done % options.checkpoint_every == 0:
            meter.settle()  # a checkpoint of a diverged state must not replace a good one
            # On CPU the host copy shares memory with buffers that the next step takes over, so the save has to be finished first.
            checkpoints.save(state, batches.get_state(), wait=last or jax.default_backend() == "cpu")
    checkpoints.close()
    book.close()
    return state, meter.facts()


class Meter:
    """Reads metrics one step late, stops on a loss that is not finite, logs a line every `log_every` steps."""

    def __init__(
        self, name: str, book: Logbook, options: LoopOptions, last_good: Callable[[], int | None], describe: Callable[[np.ndarray], str]
    ):
        self.name, self.book, self.options, self.last_good, self.describe = name, book, options, last_good, describe
        self.pending: tuple[int, Any, np.ndarray] | None = None
        self.last: dict[str, float] = {}
        self.counted = {"steps": 0, "tokens": 0.0, "examples": 0}
        self.began: float | None = None

    def after(self, step: int, metrics: Any, numbers: np.ndarray) -> None:
        self.settle()
        self.pending = (step, metrics, numbers)

    def settle(self) -> None:
        """Waits for the pending step's metrics and acts on them."""
        if self.pending is None:
            return
        (step, metrics, numbers), self.pending = self.pending, None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if not all(math.isfinite(values[key]) for key in ("loss", "grad_norm")):
            good = self.last_good()
            raise TrainingDiverged(
                f"{self.name}: loss {values['loss']} (gradient norm {values['grad_norm']}) at step {step} "
                f"on examples {self.describe(numbers)}; "
                f"last good checkpoint: {'none' if good is None else f'step {good}'}"
            )
        self.last = values
        if self.began is None:  # the first step holds the compile
            self.began = time.monotonic()
        else:
            self.counted["steps"] += 1
            self.counted["tokens"] += values.get("tokens", 0.0)
            self.counted["examples"] += len(numbers)
        self.book.write(step, values)
        if step == 1 or step % self.options.log_every == 0 or step == self.options.steps:
            say(self.line(step, values))

    def line(self, step: int, values: dict[str, float]) -> str:
        elapsed = time.monotonic() - self.began
        rate = self.counted["steps"] / elapsed if elapsed > 0 and self.counted["steps"] else 0.0
        left = f", {(self.options.steps - step) / rate / 60:.1f} min left" if rate else ""
        speed = f", {self.counted['tokens'] / elapsed:.0f} tokens/s" if self.counted["tokens"] else f", {rate:.2f} steps/s" if rate else ""
        shown = " ".join(f"{key} {values[key]:.4f}" for key in ("loss", "grad_norm", "target_entropy", "top1_agrees") if key in values)
        return f"{self.name}: step {step}/{self.options.steps} {shown}{speed}{left}"

    def facts(self) -> dict[str, float]:
        """Seconds and rates after the first (compiling) step, and the last metrics."""
        self.settle()
        seconds = time.monotonic() - self.began if self.began else 0.0
        rates = {f"{key}_per_s": round(value / seconds, 2) for key, value in self.counted.items() if seconds and value}
        return {"train_seconds": round(seconds, 1), **rates, **{f"last_{key}": round(value, 5) for key, value in self.last.items()}}


def placer(mesh: jax.sharding.Mesh, micro_axis: bool) -> Callable[[Any], Any]:
    """Puts a host batch on the mesh, rows over "data"; with `micro_axis` leaves are (A, B, …) and A stays whole."""
    spec = jax.sharding.PartitionSpec(None, sharding.DATA) if micro_axis else jax.sharding.PartitionSpec(sharding.DATA)
    rows = jax.sharding.NamedSharding(mesh, spec)
    return lambda batch: jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(rows, leaf), batch)
