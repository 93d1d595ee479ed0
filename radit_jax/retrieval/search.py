"""Query vector → the k passages of highest inner product (Eq. 1): exact on the device mesh, or ScaNN on the hosts.

Both searchers have one method, ``search(query_BxE, k) -> (rows_BxK, scores_BxK)``, best first; rows index the passage store and the
vectors. The scores of both are float32 inner products with the stored vectors, since p_R (Eq. 2) is a softmax over them. Several
processes search together: all with the same queries, and all get what was found.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from jax.sharding import Mesh

from radit_jax.errors import InputError
from radit_jax.retrieval.candidates import Found
from radit_jax.retrieval.exact import ExactSearcher
from radit_jax.retrieval.scann import ScannSearcher, ScannSettings
from radit_jax.retrieval.vectors import Vectors

RECALL = 0.95  # target of approx_max_k in each block, where none is given (JAX's default)
KINDS = ("exact", "approx", "scann")


class Searcher(Protocol):
    """What retrieval needs of an index."""

    vectors: Vectors

    def search(self, query_BxE: np.ndarray, k: int) -> Found: ...


def make_searcher(
    kind: str, vectors: Vectors, *, mesh: Mesh | None = None, recall: float = RECALL, settings: ScannSettings | None = None, parts: int = 0
) -> ExactSearcher | ScannSearcher:
    """A searcher of this kind: "exact" (on `mesh`), "approx" (the same by approx_max_k with a `recall` target) or "scann" (in `parts`)."""
    if kind not in KINDS:
        raise InputError(f"searcher {kind!r}, expected {', '.join(map(repr, KINDS[:-1]))} or {KINDS[-1]!r}")
    if kind == "scann":
        return ScannSearcher(vectors, settings, parts)
    return ExactSearcher(vectors, mesh, recall=recall if kind == "approx" else 0.0)
