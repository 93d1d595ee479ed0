"""Metrics by hand, intervals by their properties."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from radit_jax.evaluation import evaluate, metrics, report
from radit_jax.inference.ensemble import Answer
from radit_jax.types import Example, Passage, Retrieved


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The  Eiffel-Tower!", "eiffeltower"), (" an apple a day", "apple day"), ("Theatre", "theatre"), ("U.S.\tA", "us"), ("«É»", "«é»")],
)
def test_normalisation(text, expected):
    assert metrics.normalize(text) == expected


def test_exact_match_is_any_answer_after_normalisation():
    assert metrics.exact_match("the Paris.", ["Lyon", "Paris"]) == 1.0
    assert metrics.exact_match("Paris, France", ["Paris"]) == 0.0
    assert metrics.exact_match("Paris", []) == 0.0


def test_f1_by_hand():
    # two of three predicted words are among the four expected: P = 2/3, R = 2/4
    assert metrics.f1("red old car", ["old red big house"]) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert metrics.f1("red red", ["red"]) == pytest.approx(2 * (1 / 2) * 1 / (1 / 2 + 1))  # a repeated word counts once
    assert metrics.f1("red car", ["blue", "red car"]) == 1.0
    assert metrics.f1("", ["red"]) == metrics.f1("red", [""]) == metrics.f1("red", []) == 0.0


def test_an_answer_is_contained_as_whole_words():
    assert metrics.contains_answer("It lies near The Old Mill, in Ayr.", ["old mill"])
    assert not metrics.contains_answer("Oldham lies near a mill.", ["old"])
    assert not metrics.contains_answer("the windmill", ["mill"])
    assert not metrics.contains_answer("anything", ["the", ""])  # nothing is left of these answers
    assert metrics.contains_answer("in 1912.", ["1912"]) and not metrics.contains_answer("in 19123", ["1912"])


def test_rank_recall_and_reciprocal_rank():
    texts = ["none", "none", "here is Ayr", "Ayr again"]
    assert metrics.first_hit(texts, ["Ayr"]) == 2
    assert metrics.first_hit(texts, ["Perth"]) is None
    assert metrics.retrieval_metrics(2, ks=(1, 3)) == {"recall@1": 0.0, "recall@3": 1.0, "mrr": 1 / 3}
    assert metrics.retrieval_metrics(0) == {"recall@1": 1.0, "recall@5": 1.0, "recall@10": 1.0, "mrr": 1.0}
    assert set(metrics.retrieval_metrics(None).values()) == {0.0}


def test_where_the_answer_is_yes_or_no_a_passage_of_the_document_that_answers_is_right():
    passages = [Passage("11", "", "No, they say."), Passage("1#1", "", "Half of them recovered."), Passage("1", "", "yes")]
    example = Example("1", "?", "?", " yes", ("yes",), gold_id="1")
    assert metrics.first_right(passages, example) == 1
    assert metrics.first_right(passages[:1], example) is None
    assert metrics.first_right(passages, dataclasses.replace(example, gold_id=None)) == 2  # nothing else is known
    assert metrics.first_right(passages, dataclasses.replace(example, answers=("half",))) == 1
    assert metrics.first_right(passages, dataclasses.replace(example, answers=("no", "half"))) == 0


def test_bootstrap_intervals_are_deterministic_and_cover():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(100):
        low, high = metrics.bootstrap(rng.random(60) < 0.3)
        covered += low <= 0.3 <= high
    assert 86 <= covered <= 100  # 95 % of them, within four standard deviations
    values = rng.random(50)
    assert metrics.bootstrap(values) == metrics.bootstrap(values) != metrics.bootstrap(values, seed=1)
    # close to the normal interval: mean ± 1.96 standard errors
    half = 1.96 * values.std() / np.sqrt(len(values))
    np.testing.assert_allclose(metrics.bootstrap(values), [values.mean() - half, values.mean() + half], atol=0.15 * half)
    assert metrics.bootstrap([1.0, 1.0]) == [1.0, 1.0]


def test_paired_differences_are_of_the_same_questions():
    before = np.random.default_rng(2).random(40)
    found = metrics.paired_difference(before + 0.25, before)
    np.testing.assert_allclose([found["mean"], *found["ci95"]], 0.25)  # the questions' own spread cancels
    mixed = metrics.paired_difference([1, 0, 1, 1], [0, 1, 1, 0])
    assert mixed["mean"] == 0.25 and mixed["ci95"][0] < 0 < mixed["ci95"][1]


def test_a_row_holds_the_means_of_its_questions(tmp_path):
    examples = [Example("a", "where?", "", "", ("Ayr",)), Example("b", "who?", "", "", ("Ann",))]
    passages = (Passage("p", "", "nothing"), Passage("q", "", "in Ayr"))
    found = [Retrieved(example, passages, np.arange(2), np.zeros(2, np.float32)) for example in examples]
    answers = [Answer("Ayr", -0.5, (), ()), Answer("Bo", -1.0, (), ())]
    row = evaluate.write_row(tmp_path, "both", examples, answers, found)
    assert row["n"] == 2 and row["metrics"]["em"]["mean"] == 0.5
    assert row["metrics"]["recall@1"]["mean"] == 0.0 and row["metrics"]["recall@5"]["mean"] == 0.5 and row["metrics"]["mrr"]["mean"] == 0.25
    assert json.loads((tmp_path / "row.json").read_text()) == row
    assert json.loads((tmp_path / "per_question.json").read_text())["em"] == [1.0, 0.0]
    assert [record["answer"] for record in json.loads((tmp_path / "answers.json").read_text())] == ["Ayr", "Bo"]
    closed = evaluate.judge(examples, answers, None)
    assert set(closed) == {"em", "f1"}
    shown = report.table([row, {"name": "none", "n": 2, "metrics": metrics.summarize(closed)}], title="t")
    assert "50.0 [0.0, 100.0]" in shown and "–" in shown
