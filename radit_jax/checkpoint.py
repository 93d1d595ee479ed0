"""Training state on disk: parameters, optimizer state, step and the data iterator's state, through Orbax, with check sums of every file."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from radit_jax import artifacts, distributed
from radit_jax.logbook import say
from radit_jax.types import PyTree, TrainState

SUMS = "sums-{index}-of-{count}.json"  # {file: [bytes, CRC-32]}: Orbax itself reads a flipped bit of an array without noticing
READ = 1 << 22  # bytes summed at a time


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`: written by all processes, asynchronously; the last `keep` are kept.

    A checkpoint that was not finished when the process died is not listed, so the one before it is the last.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        policies = ocp.training.preservation_policies
        self.folder = Path(folder).absolute()
        with artifacts.writing(self.folder):
            self._checkpointer = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.LatestN(keep),
                save_decision_policy=_Always(),
                cleanup_tmp_directories=True,
            )
        self._unsummed: int | None = None  # the step whose files are still being written

    @property
    def latest(self) -> int | None:
        last = self._checkpointer.latest
        return None if last is None else last.step

    @property
    def last_whole(self) -> int | None:
        """The latest step, once what is being written is on disk: what a run that ends here leaves."""
        self.wait()
        return self.latest

    def save(self, state: TrainState, data_state: dict[str, Any], *, wait: bool = False) -> None:
        """Writes state and iterator state under the state's step; returns once the arrays are copied, unless `wait`."""
        self.wait()
        content = {"state": state, "data": {"iterator": json.dumps(data_state)}}
        step = int(state.step)
        with artifacts.writing(self.folder / str(step)):
            self._checkpointer.save_checkpointables_async(step, content)
        self._unsummed = step
        if wait:
            self.wait()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The latest whole checkpoint, or None. It gets the shapes, dtypes and shardings of `like`, on whatever devices it was written.

        A damaged one is named, deleted, and the one before it is taken.
        """
        while self.latest is not None:
            problem = self._damage(self.latest)
            if problem is None:
                try:
                    return self._load(self.latest, like)
                except Exception as error:  # Orbax and TensorStore fail in as many ways as a file can be damaged
                    problem = f"{type(error).__name__}: {str(error)[:200]}"
            say(f"checkpoint {self.folder / str(self.latest)} is damaged ({problem}): falling back to the one before")
            self._checkpointer.delete(self.latest)
        return None

    def wait(self) -> None:
        """Returns when all that was saved is on disk and summed."""
        if self._unsummed is None:
            return
        step, self._unsummed = self._unsummed, None
        with artifacts.writing(self.folder / str(step)):
            self._checkpointer.wait()
            _write_sums(self.folder / str(step))

    def close(self) -> None:
        self.wait()
        self._checkpointer.close()

    def _load(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        with _quiet("asyncio"):  # its tasks each report the first error once more
            loaded = self._checkpointer.load_checkpointables(step, {"state": jax.tree.map(_abstract, like), "data": None})
        return loaded["state"], json.loads(loaded["data"]["iterator"])

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint, found by the processes together, each on its share."""
        found = _wrong_file(self.folder / str(step))
        share = distributed.gather(np.asarray(found is not None))
        return found or (f"found by process {int(np.argmax(share))}" if share.any() else None)


def save_params(folder: Path, params: PyTree) -> None:
    """Writes parameters alone (the result of a training stage); all processes together."""
    with artifacts.writing(Path(folder)):
        ocp.save(Path(folder).absolute(), params, overwrite=True)


def load_params(folder: Path, like: PyTree) -> PyTree:
    """Parameters with the shapes, dtypes and shardings of `like`."""
    return ocp.load(Path(folder).absolute(), jax.tree.map(_abstract, like))


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


# -- check sums ---------------------------------------------------------------------------------------------------------------------------


def _write_sums(folder: Path) -> None:
    """Each process sums its share of the files of a finished checkpoint."""
    # Without sums and their temporary names, which other processes write at this moment: all must see the same files.
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.match(SUMS.format(index="*", count="*") + "*"))
    index, count = distributed.index(), distributed.count()
    sums = {path.relative_to(folder).as_posix(): _sum(path) for path in files[index::count]}
    artifacts.write_json(folder / SUMS.format(index=index, count=count), sums)


def _wrong_file(folder: Path) -> str | None:
    """The first file of this process's share that is not as it was written. A checkpoint without sums (killed before them) passes."""
    try:
        parts = sorted(folder.glob(SUMS.format(index="*", count="*")))
        expected = sorted((name, tuple(sums)) for part in parts for name, sums in json.loads(part.read_text()).items())
    except ValueError:
        return "its check sums are not readable"
    for name, sums in expected[distributed.index() :: distributed.count()]:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if tuple(_sum(path)) != sums:
            return f"{name} is not what was written"
    return None


def _sum(path: Path) -> list[int]:
    """[bytes, CRC-32] of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(READ):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


# -- errors -------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)


class _Always(ocp.training.save_decision_policies.SaveDecisionPolicy):
    """The loop decides when to save."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        return True
