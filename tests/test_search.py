"""Exact search is what numpy finds, on every mesh; ScaNN nearly so, with exact scores."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from radit_jax import processor
from radit_jax.errors import InputError
from radit_jax.retrieval import scann
from radit_jax.retrieval.candidates import QUERIES
from radit_jax.retrieval.exact import ExactSearcher, Layout, group_size, top_k_program
from radit_jax.retrieval.scann import ScannSearcher, ScannSettings, build_index
from radit_jax.retrieval.search import make_searcher
from radit_jax.retrieval.vectors import DTYPES, Vectors, open_vectors

MESHES = [(1, 1), (4, 1), (2, 2), (1, 4)]


@pytest.fixture(scope="module")
def small():
    """Small whole numbers: float32 sums are exact and most scores are tied."""
    rng = np.random.default_rng(0)
    return rng.integers(-2, 3, (103, 8)).astype(np.float32), rng.integers(-2, 3, (7, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def topical():
    """12,000 unit vectors around 300 topics, topics around 20 fields, and 256 questions between passages of one topic."""
    rng = np.random.default_rng(0)
    fields = rng.normal(size=(20, 64))
    topics = fields[rng.integers(20, size=300)] + 0.7 * rng.normal(size=(300, 64))
    vectors = topics[rng.integers(300, size=12_000)] + 0.7 * rng.normal(size=(12_000, 64))
    queries = vectors[rng.integers(12_000, size=256)] + 0.4 * rng.normal(size=(256, 64))
    vectors, queries = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vectors, queries))
    return vectors.astype(np.float32), queries.astype(np.float32)


def numpy_top_k(vectors, queries, k):
    scores = queries @ vectors.T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return rows, np.take_along_axis(scores, rows, axis=1)


def recall(found, wanted):
    return np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found.tolist(), wanted.tolist())])


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("k", [1, 10, 103])
def test_exact_is_numpy_with_ties_by_row_on_every_mesh(small, shape, k):
    vectors, queries = small
    # 103 rows divide neither by four devices nor into blocks of nine; the shard boundary lies inside a block.
    searcher = ExactSearcher(Vectors([vectors[:50], vectors[50:]]), tiny.mesh(*shape), score_bytes=9 * 4 * QUERIES)
    assert searcher.layout.block <= 9
    rows, scores = searcher.search(queries, k)
    wanted_rows, wanted_scores = numpy_top_k(vectors, queries, k)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(scores, wanted_scores)
    assert (rows.dtype, scores.dtype) == (np.int64, np.float32)


def test_exact_never_finds_its_own_padding():
    vectors = -np.ones((5, 2), np.float32)  # every real score is below the 0 of a padding row
    rows, scores = ExactSearcher(Vectors([vectors]), tiny.mesh(4, 1)).search(np.ones((1, 2), np.float32), 5)
    np.testing.assert_array_equal(rows, [[0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(scores, [[-2] * 5])


def test_exact_with_fewer_rows_than_devices():
    rows, _ = ExactSearcher(Vectors([np.eye(3, dtype=np.float32)]), tiny.mesh(4, 1)).search(np.eye(3, dtype=np.float32), 2)
    np.testing.assert_array_equal(rows, [[0, 1], [1, 0], [2, 0]])


def test_exact_on_more_queries_than_one_group(topical):
    vectors, queries = topical
    many = np.concatenate([queries, queries[:45]])
    rows, _ = ExactSearcher(Vectors([vectors])).search(many, 10)
    assert recall(rows, numpy_top_k(vectors, many, 10)[0]) == 1.0


@pytest.mark.parametrize("block, k", [(128, 1), (4096, 10), (256, 300), (37, 5)])
def test_exact_with_groups_and_ties(block, k):
    """The maxima of groups of rows choose where the best are looked for: scores 0 … 2 are tied across groups, blocks and devices."""
    rng = np.random.default_rng(1)
    vectors, queries = rng.integers(0, 2, (3001, 2)).astype(np.float32), np.array([[1, 1], [1, 0], [-1, 0]], np.float32)
    searcher = ExactSearcher(Vectors([vectors]), tiny.mesh(2, 2), score_bytes=block * 4 * QUERIES)
    assert searcher.layout.block <= block
    rows, scores = searcher.search(queries, k)
    wanted_rows, wanted_scores = numpy_top_k(vectors, queries, k)
    np.testing.assert_array_equal(rows, wanted_rows)
    np.testing.assert_array_equal(scores, wanted_scores)


def test_groups_divide_the_block():
    assert group_size(4096, 10) == 16 and group_size(4096, 4096) == 1 and group_size(37, 1) == 1
    for rows, kept in ((16_384, 10), (16_384, 100), (96, 2), (1, 1)):
        assert rows % group_size(rows, kept) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exact_scores_what_is_stored_in_float32(topical, dtype):
    vectors, queries = topical[0].astype(DTYPES[dtype]), topical[1][:20]
    searcher = ExactSearcher(Vectors([vectors[:5000], vectors[5000:]]), tiny.mesh(2, 2))
    assert searcher._vectors_NxE.dtype == DTYPES[dtype]
    rows, scores = searcher.search(queries, 10)
    stored = vectors.astype(np.float64)
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ stored.T, rows, axis=1), atol=1e-6)
    assert recall(rows, numpy_top_k(vectors.astype(np.float32), queries, 10)[0]) == 1.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_program_is_compiled_from_shapes_and_holds_one_block_of_scores(dtype):
    """Nothing of the size of the vectors, or of all scores, is among the temporaries of a device."""
    mesh, E, k = tiny.mesh(2, 2), 16, 10
    layout = Layout.of(1_000_000, mesh.size, score_bytes=1 << 20)
    shapes = jax.ShapeDtypeStruct((QUERIES, E), np.float32), jax.ShapeDtypeStruct((layout.padded, E), DTYPES[dtype])
    memory = top_k_program(mesh, layout, k).lower(*shapes).compile().memory_analysis()
    scores, block = 4 * QUERIES * layout.block, 4 * layout.block * E
    assert scores <= 1 << 20
    assert memory.temp_size_in_bytes < 3 * scores + 2 * block < 4 * layout.padded // mesh.size * E


def test_approx_keeps_its_recall_target_and_exact_scores(topical):
    vectors, queries = topical
    rows, scores = make_searcher("approx", Vectors([vectors]), mesh=tiny.mesh(2, 2), recall=0.9).search(queries, 10)
    assert recall(rows, numpy_top_k(vectors, queries, 10)[0]) >= 0.9
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, rows, axis=1), atol=1e-5)
    with pytest.raises(InputError, match="recall target 1 "):
        make_searcher("approx", Vectors([vectors]), recall=1.0)


def test_exact_numbers_rows_in_32_bits():
    assert Layout.of(399_000_000, 128).padded < 1.01 * 399_000_000
    with pytest.raises(InputError, match="3,000,000,000 vectors, exact search numbers at most 2,147,483,647 rows"):
        Layout.of(3_000_000_000, 128)


def test_scann_recall_and_exact_scores(topical):
    vectors, queries = topical
    searcher = ScannSearcher(Vectors([vectors]))
    assert searcher.settings.leaves > 0  # not brute force
    rows, scores = searcher.search(queries, 10)
    assert recall(rows, numpy_top_k(vectors, queries, 10)[0]) >= 0.99
    wanted = np.take_along_axis(queries.astype(np.float64) @ vectors.T.astype(np.float64), rows, axis=1)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()


@pytest.mark.skipif(not processor.features() >= scann.HASWELL, reason="no AVX2")
def test_scann_uses_avx2_where_it_is_and_finds_the_same_without(topical, monkeypatch):
    vectors, queries = topical
    searcher = ScannSearcher(Vectors([vectors]), ScannSettings(leaves=100, leaves_searched=20))
    flag = scann._flag()
    assert flag.value, "the wheel has been told"
    rows, scores = searcher.search(queries, 10)
    try:
        flag.value = False
        other_rows, other_scores = searcher.search(queries, 10)
    finally:
        flag.value = True
    # The order of float32 sums differs, and with it now and then which leaf is searched last.
    assert recall(other_rows, rows) > 0.999
    np.testing.assert_allclose(other_scores, scores, atol=0.05)
    monkeypatch.setattr(processor, "features", frozenset)
    flag.value = False
    scann._use_avx2.__wrapped__()
    assert not flag.value, "a CPU without AVX2 is not sent there"
    monkeypatch.undo()
    scann._use_avx2.__wrapped__()
    assert flag.value


def test_scann_recall_does_not_hang_on_unit_vectors(topical):
    """DRAGON+ does not normalise. Few candidates are reordered and no leaf is left out, so that the codes decide.

    Threads make every index a little different (0.005 in recall), so each figure is the mean of six.
    """
    vectors, queries = topical
    chosen = ScannSettings.for_corpus(len(vectors), 64)
    settings = dataclasses.replace(chosen, reorder=15, reorder_per_k=1, leaves_searched=chosen.leaves)
    wanted, _ = numpy_top_k(vectors, queries, 10)

    def mean_recall(length):
        searchers = (ScannSearcher(Vectors([np.float32(length) * vectors]), settings) for _ in range(6))
        return np.mean([recall(searcher.search(queries, 10)[0], wanted) for searcher in searchers])

    assert [mean_recall(0.05), mean_recall(20.0)] == pytest.approx([mean_recall(1.0)] * 2, abs=0.0125)


def test_scann_fills_k_when_the_searched_leaves_do_not(topical):
    vectors, queries = topical
    settings = dataclasses.replace(ScannSettings.for_corpus(len(vectors), 64), leaves_searched=1, reorder=10, reorder_per_k=1)
    rows, _ = ScannSearcher(Vectors([vectors]), settings).search(queries[:8], 2000)
    assert all(len(set(found)) == 2000 for found in rows.tolist())


def test_scann_small_corpus_is_exact(topical):
    vectors, queries = topical
    vectors = vectors[:500]
    searcher = ScannSearcher(Vectors([vectors]))
    assert searcher.settings.leaves == 0
    np.testing.assert_array_equal(searcher.search(queries, 10)[0], numpy_top_k(vectors, queries, 10)[0])


@pytest.mark.parametrize("count", [500, 12_000])
def test_scann_moved_and_loaded_finds_the_same(topical, tmp_path, count):
    vectors, queries = Vectors([topical[0][:count]]), topical[1]
    made = ScannSearcher(vectors)
    made.save(tmp_path / "index.partial")
    (tmp_path / "index.partial").rename(tmp_path / "index")
    loaded = ScannSearcher.load(tmp_path / "index", vectors)
    assert loaded.settings == made.settings
    for mine, its in zip(made.search(queries, 10), loaded.search(queries, 10)):
        np.testing.assert_array_equal(mine, its)
    assert not list((tmp_path / "index").rglob("*.pkl"))


def test_scann_load_refuses_other_vectors_and_pickles(topical, tmp_path):
    vectors = topical[0][:500]
    ScannSearcher(Vectors([vectors])).save(tmp_path)
    with pytest.raises(InputError, match="500 vectors of dimension 64, the vectors given are 500 of dimension 32"):
        ScannSearcher.load(tmp_path, Vectors([vectors[:, :32]]))
    (tmp_path / "scann-00000-of-00001" / "scann_docids.pkl").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        ScannSearcher.load(tmp_path, Vectors([vectors]))
    with pytest.raises(InputError, match="no ScaNN index"):
        ScannSearcher.load(tmp_path / "nowhere", Vectors([vectors]))


@pytest.mark.parametrize("parts", [1, 3, 103])
def test_scann_parts_find_what_exact_search_finds(small, tmp_path, parts):
    """Ties across parts included; 103 parts of one row each give fewer than k candidates."""
    vectors, queries = Vectors([small[0][:50], small[0][50:]]), small[1]
    made = ScannSearcher(vectors, parts=parts)
    assert [len(part.rows) for part in made.parts.values()] == [103 // parts + (i % 3 == 2 and parts == 3) for i in range(parts)]
    wanted_rows, wanted_scores = numpy_top_k(small[0], queries, 10)
    found = made.search(queries, 10)
    np.testing.assert_array_equal(found[1], wanted_scores)
    for rows, scores in zip(found[0], wanted_scores):
        assert all(a < b for a, b, equal in zip(rows, rows[1:], np.diff(scores) == 0) if equal)
    assert build_index(tmp_path, vectors, parts=parts) == {"vectors": 103, "parts": parts}
    for mine, stored in zip(found, ScannSearcher.load(tmp_path, vectors).search(queries, 10)):
        np.testing.assert_array_equal(mine, stored)


def test_scann_goes_on_part_by_part_and_names_what_is_missing(small, tmp_path):
    vectors = Vectors([small[0]])
    build_index(tmp_path, vectors, parts=3)
    shutil.rmtree(tmp_path / "scann-00001-of-00003")
    (tmp_path / "scann-00001-of-00003.partial").mkdir()  # killed in the middle of it
    with pytest.raises(InputError, match="1 of 3 parts of the ScaNN index are missing, first scann-00001-of-00003"):
        ScannSearcher.load(tmp_path, vectors)
    before = (tmp_path / "scann-00000-of-00003" / scann.SETTINGS_FILE).stat().st_mtime_ns
    assert build_index(tmp_path, vectors)["parts"] == 3  # as it was begun
    assert (tmp_path / "scann-00000-of-00003" / scann.SETTINGS_FILE).stat().st_mtime_ns == before
    np.testing.assert_array_equal(ScannSearcher.load(tmp_path, vectors).search(small[1], 3)[1], numpy_top_k(small[0], small[1], 3)[1])
    with pytest.raises(InputError, match="104 parts of an index of 103 vectors"):
        ScannSearcher(vectors, parts=104)


@pytest.mark.parametrize("kind", ["exact", "scann"])
def test_bad_input_is_named(small, kind):
    vectors, queries = small
    searcher = make_searcher(kind, Vectors([vectors]))
    with pytest.raises(InputError, match=r"k = 104 .* 1 to 103"):
        searcher.search(queries, 104)
    with pytest.raises(InputError, match="k = 0"):
        searcher.search(queries, 0)
    with pytest.raises(InputError, match="dimension 6, the index has 8"):
        searcher.search(queries[:, :6], 3)
    with pytest.raises(InputError, match="query vector 2 is not finite"):
        searcher.search(np.where(np.arange(7)[:, None] == 2, np.nan, queries), 3)
    with pytest.raises(InputError, match="no query vectors"):
        searcher.search(queries[:0], 3)


def test_unknown_searcher_is_named(small):
    with pytest.raises(InputError, match="'faiss', expected 'exact', 'approx' or 'scann'"):
        make_searcher("faiss", Vectors([small[0]]))


def test_settings_grow_slower_than_the_corpus():
    sizes = [20_000, 200_000, 2_000_000, 37_000_000]
    shares = [(s := ScannSettings.for_corpus(n, 768)).leaves_searched / s.leaves for n in sizes]
    assert shares == sorted(shares, reverse=True)
    assert ScannSettings.for_corpus(37_000_000, 768).dims_per_block * 256 >= 768
    assert ScannSettings.for_corpus(scann.BRUTE_FORCE_BELOW - 1, 64).leaves == 0


@pytest.mark.skipif("RADIT_NQ_VECTORS" not in os.environ, reason="set RADIT_NQ_VECTORS to what tests/make_nq_vectors.py wrote (minutes)")
def test_scann_recall_on_nq_wiki():
    folder = Path(os.environ["RADIT_NQ_VECTORS"])
    vectors, queries = open_vectors(folder / "vectors"), np.load(folder / "questions.npy")
    assert (len(vectors) > 28_000, len(queries)) == (True, 2107)
    wanted, _ = ExactSearcher(vectors).search(queries, 10)
    found, _ = ScannSearcher(vectors).search(queries, 10)
    assert recall(found[:374], wanted[:374]) >= 0.99  # dev
    assert recall(found, wanted) >= 0.99
