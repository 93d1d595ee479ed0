"""Embedding, index and search over two processes, and then over four that go on from what two left."""

from __future__ import annotations

import numpy as np
import processes
import pytest
import search_worker
import tiny
from processes import ROOT

from radit_jax import sharding
from radit_jax.data.corpus import PassageStore, build_store
from radit_jax.retrieval import embed
from radit_jax.retrieval.encode import encoding
from radit_jax.retrieval.retrieve import Retrieval
from radit_jax.retrieval.vectors import open_vectors
from radit_jax.types import Example

K = search_worker.K


def run(folder, count: int) -> list[dict[str, np.ndarray]]:
    """What each of `count` processes of two devices found."""
    started = processes.start([str(ROOT / "tests" / "search_worker.py"), str(folder)], count, devices=2)
    for code, _, stderr in processes.finish(started):
        assert code == 0, stderr[-3000:]
    return [dict(np.load(folder / f"found-{count}-{i}.npz")) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    (folder / "store").mkdir()
    build_store(tiny.passages(40), folder / "store", max_words=10)
    return folder


@pytest.fixture(scope="module")
def of_two(folder):
    return run(folder, 2)


@pytest.fixture(scope="module")
def of_four(folder, of_two):
    """Two of the six shards are gone; the index of two parts is there."""
    for i in (1, 4):
        (folder / "vectors" / f"vectors-{i:05d}.npy").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "vectors").glob("*.npy")}
    found = run(folder, 4)
    assert {name: (folder / "vectors" / name).stat().st_mtime_ns for name in before} == before
    return found


@pytest.fixture(params=[2, 4])
def found(request, of_two, of_four):
    return of_two if request.param == 2 else of_four


def top_k(scores_BxN: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows_BxK = np.argsort(-scores_BxN, axis=1, kind="stable")[:, :k]
    return rows_BxK, np.take_along_axis(scores_BxN, rows_BxK, axis=1)


def test_exact_search_finds_the_same_on_every_mesh_and_process(found):
    vectors_NxE, query_BxE = search_worker.tied()
    rows_BxK, scores_BxK = top_k(query_BxE @ vectors_NxE.T, 103)
    keys = [key for key in found[0] if key.startswith("tied rows")]
    assert len(keys) >= 2
    for process in found:
        for key in keys:
            np.testing.assert_array_equal(process[key], rows_BxK)
            np.testing.assert_array_equal(process[key.replace("rows", "scores")], scores_BxK)
            assert process[key.replace("tied rows", "share read")] == 1 / len(found)  # each reads its own rows alone


def test_processes_embed_what_one_process_embeds(folder, found, tmp_path):
    store = PassageStore(folder / "store")
    mesh = sharding.make_mesh(1, 1)
    embed.embed_passages(
        encoding(tiny.encoder(), mesh), tiny.tokenizer(), store, tmp_path, **search_worker.SIZES, dtype="bfloat16", shard_size=7
    )
    alone, shared = open_vectors(tmp_path), open_vectors(folder / "vectors", 40)
    assert len(shared.shards) == 6
    np.testing.assert_allclose(shared[:], alone[:], atol=2**-8)  # a last bit of bfloat16


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_every_process_retrieves_the_best_of_all_vectors(folder, found, kind):
    vectors = open_vectors(folder / "vectors")
    rows_BxK, scores_BxK = top_k(found[0]["queries"] @ vectors[:].T, K)
    for process in found:
        np.testing.assert_array_equal(process["queries"], found[0]["queries"])
        np.testing.assert_array_equal(process[f"{kind} rows"], rows_BxK)
        np.testing.assert_allclose(process[f"{kind} scores"], scores_BxK, rtol=1e-5)
    examples = [Example(f"q{i}", query, "", "") for i, query in enumerate(search_worker.QUERIES)]
    stored = Retrieval(folder / kind, examples, PassageStore(folder / "store"))
    np.testing.assert_array_equal([member.rows_K for member in stored], rows_BxK)


def test_parts_are_dealt_out_anew(of_two, of_four):
    assert [process["parts"].tolist() for process in of_two] == [[0], [1]]
    assert [process["parts"].tolist() for process in of_four] == [[0], [1], [], []]
