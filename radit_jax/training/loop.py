"""The run, told in order: restore → batches → steps → checkpoints → done. The same loop trains the LM and the query encoder."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from radit_jax import distributed, preemption, sharding
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
    loggers: tuple[str, ...] = ()  # beside metrics.jsonl (logbook.LOGGERS)


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
    enough: Callable[[int], bool] = lambda step: False,
) -> tuple[TrainState, dict[str, float]]:
    """Trains to `options.steps` and returns the last state with the facts of the run (seconds, tokens, last metrics).

    `batches` is a checkpointable iterator (get_state, set_state) of (host batch, example numbers); `place` puts a host batch on the mesh;
    `evaluate(params, step)` gives validation metrics, and `enough(step)` says after it whether to stop there; `describe` names the examples
    of a batch whose loss is not finite.
    A run that finds checkpoints in `folder` goes on from the last whole one and ends bit for bit where the unkilled run ends. SIGTERM waits
    for the step it falls into, saves, and raises Preempted.
    """
    checkpoints = Checkpoints(folder / CHECKPOINTS, keep=options.keep)
    if (found := checkpoints.restore(state)) is not None:
        state, data_state = found
        batches.set_state(data_state)
        say(f"{name}: going on from step {int(state.step)} of {options.steps}")
    done = int(state.step)
    book = Logbook(folder, resumed_at=done, loggers=options.loggers)
    meter = Meter(name, book, options, last_good=lambda: checkpoints.last_whole, describe=describe)
    due = evaluate is not None and options.evaluate_every > 0
    seen = distributed.from_leader(max((line["step"] for line in book.kept if "loss" not in line), default=0))  # the last evaluation
    vote = Vote()
    while True:
        if due and seen < done and (done == options.steps or done % options.evaluate_every == 0):
            book.write(done, results := evaluate(state.params, done))
            say(f"{name}: step {done} " + " ".join(f"{key} {value:.4f}" for key, value in results.items()))
            seen = done
        if done == options.steps:
            break
        if due and seen == done and enough(done):
            say(f"{name}: stopped at step {done} of {options.steps}: no better for a while")
            break
        with preemption.hold() as asked:
            while True:
                with meter.waiting():
                    batch, numbers = next(batches)
                state, metrics = step(state, place(batch))
                done += 1
                meter.after(done, metrics, numbers)  # reads the metrics of the step before this one: the device never waits for the host
                pause = due and done % options.evaluate_every == 0  # an evaluation may be killed, and costs no step then
                stop = done == options.steps or vote(asked(), now=pause)
                if stop or pause or done % options.checkpoint_every == 0:
                    meter.settle()  # a checkpoint of a diverged state must not replace a good one
                    # On CPU the host copy shares memory with buffers that the next step takes over: the save has to be finished first.
                    checkpoints.save(state, batches.get_state(), wait=stop or jax.default_backend() == "cpu")
                if stop and done < options.steps:
                    say(f"{name}: preempted, saved at step {done} of {options.steps}")
                    checkpoints.close()
                    raise preemption.Preempted
                if stop or pause:
                    break
    checkpoints.close()
    book.close()
    return state, meter.facts()


class Vote:
    """Whether any process was asked to stop: all hear the same answer at the same step, one step late unless it is needed `now`."""

    def __init__(self):
        if distributed.count() > 1:
            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
            self._any = jax.jit(lambda asked: asked.any(), out_shardings=sharding.replicated(mesh))
            self._before = False

    def __call__(self, asked: bool, *, now: bool) -> bool:
        if distributed.count() == 1:
            return asked
        asked_N = np.full(jax.device_count(), asked)
        count = self._any(jax.make_array_from_callback(asked_N.shape, self._each, lambda index: asked_N[index]))
        before, self._before = self._before, count  # the device counts while the next step is prepared
        return bool(before) or (now and bool(count))


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
        self.waited = 0.0  # seconds for input since the first step

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what gives the next batch, in which the step before goes on: at most so much of the time is spent on input."""
        began = time.monotonic()
        yield
        if self.began is not None:
            self.waited += time.monotonic() - began

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
        waited = {"input_wait": round(self.waited / seconds, 4)} if seconds else {}  # share of the time
        last = {f"last_{key}": round(value, 5) for key, value in self.last.items()}
        return {"train_seconds": round(seconds, 1), **rates, **waited, **last}


def placer(mesh: Mesh, rows: int) -> Callable[[Any], Any]:
    """Puts a host batch on the mesh, its leaves (A, B, …): `rows` rows over "data", and A whole.

    Each process holds the rows of its own devices alone (sharding.rows_here), and all of them make one global batch.
    """
    if mesh.shape[sharding.DATA] == 1:  # every device has all rows, and what is not by rows
        return lambda batch: jax.tree.map(lambda leaf: sharding.put_whole(mesh, leaf), batch)
    here = sharding.rows_here(mesh, rows)
    return lambda batch: jax.tree.map(lambda leaf: sharding.put_rows_here(mesh, leaf, here, rows, axis=1), batch)
