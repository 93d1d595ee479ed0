"""Measures equal trec_eval's, standard corpora and judgements read, run files read back, and what moved is said."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from radit_jax import retrieval_table
from radit_jax.data.corpus import documents
from radit_jax.errors import InputError
from radit_jax.evaluation import report, retrieval
from radit_jax.evaluation.retrieval import Judged, beir_questions
from radit_jax.types import Example, Passage, Retrieved

REFERENCES = Path(__file__).parent / "references"


def test_measures_of_random_runs_are_those_of_ir_measures(monkeypatch):
    monkeypatch.syspath_prepend(str(REFERENCES))
    import random_runs

    expected = json.loads((REFERENCES / "retrieval_references.json").read_text())["measures"]
    relevant, ranked = random_runs.runs()
    assert set(expected) == set(relevant)
    for question, row in expected.items():
        judged, names = relevant[question], ranked[question]
        found = {
            "recall@5": retrieval.recall(names, judged, 5),
            "recall@10": retrieval.recall(names, judged, 10),
            "mrr": retrieval.reciprocal_rank(names, judged),
            "ndcg@10": retrieval.ndcg(names, judged, 10),
        }
        for key, value in row.items():
            assert abs(found[key] - value) < 1e-9, (question, key)
    assert len({row["ndcg@10"] for row in expected.values()}) > 10


def found(*texts: str) -> Retrieved:
    passages = tuple(Passage(f"p{n}", "", text) for n, text in enumerate(texts))
    return Retrieved(Example("q", "q", "q", " a"), passages, np.arange(len(texts)), np.linspace(1, 0, len(texts)))


def test_answers_and_documents_are_measured_apart_and_a_document_counts_once():
    judged = Judged("q", "who?", ("Ann",), {"d2": 1, "d9": 2, "d0": 0})
    row = retrieval.measure(judged, found("moss", "tern", "Ann", "oak", "x"), 5, ["d1", "d1", "d1", "d2", "d0"])
    assert (row["answer recall@1"], row["answer recall@5"], row["answer mrr"]) == (0.0, 1.0, 1 / 3)
    assert (row["gold recall@1"], row["gold recall@5"], row["gold mrr"]) == (0.0, 0.5, 0.5)
    assert row["gold ndcg@10"] == pytest.approx((1 / np.log2(3)) / (2 + 1 / np.log2(3)))
    assert "gold mrr" not in retrieval.measure(Judged("q", "who?", ("Ann",)), found("Ann"), 1, ["d"])


def test_run_files_are_trecs():
    lines = list(retrieval.run_lines([Judged("a b", "?")], [[("d1", 2.5), ("d1", 2.0), ("d 2", 1.0)]], "radit"))
    assert lines == ["a_b Q0 d1 1 2.5 radit\n", "a_b Q0 d_2 2 1 radit\n"]


def test_what_moved_is_sorted_from_most_improved_to_most_harmed():
    judged = [Judged(name, name, ("x",)) for name in "abc"]
    before = [{"answer mrr": 0.5}, {"answer mrr": 0.5}, {"answer mrr": 0.5}]
    after = [{"answer mrr": 0.25}, {"answer mrr": 0.5}, {"answer mrr": 1.0}]
    assert [(row["id"], row["moved"]) for row in retrieval_table._moved(judged, before, after)] == [("c", 0.5), ("a", -0.25)]


def test_the_table_has_both_systems_and_their_difference():
    interval = {"mean": 0.5, "ci95": [0.25, 0.75]}
    systems = {"untuned": {"gold mrr": interval}, "R-ft": {"gold mrr": interval}}
    shown = report.retrieval("nq", {"n": 3, "systems": systems, "difference": {"gold mrr": interval}})
    assert "50.0 [25.0, 75.0]" in shown and "+50.0 [+25.0, +75.0]" in shown


# -- formats ----------------------------------------------------------------------------------------------------------------------------


def test_the_wikipedia_of_dpr_is_read_with_its_quotes(tmp_path):
    table = 'id\ttext\ttitle\n1\t"Aaron, a ""prophet"", spoke."\t"Aaron"\n2\tPlain text\tMoss\n'
    expected = [Passage("1", "Aaron", 'Aaron, a "prophet", spoke.'), Passage("2", "Moss", "Plain text")]
    (tmp_path / "psgs_w100.tsv").write_text(table)
    (tmp_path / "psgs_w100.tsv.gz").write_bytes(gzip.compress(table.encode()))
    for name in ("psgs_w100.tsv", "psgs_w100.tsv.gz"):
        assert list(documents(tmp_path / name)) == expected


def test_the_wikipedia_of_atlas_has_its_section_in_the_title(tmp_path):
    records = [
        {"id": "0", "title": "Moss", "section": "Growth", "text": "It grows."},
        {"id": "1", "title": "Moss", "section": "", "text": "Green."},
    ]
    (tmp_path / "text-list-100-sec.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert [passage.title for passage in documents(tmp_path / "text-list-100-sec.jsonl")] == ["Moss: Growth", "Moss"]


@pytest.fixture
def beir(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "title": "", "text": "One.", "metadata": {}}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": " who? "}\n{"_id": "q2", "text": "not judged"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td7\t0\n")
    return tmp_path


def test_a_beir_folder_is_a_corpus_and_a_set_of_questions(beir):
    assert list(documents(beir)) == [Passage("d1", "", "One.")]
    assert beir_questions(f"beir:{beir}") == [Judged("q1", "who?", relevant={"d1": 2, "d7": 0})]
    assert beir_questions(f"beir:{beir}#test") == beir_questions(f"beir:{beir}")


def test_wrong_judgements_are_one_line_with_their_place(beir):
    with pytest.raises(InputError, match="dev.tsv: no such file; the folder has judgements of test"):
        beir_questions(f"beir:{beir}#dev")
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\tmany\n")
    with pytest.raises(InputError, match="dev.tsv:2: "):
        beir_questions(f"beir:{beir}#dev")
    (beir / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\nq9\td1\t1\n")
    with pytest.raises(InputError, match="no question that"):
        beir_questions(f"beir:{beir}#dev")
