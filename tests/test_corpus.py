"""The corpus: every word kept and in order, random access equal to what was written, and a killed build goes on."""

from __future__ import annotations

import gzip
import json
import logging

import numpy as np
import pytest

from radit_jax import artifacts
from radit_jax.data.corpus import STORE, PassageStore, build_store, documents, split
from radit_jax.data.sentences import sentences
from radit_jax.errors import InputError
from radit_jax.types import Passage


def _jsonl(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return path


def _document(n: int, n_sentences: int = 4) -> Passage:
    rng = np.random.default_rng(n)
    text = " ".join("W" + " ".join(f"word{rng.integers(99)}" for _ in range(rng.integers(1, 15))) + "." for _ in range(n_sentences))
    return Passage(f"doc-{n}", f"Title é {n}", text)


def _documents(n: int) -> list[Passage]:
    return [_document(i, n_sentences=1 + i % 7) for i in range(n)]


# --- documents


@pytest.mark.parametrize("zipped", [False, True])
def test_jsonl_documents_are_read_plain_and_gzipped(tmp_path, zipped):
    path = _jsonl(tmp_path / "c.jsonl", [{"id": "a", "title": "T", "text": "x é"}, "\n", {"id": 7, "title": "", "text": "y"}])
    if zipped:
        path.write_bytes(gzip.compress(path.read_bytes()))
    assert list(documents(path)) == [Passage("a", "T", "x é"), Passage("7", "", "y")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops\n", "not JSON"),
        ('{"id": "b", "title": "T"}\n', 'no field "text"'),
        ('{"title": "T", "text": "x"}\n', 'no field "id"'),
        ('{"id": "b", "title": "T", "text": ["x"]}\n', "expected a text"),
        ('{"id": "b", "title": "T", "text": " "}\n', "empty"),
        ('{"id": "b", "title": "T", "text": "\\ud800"}\n', "surrogate"),
        ('["id"]\n', "not a JSON object"),
    ],
)
def test_a_bad_line_stops_with_its_place_or_is_left_out_and_shown(tmp_path, caplog, line, says):
    good = {"id": "a", "title": "T", "text": "x"}
    path = _jsonl(tmp_path / "c.jsonl", [good, line, {**good, "id": "c"}])
    with pytest.raises(InputError) as caught:
        list(documents(path))
    assert str(caught.value).startswith(f"{path}:2: ") and says in str(caught.value) and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert [document.id for document in documents(path, max_bad_records=1)] == ["a", "c"]
    assert f"{path}:2" in caplog.text


def test_the_run_stops_past_max_bad_records_at_the_one_too_many(tmp_path):
    path = _jsonl(tmp_path / "c.jsonl", ["no\n", {"id": "a", "title": "", "text": "x"}, "no\n", "no\n"])
    with pytest.raises(InputError, match=r"c.jsonl:4: .*max_bad_records is 2"):
        list(documents(path, max_bad_records=2))
    assert len(list(documents(path, max_bad_records=3))) == 1


def test_bytes_that_are_not_utf8_are_one_bad_line(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"id": "a", "title": "", "text": "\xff"}\n{"id": "b", "title": "", "text": "x"}\n')
    with pytest.raises(InputError, match="c.jsonl:1: not UTF-8"):
        list(documents(path))
    assert [document.id for document in documents(path, max_bad_records=1)] == ["b"]


def test_a_cut_gzip_file_a_missing_one_and_an_empty_one_are_input_errors(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"id": "a", "title": "", "text": "x"}\n' * 1000)[:-20])
    with pytest.raises(InputError, match="damaged after line"):
        list(documents(path))
    with pytest.raises(InputError, match="no such corpus"):
        documents(tmp_path / "none")
    with pytest.raises(InputError, match="the corpus is empty"):
        list(documents(_jsonl(tmp_path / "empty.jsonl", ["\n"])))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="the corpus is empty"):
        list(documents(tmp_path / "folder"))


def test_a_folder_of_texts_takes_titles_from_headings_and_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text("\n# The Heading #\n\nBody text.\n")
    (tmp_path / "a.txt").write_text("# not a heading here\nx")
    (tmp_path / "c.MD").write_text("no heading")
    (tmp_path / "skipped.png").write_text("x")
    (tmp_path / "z.txt").write_bytes(b"\xff")
    found = list(documents(tmp_path, max_bad_records=1))
    assert [(d.id, d.title) for d in found] == [("a.txt", "a"), ("c.MD", "c"), ("sub/b.md", "The Heading")]
    assert found[2].text.strip() == "Body text."
    with pytest.raises(InputError, match="z.txt"):
        list(documents(tmp_path))


# --- splitting


@pytest.mark.parametrize("max_words", [1, 2, 7, 20, 1000])
def test_split_keeps_every_word_in_order_and_the_limit(max_words):
    for document in _documents(40):
        pieces = split(document, max_words)
        assert " ".join(piece.text for piece in pieces).split() == document.text.split()
        assert all(1 <= len(piece.text.split()) <= max_words for piece in pieces)
        assert all(piece.title == document.title for piece in pieces)
        expected = [document.id] if len(pieces) == 1 else [f"{document.id}#{n}" for n in range(len(pieces))]
        assert [piece.id for piece in pieces] == expected


def test_split_stops_at_sentence_ends_and_fills_greedily():
    document = Passage("d", "", "One two. Three four five. Six. Seven eight nine ten eleven twelve thirteen. End.")
    assert [piece.text for piece in split(document, 6)] == [
        "One two. Three four five. Six.",
        "Seven eight nine ten eleven twelve",  # a sentence longer than the limit
        "thirteen. End.",
    ]
    with pytest.raises(InputError, match="max_words is 0"):
        split(document, 0)


@pytest.mark.parametrize(
    "parts",
    [
        ["He met Dr. Smith in St. Louis.", "Then he left."],
        ["J. R. R. Tolkien wrote it.", "It sold well."],
        ["She lived in the U.S. Army base.", "Then in the U.S.", "The law was new."],
        ["It cost approx. 300 dollars on Jan. 5 at No. 7.", "He said no.", "Then what?", "“Go!”", "(Never.)", "Done…", "Ok"],
        ["It was e.g. Paris, i.e. France, by 3.5 percent."],
        ['He cried "Stop!" and left.', "Was it the end?", '"Yes."', "(So he said.)"],
        ["It grew by 1990.", "In 1995 it fell.[12]", "Apple Inc. Store opened.", "It was Apple Inc.", "The rest is known."],
    ],
)
def test_sentence_ends(parts):
    assert list(sentences(" ".join(parts))) == parts


def test_blank_lines_headings_and_lists_end_sentences():
    assert list(sentences("A heading\n\nSome text\nwrapped here\n- item one\n- item two\n\n\n# More")) == [
        "A heading",
        "Some text wrapped here",
        "- item one",
        "- item two",
        "# More",
    ]


# --- the store


def _build(folder, docs, **options):
    return build_store(docs, folder, **{"max_words": 12, "shard_size": 16, **options})


def test_the_store_gives_back_what_was_split_by_row_and_by_id(tmp_path):
    docs = _documents(60)
    expected = [piece for document in docs for piece in split(document, 12)]
    facts = _build(tmp_path, docs)
    store = PassageStore(tmp_path)
    assert facts["passages"] == len(store) == len(expected) and facts["documents"] == 60 and len(facts["shards"]) > 3
    assert list(store) == expected
    rows = np.random.default_rng(0).permutation(len(store))
    assert store.read(rows) == [expected[row] for row in rows]
    assert [store.row_of(passage.id) for passage in expected] == list(range(len(expected)))
    assert not list(tmp_path.glob("part-*")), "the parts of the index are merged"


def test_shards_are_read_with_few_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("radit_jax.data.corpus.MOST_OPEN", 2)
    docs = _documents(60)
    _build(tmp_path, docs)
    store, expected = PassageStore(tmp_path), [piece for document in docs for piece in split(document, 12)]
    for row in np.random.default_rng(0).permutation(len(store)):
        assert store[row] == expected[row] and len(store._readers) <= 2


def test_the_pieces_of_a_document_are_found_together(tmp_path):
    docs = _documents(30)
    _build(tmp_path, docs)
    store = PassageStore(tmp_path)
    for document in docs:
        ids = [piece.id for piece in split(document, 12)]
        rows = store.rows_of_document(document.id)
        assert [store[row].id for row in rows] == ids
        assert all(np.array_equal(store.siblings(row), rows) for row in rows)


def test_unknown_ids_and_rows_are_refused(tmp_path):
    _build(tmp_path, _documents(5))
    store = PassageStore(tmp_path)
    split_document = next(d for d in _documents(5) if len(split(d, 12)) > 1)
    for wrong in ("nobody", split_document.id):  # a document in pieces is not a passage
        with pytest.raises(InputError, match="no passage has the id"):
            store.row_of(wrong)
    with pytest.raises(InputError, match="no document has the id"):
        store.rows_of_document(f"{split_document.id}#1")
    for row in (-1, len(store)):
        with pytest.raises(IndexError):
            store[row]


def test_a_killed_build_keeps_its_whole_shards_and_ends_the_same(tmp_path):
    docs = _documents(60)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    facts = _build(whole, docs)

    def dying():
        yield from docs[:40]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _build(killed, dying())
    kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("part-starts-*")}
    first = killed / "passages-00000.array_record"
    written = first.stat().st_mtime_ns
    assert kept and not (killed / STORE).exists()
    torn = killed / f"passages-{len(kept):05d}.array_record"
    torn.write_bytes(b"torn")  # what the kill left of the next shard
    assert _build(killed, docs) == facts
    assert first.stat().st_mtime_ns == written, "a whole shard is not written again"
    assert list(PassageStore(killed)) == list(PassageStore(whole))
    for name in ("hashes.npy", "rows.npy", "starts.npy"):
        assert np.array_equal(np.load(killed / name), np.load(whole / name))


def test_killed_between_the_last_shard_and_the_index(tmp_path, monkeypatch):
    docs = _documents(20)
    with monkeypatch.context() as patch:
        patch.setattr("radit_jax.data.corpus._merge_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _build(tmp_path, docs)
    _build(tmp_path, docs)
    assert [p.id for p in PassageStore(tmp_path)] == [p.id for d in docs for p in split(d, 12)]
    assert _build(tmp_path, iter(())) == json.loads((tmp_path / STORE).read_text()), "a whole store is left as it is"


def test_the_store_is_an_artifact(tmp_path):
    docs = _documents(10)
    artifact = artifacts.make(tmp_path, "passages", {"docs": 10}, lambda folder: _build(folder, docs))
    assert len(PassageStore(artifact.path)) == artifact.facts["passages"]


def test_an_id_used_twice_names_both_lines(tmp_path):
    record = {"id": "x", "title": "", "text": "a b c."}
    path = _jsonl(tmp_path / "c.jsonl", [record, "\n", {**record, "id": "y"}, record])
    with pytest.raises(InputError, match=r"id 'x' is used twice: .*c.jsonl:1 and .*c.jsonl:4"):
        _build(tmp_path, documents(path))


def test_an_id_that_another_documents_piece_would_get_is_used_twice(tmp_path):
    docs = [Passage("x", "", "a b. " * 10), Passage("x#1", "", "c.")]
    with pytest.raises(InputError, match="id 'x#1' is used twice: document 0 and document 1"):
        _build(tmp_path, docs)


def test_two_ids_with_one_hash_are_both_found(tmp_path, monkeypatch):
    monkeypatch.setattr("radit_jax.data.corpus._hash", lambda name: len(name))
    docs = _documents(9)
    _build(tmp_path, docs)
    store = PassageStore(tmp_path)
    assert [store.row_of(passage.id) for passage in store] == list(range(len(store)))


def test_an_empty_stream_of_documents_is_refused(tmp_path):
    with pytest.raises(InputError, match="the corpus is empty"):
        _build(tmp_path, iter(()))


def test_a_store_that_is_not_whole_or_has_a_damaged_shard_is_refused(tmp_path):
    with pytest.raises(InputError, match="not a whole passage store"):
        PassageStore(tmp_path)
    _build(tmp_path, _documents(5))
    path = tmp_path / "passages-00000.array_record"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="missing or damaged"):
        PassageStore(tmp_path)[0]


def test_documents_are_streamed_not_gathered(tmp_path):
    """When document n is asked for, all but the last shard's worth of the earlier ones are on disk."""
    shards_when_asked: list[int] = []

    def stream():
        for document in _documents(50):
            shards_when_asked.append(len(list(tmp_path.glob("part-starts-*"))))
            yield document

    _build(tmp_path, stream())
    assert all(shards + 1 >= n // 16 for n, shards in enumerate(shards_when_asked)) and shards_when_asked[-1] >= 2


def test_nq_wiki_splits_as_its_readme_says(data_dir, tmp_path):
    facts = build_store(documents(data_dir / "nq_wiki" / "corpus.jsonl.gz"), tmp_path, max_words=32)
    assert facts["documents"] == 8947
    assert 28_000 < facts["passages"] < 30_000
    store = PassageStore(tmp_path)
    assert max(len(passage.text.split()) for passage in store) == 32
