"""The peer of `launch/bench.py search`: the same queries over the same vectors in faiss-cpu.

    PYTHON_WITH_FAISS tests/peers/faiss_peer.py job.json

Runs as a process of an environment of its own and imports nothing of radit_jax. Says one JSON line when its index is built and tuned, then
for every line "run" on stdin searches all queries once and answers with one JSON line. `flat` is faiss' exact index. For `ivfpq` a careful
person's choice is made: 2·√N lists; codes of 4 bits for two dimensions each, scanned by SIMD ("fast scan", faiss' own answer to ScaNN); the
best candidates scored again by the vectors themselves, without which no high recall is reached; of the settings that reach it, the fastest.
"""

from __future__ import annotations

import json
import math
import sys
import time

import faiss
import numpy as np
from protocol import answer_runs, say

TRAINING = 128_000  # vectors that lists and codes are learned from: 64 a list at 10⁶ vectors, faiss asks for 39 or more
TUNING = 250  # queries of a first look for the nprobe that reaches the recall
NPROBE_STEP = 1.1
TIMED = 3  # searches of each setting that reaches it; the quickest counts
K_FACTORS = (32, 16, 8, 4)  # candidates scored again, in multiples of k
MOST_LISTS = 0.25  # of all lists: beyond, the flat index is as fast


def main(path: str) -> None:
    with open(path) as file:
        job = json.load(file)
    faiss.omp_set_num_threads(job["threads"])
    vectors, queries = np.load(job["vectors"], mmap_mode="r"), np.load(job["queries"])
    began = time.perf_counter()
    if job["index"] == "flat":
        index, settings = flat(vectors), {}
        search = lambda: index.search(queries, job["k"])[1]  # noqa: E731
    else:
        search, settings = ivfpq(vectors, queries, np.load(job["truth"]), job["k"], job["recall"])
    build = time.perf_counter() - began
    say({"ready": True, "faiss": faiss.__version__, "index": job["index"], "build_and_tune_s": round(build, 1), **settings})
    answer_runs(search)


def flat(vectors: np.ndarray) -> faiss.Index:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    return index


def ivfpq(vectors: np.ndarray, queries: np.ndarray, truth: np.ndarray, k: int, wanted: float):
    """(search, settings) of the fastest index and setting with at least the recall wanted; of the highest recall where none has."""
    count, dim = vectors.shape
    lists = min(round(2 * math.sqrt(count)), max(count // 39, 1))
    codes = dim if dim % 2 else dim // 2
    refiner, factory = flat(vectors), f"IVF{lists},PQ{codes}x4fs"
    base = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    base.cp.max_points_per_centroid = max(TRAINING // lists, 39)
    base.train(np.ascontiguousarray(vectors[np.random.default_rng(0).permutation(count)[:TRAINING]]))
    base.add(np.ascontiguousarray(vectors))
    candidates = tuned(base, refiner, queries, truth, k, wanted)
    good = [found for found in candidates if found["recall"] >= wanted]
    best = min(good, key=lambda found: found["seconds"]) if good else max(candidates, key=lambda found: found["recall"])
    index = faiss.IndexRefine(base, refiner)
    index.k_factor, base.nprobe = best["k_factor"], best["nprobe"]
    settings = {"factory": factory} | {key: best[key] for key in ("nprobe", "k_factor", "recall")}
    held = (base, refiner)  # Python would free what the index only points to
    return lambda: held and index.search(queries, k)[1], settings


def tuned(base: faiss.Index, refiner: faiss.Index, queries, truth, k: int, wanted: float) -> list[dict]:
    """For each k_factor the least nprobe (of a ladder) that reaches the recall wanted, with its time; the last one where none does."""
    ladder, most = [1], max(round(MOST_LISTS * base.nlist), min(base.nlist, 64))
    while ladder[-1] < most:
        ladder.append(min(math.ceil(NPROBE_STEP * ladder[-1] + 0.5), most))
    found = []
    for k_factor in K_FACTORS:
        index = faiss.IndexRefine(base, refiner)
        index.k_factor = k_factor

        def measured(nprobe: int, count: int, index=index, k_factor=k_factor) -> dict:
            base.nprobe = nprobe
            began = time.perf_counter()
            rows = index.search(queries[:count], k)[1]
            seconds = time.perf_counter() - began
            return {"k_factor": k_factor, "nprobe": nprobe, "seconds": seconds, "recall": recall_of(rows, truth[:count])}

        if found and measured(most, TUNING)["recall"] < wanted:
            break  # with fewer candidates neither
        low, high = 0, len(ladder) - 1  # recall grows with nprobe
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if measured(ladder[middle], TUNING)["recall"] >= wanted else (middle + 1, high)
        setting = measured(ladder[low], len(queries))
        while setting["recall"] < wanted and low + 1 < len(ladder):
            low += 1
            setting = measured(ladder[low], len(queries))
        again = [measured(ladder[low], len(queries))["seconds"] for _ in range(TIMED)]
        found.append(setting | {"seconds": min(again)})
    return found


def recall_of(rows: np.ndarray, truth: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(rows.tolist(), truth.tolist())]))


if __name__ == "__main__":
    main(sys.argv[1])
