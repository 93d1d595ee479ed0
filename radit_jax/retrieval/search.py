"""Query vector → the k passages of highest inner product (Eq. 1): exact on the device mesh, or ScaNN on the host.

Both searchers have one method, ``search(query_BxE, k) -> (rows_BxK, scores_BxK)``, best first; rows index the passage store and the
vectors. The scores of both are float32 inner products with the stored vectors, since p_R (Eq. 2) is a softmax over them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scann import scann_ops_pybind as scann

from radit_jax import artifacts
from radit_jax.errors import InputError
from radit_jax.retrieval.embed import Vectors
from radit_jax.sharding import DATA, MODEL

SETTINGS_FILE = "scann.json"
QUERIES = 256  # queries searched or rescored at a time: bounds the score matrix


class Searcher(Protocol):
    """What retrieval needs of an index."""

    vectors: Vectors

    def search(self, query_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]: ...


class ExactSearcher:
    """Exact inner-product top-k with the vectors spread over all devices of a ("data", "model") mesh (one device without a mesh).

    Each device scores its rows block by block and keeps k of every block; what is kept is merged. Equal scores: the lower row first.
    """

    def __init__(self, vectors: Vectors, mesh: Mesh | None = None, block: int = 16384):
        self.vectors = vectors
        self._mesh = mesh if mesh is not None else Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (DATA, MODEL))
        devices = self._mesh.size
        blocks = devices * max(math.ceil(len(vectors) / (devices * block)), 1)  # G blocks, as many on every device
        self._block = math.ceil(len(vectors) / blocks)
        self._starts = np.arange(blocks, dtype=np.int32) * self._block
        shape, sharding = (blocks, self._block, vectors.dim), NamedSharding(self._mesh, P((DATA, MODEL)))
        self._vectors_GxMxE = jax.make_array_from_callback(shape, sharding, self._read)
        self._starts_G = jax.device_put(self._starts, sharding)
        self._top_k = jax.jit(self._blocks_then_merge, static_argnames="k", out_shardings=NamedSharding(self._mesh, P()))

    def search(self, query_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rows_BxK (int64) and scores_BxK (float32), best first. Raises InputError on a k or a dimension that does not fit."""
        query_BxE = _checked(query_BxE, k, self.vectors)
        found = [self._search_some(some_BxE, k) for some_BxE in _some_queries(query_BxE)]
        rows_BxK, scores_BxK = (np.concatenate(parts) for parts in zip(*found))
        return rows_BxK.astype(np.int64), scores_BxK

    def _search_some(self, query_BxE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(query_BxE)
        padding = (1 << (count - 1).bit_length()) - count  # a power of two of queries: few compilations
        rows_BxK, scores_BxK = self._top_k(np.pad(query_BxE, ((0, padding), (0, 0))), self._vectors_GxMxE, self._starts_G, k=k)
        return np.asarray(rows_BxK)[:count], np.asarray(scores_BxK)[:count]

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The blocks of one device from disk; rows past the end are zero (and never found)."""
        first, last, _ = index[0].indices(len(self._starts))
        part_NxE = self.vectors[first * self._block : last * self._block]
        missing = (last - first) * self._block - len(part_NxE)
        return np.pad(part_NxE, ((0, missing), (0, 0))).reshape(last - first, self._block, self.vectors.dim)

    def _blocks_then_merge(self, query_BxE, vectors_GxMxE, starts_G, *, k: int):
        kept = min(k, self._block)
        axes = (DATA, MODEL)
        best = jax.shard_map(
            functools.partial(_best_of_blocks, count=len(self.vectors), kept=kept),
            mesh=self._mesh,
            in_specs=(P(), P(axes), P(axes)),
            out_specs=(P(axes), P(axes)),
        )
        rows_GxBxK, scores_GxBxK = best(query_BxE, vectors_GxMxE, starts_G)
        # Blocks are in row order and top_k prefers the earlier of equals, so equal scores stay in row order.
        rows_BxN, scores_BxN = (jnp.moveaxis(x, 0, 1).reshape(len(query_BxE), -1) for x in (rows_GxBxK, scores_GxBxK))
        scores_BxK, at_BxK = jax.lax.top_k(scores_BxN, k)
        return jnp.take_along_axis(rows_BxN, at_BxK, axis=1), scores_BxK


def _best_of_blocks(query_BxE, vectors_GxMxE, starts_G, *, count: int, kept: int):
    """The `kept` best rows of every block that one device holds, one block after the other."""

    def of_block(block):
        vectors_MxE, start = block
        # HIGHEST: an accelerator's default would round the inputs to bfloat16 and reorder near neighbours.
        scores_BxM = jnp.einsum("be,me->bm", query_BxE, vectors_MxE, precision=jax.lax.Precision.HIGHEST)
        rows_M = start + jnp.arange(len(vectors_MxE), dtype=jnp.int32)
        scores_BxK, at_BxK = jax.lax.top_k(jnp.where(rows_M[None] < count, scores_BxM, -jnp.inf), kept)
        return start + at_BxK.astype(jnp.int32), scores_BxK

    return jax.lax.map(of_block, (vectors_GxMxE, starts_G))


@dataclasses.dataclass(frozen=True)
class ScannSettings:
    """How ScaNN is built and searched. `leaves` 0: no tree and no hashing, brute force.

    The anisotropic threshold is relative to the root mean square norm of the vectors, because ScaNN's own is absolute
    (its penalty is (d−1)·t²/(1−t²) with t = T/|x|): one number then holds for unit vectors and for DRAGON+'s long ones.
    """

    leaves: int  # leaves of the tree
    leaves_searched: int
    reorder: int  # candidates of the hashing that are scored in float32; at least `reorder_per_k`·k
    reorder_per_k: int = 10
    dims_per_block: int = 2  # of the product quantization
    anisotropic_threshold: float = 0.2
    training_sample: int = 250_000  # vectors that the tree and the codes are trained on

    BRUTE_FORCE_BELOW = 10_000  # passages; there a scan of all of them is as fast as the tree

    @classmethod
    def for_corpus(cls, count: int, dim: int) -> ScannSettings:
        """The settings for so many vectors of this dimension."""
        raise NotImplementedError


def _checked(query_BxE: np.ndarray, k: int, vectors: Vectors) -> np.ndarray:
    query_BxE = np.ascontiguousarray(query_BxE, np.float32)
    if query_BxE.ndim != 2 or query_BxE.shape[1] != vectors.dim:
        raise InputError(f"queries have shape {query_BxE.shape}, the index holds vectors of dimension {vectors.dim}: is it of another encoder?")
    if not 1 <= k <= len(vectors):
        raise InputError(f"k = {k} passages asked, expected 1 to {len(vectors):,} (the passages of the corpus)")
    if not np.isfinite(query_BxE).all():
        raise InputError(f"query vector {int(np.flatnonzero(~np.isfinite(query_BxE).all(axis=1))[0])} is not finite")
    return query_BxE


def _some_queries(query_BxE: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(query_BxE), QUERIES):
        yield query_BxE[start : start + QUERIES]
