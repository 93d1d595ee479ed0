"""Training state on disk: parameters, optimizer state, step and the data iterator's state, through Orbax."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from radit_jax.types import PyTree, TrainState


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`: saved asynchronously, the last `keep` are kept.

    A checkpoint that was not finished when the process died is not listed, so the one before it is the last.
    """

    def __init__(self, folder: Path, *, keep: int = 2):
        policies = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            Path(folder).absolute(),
            preservation_policy=policies.LatestN(keep),
            save_decision_policy=_Always(),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        last = self._checkpointer.latest
        return None if last is None else last.step

    def save(self, state: TrainState, data_state: dict[str, Any], *, wait: bool = False) -> None:
        """Writes state and iterator state under the state's step; returns once the arrays are copied, unless `wait`."""
        content = {"state": state, "data": {"iterator": json.dumps(data_state)}}
        self._checkpointer.save_checkpointables_async(int(state.step), content)
        if wait:
            self.wait()

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The latest checkpoint, with the shapes, dtypes and shardings of `like` (arrays or ShapeDtypeStructs)."""
        loaded = self._checkpointer.load_checkpointables(self.latest, {"state": jax.tree.map(_abstract, like), "data": None})
        return loaded["state"], json.loads(loaded["data"]["iterator"])

    def wait(self) -> None:
        self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()


def save_params(folder: Path, params: PyTree) -> None:
    """Writes parameters alone (the result of a training stage)."""
    ocp.save(Path(folder).absolute(), params, overwrite=True)


def load_params(folder: Path, like: PyTree) -> PyTree:
    """Parameters with the shapes, dtypes and shardings of `like`."""
    return ocp.load(Path(folder).absolute(), jax.tree.map(_abstract, like))


def _abstract(leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


class _Always(ocp.training.save_decision_policies.SaveDecisionPolicy):
    """The loop decides when to save."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        return True
