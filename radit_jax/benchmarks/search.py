"""Search at scale, ours against faiss in one run (`launch/bench.py search`): queries/s and recall@10 of exact search and of ScaNN.

Exact search meets faiss' flat index; ScaNN meets its IVF-PQ at the same recall, both with the fastest settings that reach 0.99 on these
questions (tests/peers/faiss_peer.py tunes the peer). The vectors are a mixture, for independent Gaussian vectors have no near neighbours to
find: passages around topics, topics around fields, in coordinates that fall off as 1/√i as those of text encoders do; unit length. A
question is a passage with noise.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax.benchmarks import contest
from radit_jax.benchmarks.contest import Work
from radit_jax.errors import InputError
from radit_jax.retrieval.exact import ExactSearcher
from radit_jax.retrieval.scann import ScannSearcher
from radit_jax.retrieval.search import Searcher
from radit_jax.retrieval.vectors import Vectors
from radit_jax.sharding import make_mesh

K = 10
PASSAGES_PER_TOPIC, TOPICS_PER_FIELD = 40, 15
SPREAD, NOISE = 0.7, 0.4  # of a passage around its topic (and a topic around its field), of a question around its passage
CHUNK = 16_384  # vectors made or scored at a time
RECALL = 0.99  # that ScaNN is tuned to
LEAVES = tuple(np.unique(np.round(1.1 ** np.arange(90)).astype(int)).tolist())
TIMED = 3  # searches of each setting that reaches it; the quickest counts
REORDER = (200, 100, 50)  # candidates scored again
EQUAL = 1e-3  # recalls so near are equal: 1.0 is reached by searching everything alone
SCRIPT = "faiss_peer.py"


def bench(
    count: int,
    dim: int,
    queries: int,
    *,
    repetitions: int,
    peer_python: str | None,
    kinds: Sequence[str] = ("exact", "scann"),
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yields a result of each kind in the form of `contest.compare`: exact search against faiss flat, ScaNN against faiss IVF-PQ."""
    if unknown := [kind for kind in kinds if kind not in ("exact", "scann")]:
        raise InputError(f"bench search: index {unknown[0]!r}, expected exact or scann")
    if min(count, dim, queries) < 1 or count < K:
        raise InputError(f"bench search: {count} vectors of {dim} and {queries} queries, expected at least {K}, 1 and 1")
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        files = {name: str(Path(folder) / f"{name}.npy") for name in ("vectors", "queries", "truth")}
        vectors_NxE, query_BxE = mixture(count, dim, queries, seed)
        truth_BxK = nearest(vectors_NxE, query_BxE, K)
        for name, array in (("vectors", vectors_NxE), ("queries", query_BxE), ("truth", truth_BxK)):
            np.save(files[name], array)
        del vectors_NxE
        vectors = Vectors([np.load(files["vectors"], mmap_mode="r")])
        contests = {
            "exact": (lambda: ExactSearcher(vectors, make_mesh()), "flat"),
            "scann": (lambda: ScannSearcher(vectors), "ivfpq"),
        }
        for kind in kinds:
            how = (*contests[kind], files, query_BxE, truth_BxK)
            result = _against(f"search {kind}", *how, repetitions=repetitions, peer_python=peer_python)
            yield result | {"vectors": count, "dim": dim, "queries": queries, "k": K}


def _against(
    kind: str,
    make: Callable[[], Searcher],
    index: str,
    files: dict[str, str],
    query_BxE: np.ndarray,
    truth_BxK: np.ndarray,
    *,
    repetitions: int,
    peer_python: str | None,
) -> dict[str, Any]:
    """One searcher of ours against one index of faiss, which is to reach our recall."""
    began = time.monotonic()
    searcher = make()
    build_s = time.monotonic() - began
    chosen = recall(searcher.search(query_BxE, K)[0], truth_BxK)  # as `ScannSettings.for_corpus` has it
    if isinstance(searcher, ScannSearcher):
        searcher = tuned(searcher, query_BxE, truth_BxK)
    ours = recall(searcher.search(query_BxE, K)[0], truth_BxK)

    def compare(ours_BxK: np.ndarray, theirs_BxK: list) -> dict[str, float]:
        return {"recall@10": recall(ours_BxK, truth_BxK), "peer_recall@10": recall(np.asarray(theirs_BxK), truth_BxK)}

    work = Work(
        "queries",
        len(query_BxE),
        lambda: searcher.search(query_BxE, K)[0],
        {**files, "index": index, "k": K, "recall": ours - EQUAL},
        compare,
        lambda found: found["peer_recall@10"] >= found["recall@10"] - EQUAL,
        SCRIPT,
    )
    settings = dataclasses.asdict(searcher.settings) if isinstance(searcher, ScannSearcher) else {"devices": searcher.layout.devices}
    about = {"recall@10": round(ours, 4), "recall@10 untuned": round(chosen, 4), "build_s": round(build_s, 1), "settings": settings}
    return contest.compare(kind, work, repetitions=repetitions, peer_python=peer_python) | about


def tuned(searcher: ScannSearcher, query_BxE: np.ndarray, truth_BxK: np.ndarray) -> ScannSearcher:
    """The searcher with the fastest of the settings that reach RECALL, as the peer's are chosen; with its own where none does."""
    best = (np.inf, searcher)
    for reorder in REORDER:
        for leaves in LEAVES:
            settings = {"leaves_searched": leaves, "reorder": reorder, "reorder_per_k": 1}
            other = copy.copy(searcher)
            other.parts = {
                i: dataclasses.replace(part, settings=dataclasses.replace(part.settings, **settings))
                for i, part in searcher.parts.items()
                if leaves <= part.settings.leaves
            }
            if len(other.parts) < len(searcher.parts):
                break
            if recall(other.search(query_BxE, K)[0], truth_BxK) >= RECALL:
                best = min(best, (min(_seconds(other, query_BxE) for _ in range(TIMED)), other), key=lambda found: found[0])
                break
    return best[1]


def _seconds(searcher: Searcher, query_BxE: np.ndarray) -> float:
    began = time.monotonic()
    searcher.search(query_BxE, K)
    return time.monotonic() - began


def text(result: dict[str, Any]) -> str:
    """A result as people read it."""
    theirs = {key: value for key, value in (result.get("peer_about") or {}).items() if key != "ready"}
    ours = f"{result['vectors']:,} vectors of {result['dim']}, recall@{K} {result['recall@10']:.4f}, built in {result['build_s']} s"
    return f"{contest.text([result])}\n    {ours}; {theirs or 'no peer'}"


def mixture(count: int, dim: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(vectors_NxE, query_BxE), both float32 of unit length."""
    rng = np.random.default_rng(seed)
    topics = max(count // PASSAGES_PER_TOPIC, 1)
    scale_E = (1 + np.arange(dim, dtype=np.float32)) ** -0.5
    fields_FxE = rng.standard_normal((max(topics // TOPICS_PER_FIELD, 1), dim), np.float32)
    topics_CxE = fields_FxE[rng.integers(len(fields_FxE), size=topics)] + SPREAD * rng.standard_normal((topics, dim), np.float32)
    vectors_NxE = np.empty((count, dim), np.float32)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        drawn_MxE = topics_CxE[rng.integers(topics, size=size)] + SPREAD * rng.standard_normal((size, dim), np.float32)
        vectors_NxE[start : start + size] = _unit(drawn_MxE * scale_E)
    # Noise as large as NOISE beside a passage before it was brought to unit length.
    length = np.sqrt((1 + 2 * SPREAD**2) * np.sum(scale_E**2))
    noise_BxE = NOISE / length * scale_E * rng.standard_normal((queries, dim), np.float32)
    return vectors_NxE, _unit(vectors_NxE[rng.integers(count, size=queries)] + noise_BxE)


def nearest(vectors_NxE: np.ndarray, query_BxE: np.ndarray, k: int) -> np.ndarray:
    """rows_BxK of highest inner product, best first, by numpy alone."""
    rows_BxC, scores_BxC = np.zeros((len(query_BxE), 0), np.int64), np.zeros((len(query_BxE), 0), np.float32)
    for start in range(0, len(vectors_NxE), CHUNK):
        scores_BxM = query_BxE @ vectors_NxE[start : start + CHUNK].T
        at_BxK = np.argpartition(-scores_BxM, min(k, scores_BxM.shape[1]) - 1, axis=1)[:, :k]
        rows_BxC = np.concatenate([rows_BxC, start + at_BxK], axis=1)
        scores_BxC = np.concatenate([scores_BxC, np.take_along_axis(scores_BxM, at_BxK, axis=1)], axis=1)
    return np.take_along_axis(rows_BxC, np.argsort(-scores_BxC, axis=1)[:, :k], axis=1)


def recall(rows_BxK: Sequence | np.ndarray, truth_BxK: np.ndarray) -> float:
    """The share of the true k nearest that was found."""
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows_BxK.tolist(), truth_BxK.tolist())]))


def _unit(vectors_NxE: np.ndarray) -> np.ndarray:
    return (vectors_NxE / np.linalg.norm(vectors_NxE, axis=1, keepdims=True)).astype(np.float32)
