"""One process of several that embed a corpus, index it and search it on their common mesh; what it found goes to FOLDER/found-N-I.npz.

python tests/search_worker.py FOLDER [--coordinator= --processes= --process=]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

import numpy as np  # noqa: E402
import tiny  # noqa: E402

from radit_jax import distributed, sharding  # noqa: E402
from radit_jax.data.corpus import PassageStore  # noqa: E402
from radit_jax.retrieval import candidates, embed, retrieve, scann  # noqa: E402
from radit_jax.retrieval.encode import encoding  # noqa: E402
from radit_jax.retrieval.exact import ExactSearcher  # noqa: E402
from radit_jax.retrieval.vectors import Vectors, open_vectors  # noqa: E402
from radit_jax.types import Example  # noqa: E402

QUERIES = [" ".join(pair) for pair in zip(tiny.WORDS, tiny.WORDS[1:])]
K = 5
SIZES = {"batch_tokens": 128, "max_tokens": 16}  # one shape: every process compiles for itself


class Counted(Vectors):
    """Vectors that count the rows that were read."""

    read = 0

    def span(self, start: int, stop: int, *further, **options) -> np.ndarray:
        self.read += stop - start
        return super().span(start, stop, *further, **options)


def tied() -> tuple[np.ndarray, np.ndarray]:
    """103 vectors and 7 queries of small whole numbers: float32 sums are exact and most scores are tied."""
    rng = np.random.default_rng(0)
    return rng.integers(-2, 3, (103, 8)).astype(np.float32), rng.integers(-2, 3, (7, 8)).astype(np.float32)


def embed_store(folder: Path) -> Vectors:
    """The vectors of the store in `folder`, each process's shards by its own devices."""
    mesh, store = sharding.local_mesh(sharding.make_mesh()), PassageStore(folder / "store")
    (folder / "vectors").mkdir(exist_ok=True)
    how = encoding(tiny.encoder(), mesh), tiny.tokenizer(), store, folder / "vectors"
    embed.embed_passages(*how, **SIZES, dtype="bfloat16", mesh=mesh, shard_size=7)
    return open_vectors(folder / "vectors", len(store))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for name, kind in (("coordinator", str), ("processes", int), ("process", int)):
        parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    distributed.join(distributed.Cluster(given.coordinator, given.processes, given.process), timeout_s=120)
    folder, found = given.folder, {}
    vectors = embed_store(folder)
    tied_NxE, query_BxE = tied()
    for model in {1, 2, jax.device_count() // 2}:
        mesh = sharding.make_mesh(-1, model)
        counted = Counted([tied_NxE[:50], tied_NxE[50:]])
        searcher = ExactSearcher(counted, mesh, score_bytes=4 * 4 * candidates.QUERIES)
        found[f"share read {mesh.shape}"] = counted.read / searcher.layout.padded
        found[f"tied rows {mesh.shape}"], found[f"tied scores {mesh.shape}"] = searcher.search(query_BxE, 103)

    # The same queries everywhere, each process on its own devices.
    mesh = sharding.local_mesh(sharding.make_mesh())
    encode = encoding(tiny.encoder(), mesh)
    examples = [Example(f"q{i}", query, "", "") for i, query in enumerate(QUERIES)]

    def embed_queries(texts):
        return embed.embed_queries(encode, tiny.tokenizer(), texts, **SIZES, mesh=mesh)

    found["queries"] = embed_queries(QUERIES)
    (folder / "index").mkdir(exist_ok=True)
    scann.build_index(folder / "index", vectors)
    for name, searcher in (
        ("exact", ExactSearcher(vectors, sharding.make_mesh())),
        ("scann", scann.ScannSearcher.load(folder / "index", vectors)),
    ):
        retrieval = retrieve.retrieve(examples, embed_queries, searcher, PassageStore(folder / "store"), K)
        found[f"{name} rows"], found[f"{name} scores"] = retrieval.found.rows, retrieval.found.scores
        (folder / name).mkdir(exist_ok=True)
        retrieve.write_retrieval(folder / name, retrieval)
    found["parts"] = np.array(list(searcher.parts))
    np.savez(folder / f"found-{given.processes}-{given.process}.npz", **found)
    distributed.meet("done")


if __name__ == "__main__":
    main()
