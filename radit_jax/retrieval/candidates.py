"""What every searcher returns and how it is asked: rows_BxK and scores_BxK, best first, among equals the lower row first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from radit_jax import distributed
from radit_jax.errors import InputError
from radit_jax.retrieval.vectors import Vectors

Found = tuple[np.ndarray, np.ndarray]  # rows_BxK int64, scores_BxK float32
QUERIES = 256  # searched or rescored at a time: bounds the score matrix
NO_ROW = -1  # of a candidate that is none; its score is −∞


def checked(query_BxE: np.ndarray, k: int, vectors: Vectors) -> np.ndarray:
    """The queries in float32. Raises InputError on a k or a dimension that does not fit, and on vectors that are not finite."""
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


def in_groups(search: Callable[[np.ndarray, int], Found], query_BxE: np.ndarray, k: int) -> Found:
    """`search` for QUERIES queries after the other."""
    found = [search(query_BxE[start : start + QUERIES], k) for start in range(0, len(query_BxE), QUERIES)]
    rows_BxK, scores_BxK = (np.concatenate(parts) for parts in zip(*found))
    return rows_BxK, scores_BxK


def rescored(query_BxE: np.ndarray, rows_BxK: np.ndarray, vectors: Vectors) -> Found:
    """Float32 scores from the stored vectors; NO_ROW stays a candidate that is none."""
    vectors_BxKxE = vectors[np.maximum(rows_BxK, 0).ravel()].reshape(*rows_BxK.shape, vectors.dim)
    scores_BxK = np.matmul(vectors_BxKxE, query_BxE[:, :, None])[:, :, 0]
    return rows_BxK, np.where(rows_BxK == NO_ROW, -np.inf, scores_BxK)


def merged(found: Found, k: int) -> Found:
    """The k best of these candidates; fewer are filled up with NO_ROW."""
    rows_BxC, scores_BxC = found
    if (short := k - rows_BxC.shape[1]) > 0:
        rows_BxC = np.pad(rows_BxC, ((0, 0), (0, short)), constant_values=NO_ROW)
        scores_BxC = np.pad(scores_BxC, ((0, 0), (0, short)), constant_values=-np.inf)
    order_BxK = np.lexsort((rows_BxC, -scores_BxC))[:, :k]
    return np.take_along_axis(rows_BxC, order_BxK, axis=1), np.take_along_axis(scores_BxC, order_BxK, axis=1)


def merged_over_processes(found: Found, k: int) -> Found:
    """The k best of what all processes found for the same queries, on every one of them; they call this together."""
    rows_BxK, scores_BxK = merged(found, k)
    if distributed.count() == 1:
        return rows_BxK, scores_BxK
    # One exchange instead of two. JAX would cut int64 to 32 bits in any case, and there are no more rows than that.
    bits_PxBx2K = distributed.gather(np.concatenate([rows_BxK.astype(np.int32), scores_BxK.view(np.int32)], axis=1))
    bits_BxPx2K = np.ascontiguousarray(np.moveaxis(bits_PxBx2K, 0, 1))
    rows_BxC, scores_BxC = (np.ascontiguousarray(half).reshape(len(rows_BxK), -1) for half in np.split(bits_BxPx2K, 2, axis=2))
    return merged((rows_BxC.astype(np.int64), scores_BxC.view(np.float32)), k)
