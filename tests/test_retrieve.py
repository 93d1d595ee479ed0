"""Passages belong to examples by id, excluded ones are never among them, and what was stored is what was found."""

from __future__ import annotations

import numpy as np
import pytest

from radit_jax.data.corpus import PassageStore, build_store
from radit_jax.errors import InputError
from radit_jax.retrieval.retrieve import NO_ROW, Retrieval, retrieve, write_retrieval
from radit_jax.retrieval.search import ExactSearcher
from radit_jax.retrieval.vectors import Vectors
from radit_jax.types import Example, Passage

VECTORS = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
QUESTIONS = {f"q{i}": vector for i, vector in enumerate(np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32))}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"), [f"é{i}" for i in range(12)])


@pytest.fixture(scope="module")
def searcher():
    return ExactSearcher(Vectors([VECTORS]))


def make_store(folder, ids):
    folder.mkdir(exist_ok=True)
    build_store([Passage(id, "Title", f"text {id}") for id in ids], folder, max_words=10)
    return PassageStore(folder)


def example(id, **fields):
    return Example(id, query=f"query of {id}", prompt="", target="", **fields)


def embed(texts):
    return np.stack([QUESTIONS[text.removeprefix("query of ")] for text in texts])


def best(id):
    return np.argsort(-VECTORS @ QUESTIONS[id])


def test_every_example_gets_its_own_best_passages(searcher, store):
    retrieval = retrieve([example("q0"), example("q1")], embed, searcher, store, k=3)
    assert len(retrieval) == 2
    for retrieved in retrieval:
        np.testing.assert_array_equal(retrieved.rows_K, best(retrieved.example.id)[:3])
        np.testing.assert_allclose(retrieved.scores_K, np.sort(VECTORS @ QUESTIONS[retrieved.example.id])[::-1][:3], rtol=1e-5)
        assert [passage.text for passage in retrieved.passages] == [f"text é{row}" for row in retrieved.rows_K]


def test_excluded_passages_make_room_for_the_next(searcher, store):
    order = best("q0")
    out = tuple(f"é{row}" for row in order[[0, 2]])
    retrieval = retrieve([example("q0", exclude=out), example("q1")], embed, searcher, store, k=3)
    np.testing.assert_array_equal(retrieval[0].rows_K, order[[1, 3, 4]])
    np.testing.assert_array_equal(retrieval[1].rows_K, best("q1")[:3])


def test_an_example_without_retrieval_has_no_passages_and_is_not_embedded(searcher, store):
    examples = [example("q0"), example("own text", retrieve=False), example("q2")]
    retrieval = retrieve(examples, embed, searcher, store, k=2)  # embed would raise KeyError
    assert retrieval[1].passages == () and retrieval[1].rows_K.shape == retrieval[1].scores_K.shape == (0,)
    np.testing.assert_array_equal(retrieval[2].rows_K, best("q2")[:2])
    assert len(retrieve([examples[1]], embed, searcher, store, k=2)[0].passages) == 0


def test_stored_is_what_was_found_in_any_order_of_examples(searcher, store, tmp_path):
    examples = [example("q0"), example("own text", retrieve=False), example("q2"), example("q3")]
    made = retrieve(examples, embed, searcher, store, k=2)
    assert write_retrieval(tmp_path, made) == {"examples": 4, "k": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["example_ids.npy", "passage_ids.npy", "rows.npy", "scores.npy"]
    opened = Retrieval(tmp_path, [examples[i] for i in (3, 1, 0)], store)
    for mine, i in zip(opened, (3, 1, 0)):
        assert (mine.example, mine.passages) == (made[i].example, made[i].passages)
        np.testing.assert_array_equal(mine.rows_K, made[i].rows_K)
        np.testing.assert_array_equal(mine.scores_K, made[i].scores_K)
    np.testing.assert_array_equal(opened.rows_NxK, [made[3].rows_K, [NO_ROW, NO_ROW], made[0].rows_K])


def test_unknown_examples_are_refused(searcher, store, tmp_path):
    write_retrieval(tmp_path, retrieve([example("q0")], embed, searcher, store, k=2))
    with pytest.raises(InputError, match="1 of 2 examples, first 'q9'"):
        Retrieval(tmp_path, [example("q0"), example("q9")], store)


def test_another_split_of_the_corpus_is_refused(searcher, store, tmp_path):
    (tmp_path / "found").mkdir()
    write_retrieval(tmp_path / "found", retrieve([example("q0")], embed, searcher, store, k=2))
    row = best("q0")[0]
    ids = [f"é{i}" if i != row else "new" for i in range(12)]
    other = Retrieval(tmp_path / "found", [example("q0")], make_store(tmp_path / "other", ids))
    with pytest.raises(InputError, match=f"row {row} was passage 'é{row}', the corpus has 'new'"):
        other[0]
    with pytest.raises(InputError, match="the corpus has 1 passages"):
        Retrieval(tmp_path / "found", [example("q0")], make_store(tmp_path / "short", ["é0"]))


def test_damaged_folders_are_refused(searcher, store, tmp_path):
    write_retrieval(tmp_path, retrieve([example("q0"), example("q1")], embed, searcher, store, k=2))
    np.save(tmp_path / "scores.npy", np.zeros((2, 1), np.float32))
    with pytest.raises(InputError, match="different lengths"):
        Retrieval(tmp_path, [example("q0")], store)
    (tmp_path / "scores.npy").unlink()
    with pytest.raises(InputError, match="not a whole retrieval"):
        Retrieval(tmp_path, [example("q0")], store)


def test_bad_input_is_named(searcher, store):
    with pytest.raises(InputError, match="two examples have the id 'q0'"):
        retrieve([example("q0"), example("q0")], embed, searcher, store, k=2)
    with pytest.raises(InputError, match="k = 13 .* 1 to 12"):
        retrieve([example("q0")], embed, searcher, store, k=13)
    with pytest.raises(InputError, match="k = 12 passages and 1 excluded ones make 13, the corpus has 12"):
        retrieve([example("q0", exclude=("é3",))], embed, searcher, store, k=12)
    with pytest.raises(InputError, match="no passage has the id 'gone'"):
        retrieve([example("q0", exclude=("gone",))], embed, searcher, store, k=2)
    with pytest.raises(InputError, match="dimension 3, the index has 4"):
        retrieve([example("q0")], lambda texts: embed(texts)[:, :3], searcher, store, k=2)
    with pytest.raises(InputError, match="the index has 11 vectors, the corpus 12 passages"):
        retrieve([example("q0")], embed, ExactSearcher(Vectors([VECTORS[:11]])), store, k=2)
