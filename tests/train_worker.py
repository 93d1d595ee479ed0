"""One process of a distributed training on tiny models: LM-ft and R-ft through the loop; the leader writes their parameters and losses.

python tests/train_worker.py FOLDER DATAxMODEL STOP_AT [--coordinator= --processes= --process=]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import tiny  # noqa: E402

from radit_jax import distributed, sharding  # noqa: E402
from radit_jax.training import batches, loop, steps  # noqa: E402
from radit_jax.training.losses import LsrOptions  # noqa: E402
from radit_jax.training.optim import make_optimizer  # noqa: E402
from radit_jax.types import TrainState  # noqa: E402

KINDS = ("lm", "lsr")
ROWS = 4
STEPS = 20
OPTIMIZER = dataclasses.replace(tiny.OPTIMIZER, peak_lr=1e-3, final_lr=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mesh")
    parser.add_argument("stop_at", type=int)
    for name, kind in (("coordinator", str), ("processes", int), ("process", int)):
        parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    if given.coordinator:
        distributed.join(distributed.Cluster(given.coordinator, given.processes, given.process), 60)
    mesh = sharding.make_mesh(*map(int, given.mesh.split("x")))
    for kind in KINDS:
        state = train(kind, given.folder / kind, mesh, given.stop_at)
        leaves = {path: distributed.to_host(leaf) for path, leaf in named(state.params)}
        if distributed.leads():
            np.savez(given.folder / f"{kind}.npz", **leaves)
    print(json.dumps(sharding.rows_here(mesh, ROWS).tolist()))


def train(kind: str, folder: Path, mesh, stop_at: int) -> TrainState:
    """The state after `stop_at` steps of a schedule of STEPS."""
    here = sharding.rows_here(mesh, ROWS)
    tx = make_optimizer(OPTIMIZER, STEPS)
    if kind == "lm":
        (graphdef, params), rules, step, static = tiny.parts(tiny.lm()), sharding.LM_RULES, steps.lm_step, {}
        data = batches.lm_batches(tiny.lm_source(), rows=ROWS, accumulate=1, seed=0, here=here)
    else:
        (graphdef, params), rules, step = tiny.parts(tiny.encoder()), sharding.ENCODER_RULES, steps.lsr_step
        static = {"options": LsrOptions(score_scale=5.0)}
        data = batches.lsr_batches({"train": tiny.lsr_source()}, shares={"train": 1.0}, batch=ROWS, seed=0, here=here)
    # The tiny models' weights are enlarged, so that passages matter; trained so, rounding grows a thousandfold within five steps.
    params = jax.tree.map(lambda leaf: leaf / 2, params)
    place = sharding.placer(mesh, rules)
    placed = [place(path, leaf.shape, np.asarray(leaf).__getitem__) for path, leaf in named(params)]
    params = jax.tree.unflatten(jax.tree.structure(params), placed)
    state, compiled = steps.begin(step, graphdef, tx, params, mesh, rules, **static)
    options = loop.LoopOptions(steps=stop_at, checkpoint_every=2)
    place = loop.placer(mesh, rows=ROWS)
    return loop.run(kind, compiled, state, data, folder, options, place=place)[0]


def named(tree):
    return [(sharding.path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


if __name__ == "__main__":
    main()
