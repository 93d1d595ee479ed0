"""Exact inner-product search on the device mesh, as in the paper: every device holds its rows and scores all of them.

`top_k_program` is the device function alone. It is lowered from shapes as well as run on vectors, so that what 399M × 768 costs on a
pod can be read from the compiled program.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from radit_jax import sharding
from radit_jax.errors import InputError
from radit_jax.retrieval.candidates import QUERIES, Found, checked, in_groups
from radit_jax.retrieval.vectors import Vectors
from radit_jax.sharding import DATA, MODEL

SCORE_BYTES = 16 << 20  # of the float32 scores that a device holds at a time: 256 queries × 16,384 rows
LANES = 128  # blocks of more rows are a multiple of it: what a TPU computes at once
MOST_ROWS = 2**31 - 1  # row numbers are int32 on the devices
AXES = (DATA, MODEL)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How `rows` vectors lie on the devices: `blocks` blocks of `block` rows on each, in row order, with rows of zeros after the last."""

    rows: int
    devices: int
    blocks: int
    block: int

    @classmethod
    def of(cls, rows: int, devices: int, score_bytes: int = SCORE_BYTES) -> Layout:
        """Blocks as even as may be, whose scores for QUERIES queries fit in `score_bytes`. InputError above MOST_ROWS."""
        each = math.ceil(rows / devices)
        largest = max(score_bytes // (4 * QUERIES), 1)
        blocks = math.ceil(each / largest)
        block = math.ceil(each / blocks)
        if block > LANES and math.ceil(block / LANES) * LANES <= largest:
            block = math.ceil(block / LANES) * LANES
        layout = cls(rows, devices, blocks, block)
        if layout.padded > MOST_ROWS:
            raise InputError(f"{rows:,} vectors, exact search numbers at most {MOST_ROWS:,} rows (the index 'scann' has no such limit)")
        return layout

    @property
    def padded(self) -> int:
        """Rows on all devices, those of zeros included."""
        return self.devices * self.blocks * self.block


def top_k_program(mesh: Mesh, layout: Layout, k: int, recall: float = 0.0) -> jax.stages.Wrapped:
    """The jitted function (query_BxE, vectors_NxE) → (rows_BxK int32, scores_BxK float32) with N = `layout.padded`, best first.

    query_BxE is float32 and the same on every process; vectors_NxE lie over both axes of the mesh (`vectors_sharding`) in the dtype they
    are stored in, and each device reads them once, block by block. Scores are float32 inner products of what is stored. A device holds one
    block of scores and k candidates; k · devices candidates are then merged. Among equal scores the lower row is first. With `recall`
    between 0 and 1 a block's candidates are those of `jax.lax.approx_max_k` with this recall target (faster on TPUs, not on CPUs).
    To lower it from shapes alone: ``top_k_program(mesh, Layout.of(399_000_000, mesh.size), k=10).lower(
    jax.ShapeDtypeStruct((256, 768), jnp.float32), jax.ShapeDtypeStruct((layout.padded, 768), jnp.bfloat16))``.
    """
    kept = min(k, layout.blocks * layout.block)
    device_part = jax.shard_map(
        functools.partial(_best_of_device, layout=layout, kept=kept, recall=recall),
        mesh=mesh,
        in_specs=(P(), P(AXES)),
        out_specs=(P(AXES), P(AXES)),
        check_vma=False,  # the candidates that a scan starts with are the same on every device, those that it ends with are not
    )

    def top_k(query_BxE: jax.Array, vectors_NxE: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows_DxBxK, scores_DxBxK = device_part(query_BxE, vectors_NxE)
        # Devices are in row order and top_k prefers the earlier of equals, so equal scores stay in row order.
        rows_BxC, scores_BxC = (jnp.moveaxis(x, 0, 1).reshape(len(query_BxE), -1) for x in (rows_DxBxK, scores_DxBxK))
        return _best(rows_BxC, scores_BxC, k)

    everywhere = sharding.replicated(mesh)
    return jax.jit(top_k, in_shardings=(everywhere, vectors_sharding(mesh)), out_shardings=everywhere)


def vectors_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices, in their order."""
    return NamedSharding(mesh, P(AXES))


def _best_of_device(query_BxE, vectors_NxE, *, layout: Layout, kept: int, recall: float):
    """(rows_1xBxK, scores_1xBxK): the `kept` best of the rows that one device holds, one block after the other."""
    first = jax.lax.axis_index(AXES).astype(jnp.int32) * (layout.blocks * layout.block)
    B = len(query_BxE)

    def step(best, g):
        # Behind the barrier XLA cannot convert the vectors of all blocks to float32 before the loop (which it does, and keeps them).
        held_NxE, g = jax.lax.optimization_barrier((vectors_NxE, g))
        scores_BxM = _scores(query_BxE, jax.lax.dynamic_slice_in_dim(held_NxE, g * layout.block, layout.block))
        start = first + g * layout.block
        rows_M = start + jnp.arange(layout.block, dtype=jnp.int32)
        scores_BxM = jnp.where(rows_M[None] < layout.rows, scores_BxM, -jnp.inf)
        rows_BxC, scores_BxC = _candidates(scores_BxM, start, min(kept, layout.block), recall)
        # What was found before comes first: its rows are lower.
        found = (jnp.concatenate([a, b], axis=1) for a, b in zip(best, (rows_BxC, scores_BxC)))
        return _best(*found, kept), None

    nothing = (jnp.zeros((B, kept), jnp.int32), jnp.full((B, kept), -jnp.inf, jnp.float32))
    (rows_BxK, scores_BxK), _ = jax.lax.scan(step, nothing, jnp.arange(layout.blocks, dtype=jnp.int32))
    return rows_BxK[None], scores_BxK[None]


def _scores(query_BxE: jax.Array, vectors_MxE: jax.Array) -> jax.Array:
    """Float32 inner products. HIGHEST: an accelerator's default would round the queries to bfloat16 and reorder near neighbours."""
    return jnp.einsum("be,me->bm", query_BxE, vectors_MxE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _candidates(scores_BxM: jax.Array, start: jax.Array, kept: int, recall: float) -> tuple[jax.Array, jax.Array]:
    """(rows_BxC, scores_BxC) of one block, in row order among equals, with the `kept` best among them.

    Exact, without sorting M scores: the rows are cut into groups, and the best `kept` scores lie in the `kept` groups of highest maximum
    (a score outside them is no higher than their maxima, and where it equals one, its group and so its row is later).
    """
    if recall:
        scores_BxC, at_BxC = jax.lax.approx_max_k(scores_BxM, kept, recall_target=recall)
        return start + at_BxC.astype(jnp.int32), scores_BxC
    (B, M), size = scores_BxM.shape, group_size(scores_BxM.shape[1], kept)
    scores_BxGxS = scores_BxM.reshape(B, M // size, size)
    _, groups_BxC = jax.lax.top_k(scores_BxGxS.max(axis=2), min(kept, M // size))
    groups_BxC = jnp.sort(groups_BxC, axis=1)  # back into row order
    scores_BxCxS = jnp.take_along_axis(scores_BxGxS, groups_BxC[:, :, None], axis=1)
    at_BxCxS = groups_BxC[:, :, None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]
    return start + at_BxCxS.reshape(B, -1).astype(jnp.int32), scores_BxCxS.reshape(B, -1)


def group_size(rows: int, kept: int) -> int:
    """The power of two near √(rows / kept) that divides the rows: as much work for the maxima as for the members of the best groups."""
    size = 1
    while rows % (2 * size) == 0 and 4 * size * size <= rows / kept:
        size *= 2
    return size


def _best(rows_BxC: jax.Array, scores_BxC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k best, the earlier of equals first."""
    scores_BxK, at_BxK = jax.lax.top_k(scores_BxC, k)
    return jnp.take_along_axis(rows_BxC, at_BxK, axis=1), scores_BxK


class ExactSearcher:
    """Exact inner-product top-k with the vectors spread over all devices of a ("data", "model") mesh (one device without a mesh).

    Every process reads its own rows alone from the memory-mapped shards. Of several processes all call `search` with the same queries.
    """

    def __init__(self, vectors: Vectors, mesh: Mesh | None = None, *, score_bytes: int = SCORE_BYTES, recall: float = 0.0):
        """`score_bytes` bounds the scores that a device holds at a time, `recall` above 0 takes approx_max_k (see top_k_program)."""
        if not 0 <= recall < 1:
            raise InputError(f"recall target {recall:g} of approximate search, expected 0 (exact) or a number below 1")
        self.vectors = vectors
        mesh = sharding.mesh_or_one(mesh)
        self.layout = Layout.of(len(vectors), mesh.size, score_bytes)
        self._vectors_NxE = jax.make_array_from_callback((self.layout.padded, vectors.dim), vectors_sharding(mesh), self._read)
        self._program = functools.cache(functools.partial(top_k_program, mesh, self.layout, recall=recall))

    def search(self, query_BxE: np.ndarray, k: int) -> Found:
        """Returns rows_BxK (int64) and scores_BxK (float32), best first. Raises InputError on a k or a dimension that does not fit."""
        return in_groups(self._search_some, checked(query_BxE, k, self.vectors), k)

    def _search_some(self, query_BxE: np.ndarray, k: int) -> Found:
        count = len(query_BxE)
        padding = (1 << (count - 1).bit_length()) - count  # a power of two of queries: few compilations
        rows_BxK, scores_BxK = self._program(k)(np.pad(query_BxE, ((0, padding), (0, 0))), self._vectors_NxE)
        return np.asarray(rows_BxK, np.int64)[:count], np.asarray(scores_BxK)[:count]

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The rows of one device from disk; rows past the end are zero (and never found)."""
        start, stop, _ = index[0].indices(self.layout.padded)
        return self.vectors.span(start, stop, pad_to=stop - start)
