"""Query vector → the k passages of highest inner product (Eq. 1): exact on the device mesh, or ScaNN on the host.

Both searchers have one method, ``search(query_BxE, k) -> (rows_BxK, scores_BxK)``, best first; rows index the passage store and the
vectors. The scores of both are float32 inner products with the stored vectors, since p_R (Eq. 2) is a softmax over them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
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
from radit_jax.retrieval.vectors import Vectors
from radit_jax.sharding import DATA, MODEL

Found = tuple[np.ndarray, np.ndarray]  # rows_BxK int64, scores_BxK float32
SETTINGS_FILE = "scann.json"
BRUTE_FORCE_BELOW = 10_000  # vectors; there a scan of all is as fast as the tree, and exact
QUERIES = 256  # queries searched or rescored at a time: bounds the score matrix


class Searcher(Protocol):
    """What retrieval needs of an index."""

    vectors: Vectors

    def search(self, query_BxE: np.ndarray, k: int) -> Found: ...


class ExactSearcher:
    """Exact inner-product top-k with the vectors spread over all devices of a ("data", "model") mesh (one device without a mesh).

    Each device scores its rows block by block and keeps k of every block; what is kept is merged. Equal scores: the lower row first.
    """

    def __init__(self, vectors: Vectors, mesh: Mesh | None = None, block: int = 16384):
        self.vectors = vectors
        self._mesh = mesh if mesh is not None else Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (DATA, MODEL))
        devices = self._mesh.size
        self._blocks = devices * math.ceil(len(vectors) / (devices * block))  # as many on every device
        self._block = math.ceil(len(vectors) / self._blocks)
        sharding = NamedSharding(self._mesh, P((DATA, MODEL)))
        self._vectors_GxMxE = jax.make_array_from_callback((self._blocks, self._block, vectors.dim), sharding, self._read)
        self._starts_G = jax.device_put(np.arange(self._blocks, dtype=np.int32) * self._block, sharding)
        self._top_k = jax.jit(self._blocks_then_merge, static_argnames="k", out_shardings=NamedSharding(self._mesh, P()))

    def search(self, query_BxE: np.ndarray, k: int) -> Found:
        """Returns rows_BxK (int64) and scores_BxK (float32), best first. Raises InputError on a k or a dimension that does not fit."""
        return _in_groups(self._search_some, _checked(query_BxE, k, self.vectors), k)

    def _search_some(self, query_BxE: np.ndarray, k: int) -> Found:
        count = len(query_BxE)
        padding = (1 << (count - 1).bit_length()) - count  # a power of two of queries: few compilations
        rows_BxK, scores_BxK = self._top_k(np.pad(query_BxE, ((0, padding), (0, 0))), self._vectors_GxMxE, self._starts_G, k=k)
        return np.asarray(rows_BxK, np.int64)[:count], np.asarray(scores_BxK)[:count]

    def _read(self, index: tuple[slice, ...]) -> np.ndarray:
        """The blocks of one device from disk; rows past the end are zero (and never found)."""
        first, last, _ = index[0].indices(self._blocks)
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
    """How ScaNN is built and searched; `for_corpus` chooses by size, any field may be replaced.

    The anisotropic penalty stands for ScaNN's threshold T, whose effect depends on the dimension d and on the norm of the vectors:
    penalty = (d−1)·t² / (1−t²) with t = T/|x|. Its customary T = 0.2 (unit vectors, d = 100) is a penalty of 4.
    """

    leaves: int  # leaves of the tree; 0: no tree and no codes, brute force
    leaves_searched: int
    reorder: int = 200  # best candidates by their codes that are scored in float32 …
    reorder_per_k: int = 10  # … or this many times k, if that is more
    dims_per_block: int = 2  # dimensions that share one 4-bit code
    anisotropic_penalty: float = 4.0  # an error along the vector costs so many times one across it
    soar: float = 1.5  # every vector is in a second leaf as well (ScaNN's SOAR λ); 0: in one leaf
    training_sample: int = 250_000  # vectors that leaves and codes are learned from

    @classmethod
    def for_corpus(cls, count: int, dim: int) -> ScannSettings:
        """The settings for so many vectors of this dimension: √N leaves, of which 5·N^¼ are searched.

        On questions over real passages (MiniLM, N = 3,650 … 29,239) recall@10 of 0.99 needed 35, 41, 43, 46 leaves and 0.995 needed
        41, 49, 56, 61: about N^0.19. Codes lost nothing there. ScaNN's fast scan takes at most 256 blocks.
        """
        if count < BRUTE_FORCE_BELOW:
            return cls(leaves=0, leaves_searched=0)
        leaves = round(math.sqrt(count))
        return cls(leaves, min(round(5 * count**0.25), leaves), dims_per_block=max(2, math.ceil(dim / 256)))


class ScannSearcher:
    """ScaNN on the host: a tree of leaves, product-quantized scores inside the best of them, float32 scores for the best of those."""

    def __init__(self, vectors: Vectors, settings: ScannSettings | None = None):
        self.vectors = vectors
        self.settings = settings or ScannSettings.for_corpus(len(vectors), vectors.dim)
        self._index = _build(vectors[:], self.settings)

    def search(self, query_BxE: np.ndarray, k: int) -> Found:
        """Returns rows_BxK (int64) and scores_BxK (float32), best first. Raises InputError on a k or a dimension that does not fit."""
        return _in_groups(self._search_some, _checked(query_BxE, k, self.vectors), k)

    def _search_some(self, query_BxE: np.ndarray, k: int) -> Found:
        settings = self.settings
        reorder = min(max(settings.reorder, settings.reorder_per_k * k), len(self.vectors))
        rows_BxK, short_B = self._candidates(query_BxE, k, reorder, settings.leaves_searched)
        if short_B.any():  # the leaves searched hold fewer than k passages: search all of them
            rows_BxK[short_B], _ = self._candidates(query_BxE[short_B], k, len(self.vectors), settings.leaves)
        return _rescored(query_BxE, rows_BxK, self.vectors)

    def _candidates(self, query_BxE: np.ndarray, k: int, reorder: int, leaves: int) -> tuple[np.ndarray, np.ndarray]:
        """rows_BxK, and which queries found fewer than k (ScaNN fills those with a score of NaN)."""
        how = {} if not self.settings.leaves else {"pre_reorder_num_neighbors": reorder, "leaves_to_search": leaves}
        rows_BxK, scores_BxK = self._index.search_batched_parallel(query_BxE, final_num_neighbors=k, **how)
        return rows_BxK.astype(np.int64), ~np.isfinite(scores_BxK).all(axis=1)

    def save(self, folder: Path) -> None:
        """Writes the index to `folder`, which may be moved afterwards."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._index.serialize(str(folder), relative_path=True)
        about = {"settings": dataclasses.asdict(self.settings), "count": len(self.vectors), "dim": self.vectors.dim}
        artifacts.write_json(folder / SETTINGS_FILE, about)

    @classmethod
    def load(cls, folder: Path, vectors: Vectors) -> ScannSearcher:
        """Opens what `save` wrote, over the vectors it was built from. Raises InputError when it was built from others."""
        folder = Path(folder)
        try:
            about = json.loads((folder / SETTINGS_FILE).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"{folder}: no ScaNN index ({SETTINGS_FILE} is missing or damaged)") from error
        if (about["count"], about["dim"]) != (len(vectors), vectors.dim):
            found, given = f"{about['count']:,} vectors of dimension {about['dim']}", f"{len(vectors):,} of dimension {vectors.dim}"
            raise InputError(f"{folder}: the index is of {found}, the vectors given are {given}")
        if any(folder.glob("*.pkl")):  # ScaNN would unpickle it; we never write one
            raise InputError(f"{folder}: holds a pickle file, expected only what ScannSearcher.save writes")
        searcher = cls.__new__(cls)
        searcher.vectors, searcher.settings = vectors, ScannSettings(**about["settings"])
        searcher._index = scann.load_searcher(str(folder), assets_backcompat_shim=False)
        return searcher


def make_searcher(
    kind: str, vectors: Vectors, *, mesh: Mesh | None = None, block: int = 16384, settings: ScannSettings | None = None
) -> ExactSearcher | ScannSearcher:
    """A searcher of this kind, "exact" (on `mesh`) or "scann" (with `settings`)."""
    if kind == "exact":
        return ExactSearcher(vectors, mesh, block)
    if kind == "scann":
        return ScannSearcher(vectors, settings)
    raise InputError(f"searcher {kind!r}, expected 'exact' or 'scann'")


def _build(vectors_NxE: np.ndarray, settings: ScannSettings) -> scann.ScannSearcher:
    builder = scann.builder(vectors_NxE, 10, "dot_product")  # 10: every search says its own k
    if not settings.leaves:
        return builder.score_brute_force().build()
    count, dim = vectors_NxE.shape
    sample = min(settings.training_sample, count)
    builder = builder.tree(settings.leaves, settings.leaves_searched, training_sample_size=sample, soar_lambda=settings.soar or None)
    norm = math.sqrt(np.einsum("ne,ne->", vectors_NxE[:sample], vectors_NxE[:sample]) / sample)
    threshold = norm * math.sqrt(settings.anisotropic_penalty / (dim - 1 + settings.anisotropic_penalty))
    builder = builder.score_ah(settings.dims_per_block, anisotropic_quantization_threshold=threshold, training_sample_size=sample)
    return builder.reorder(settings.reorder).build()


def _rescored(query_BxE: np.ndarray, rows_BxK: np.ndarray, vectors: Vectors) -> Found:
    """Float32 scores from the stored vectors, and the order that they give (equal scores: the lower row first)."""
    vectors_BxKxE = vectors[rows_BxK.ravel()].reshape(*rows_BxK.shape, vectors.dim)
    scores_BxK = np.matmul(vectors_BxKxE, query_BxE[:, :, None])[:, :, 0]
    order_BxK = np.lexsort((rows_BxK, -scores_BxK))
    return np.take_along_axis(rows_BxK, order_BxK, axis=1), np.take_along_axis(scores_BxK, order_BxK, axis=1)


def _checked(query_BxE: np.ndarray, k: int, vectors: Vectors) -> np.ndarray:
    query_BxE = np.ascontiguousarray(query_BxE, np.float32)
    if not len(query_BxE):
        raise InputError("no query vectors to search for")
    if query_BxE.ndim != 2 or query_BxE.shape[1] != vectors.dim:
        raise InputError(f"query vectors have dimension {query_BxE.shape[-1]}, the index has {vectors.dim} (another encoder's?)")
    if not 1 <= k <= len(vectors):
        raise InputError(f"k = {k} passages asked, expected 1 to {len(vectors):,} (the passages of the corpus)")
    if not np.isfinite(query_BxE).all():
        raise InputError(f"query vector {int(np.flatnonzero(~np.isfinite(query_BxE).all(axis=1))[0])} is not finite")
    return query_BxE


def _in_groups(search: Callable[[np.ndarray, int], Found], query_BxE: np.ndarray, k: int) -> Found:
    found = [search(query_BxE[start : start + QUERIES], k) for start in range(0, len(query_BxE), QUERIES)]
    rows_BxK, scores_BxK = (np.concatenate(parts) for parts in zip(*found))
    return rows_BxK, scores_BxK
