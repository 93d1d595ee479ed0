"""Open-domain question answering: questions whose answer is to be found (SPEC section 7)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

from radit_jax.data.card import Card, Record, checked, chosen, distinct, labelled
from radit_jax.data.questions import Question
from radit_jax.data.records import field, id_field, text_field

NO_ANSWER = "No Answer Present."  # MS MARCO's
_OPTION = re.compile(r"(?:^|,)\s*['\"]?\s*([a-e])\s*\)")  # of MathQA: "a ) 38 , b ) 27.5 , …"
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()]*))\)')  # of WebQuestions' target values


def commonsense_qa(record: Record) -> Iterator[Question]:
    """{"id", "answerKey", "question": {"stem", "choices"}}, or flat on the Hub: {"question", "choices"}."""
    asked = record if isinstance(record.get("question"), str) else {**field(record, "question")}
    choices = labelled(field(asked, "choices"))
    answer = chosen(choices, field(record, "answerKey"))
    stem = text_field(asked, "question" if asked is record else "stem")
    yield Question(id_field(record, "id"), stem.strip(), (answer,), choices=tuple(choices.values()))


def math_qa(record: Record) -> Iterator[Question]:
    """{"Problem", "options": "a ) 38 , b ) 27.5 , …", "correct": "a", "Rationale", …}."""
    pieces = _OPTION.split(text_field(record, "options").strip("[] "))[1:]
    choices = checked({label: text.strip(" '\"") for label, text in zip(pieces[::2], pieces[1::2])})
    answer = chosen(choices, field(record, "correct"))
    yield Question("", text_field(record, "Problem").strip(), (answer,), choices=tuple(choices.values()))


def web_questions(record: Record) -> Iterator[Question]:
    """{"question", "answers"}; {"qId", "qText", "answers"}; or {"utterance", "targetValue": "(list (description …) …)"}."""
    if "targetValue" in record:
        found = _DESCRIPTION.findall(text_field(record, "targetValue"))
        yield Question("", text_field(record, "utterance").strip(), distinct(quoted or bare for quoted, bare in found))
        return
    id = id_field(record, "qId") if "qId" in record else ""
    asked = text_field(record, "qText" if "qText" in record else "question")
    yield Question(id, asked.strip(), distinct(field(record, "answers")))


def wiki_qa(record: Record) -> Iterator[Question]:
    """{"Question", "Sentence", "Label"} (tsv) or {"question", "answer", "label"}: a sentence that is no answer gives no question."""
    question, sentence, label = ("Question", "Sentence", "Label") if "Question" in record else ("question", "answer", "label")
    if int(field(record, label)) == 1:
        yield Question("", text_field(record, question).strip(), distinct([text_field(record, sentence)]))


def yahoo_answers_qa(record: Record) -> Iterator[Question]:
    """{"id", "question", "answer" (the best), "nbestanswers", "main_category"}."""
    answers = [text_field(record, "answer"), *(record.get("nbestanswers") or ())]
    yield Question(id_field(record, "id"), text_field(record, "question").strip(), distinct(answers))


def freebase_qa(record: Record) -> Iterator[Question]:
    """{"Question-ID", "RawQuestion", "Parses": [{"Answers": [{"AnswersMid", "AnswersName": […]}]}]}."""
    names = list(_named(field(record, "Parses"), "AnswersName"))
    yield Question(id_field(record, "Question-ID"), text_field(record, "RawQuestion").strip(), distinct(names))


def ms_marco(record: Record) -> Iterator[Question]:
    """{"query_id", "query", "answers", …}; what nobody answered gives no question."""
    answers = [answer for answer in field(record, "answers") if answer.strip() and answer != NO_ANSWER]
    if answers:
        yield Question(id_field(record, "query_id"), text_field(record, "query").strip(), distinct(answers))


def _named(value: Any, name: str) -> Iterator[str]:
    """All texts under fields of this name, at any depth: authors' files and the Hub nest them differently."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(inner) if key == name else _named(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _named(inner, name)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for inner in value:
            yield from _texts(inner)


# The paper's sets, all of them in R-ft too.
_OPEN = functools.partial(Card, category="open_qa", in_r_ft=True)
CARDS = (
    _OPEN(
        "commonsense_qa",
        "hub:tau/commonsense_qa",
        commonsense_qa,
        in_lm_ft=True,
        size=9_741,
        home="www.tau-nlp.org/commonsenseqa (train_rand_split.jsonl)",
        evaluation_split="validation",
    ),
    _OPEN(
        "math_qa",
        "tfds:math_qa",
        math_qa,
        in_lm_ft=True,
        size=29_837,
        home="math-qa.github.io (MathQA.zip, train.json)",
        evaluation_split="validation",
    ),
    _OPEN(
        "web_questions",
        "tfds:web_questions",
        web_questions,
        in_lm_ft=True,
        size=3_778,
        home="nlp.stanford.edu/software/sempre (webquestions.examples.train.json)",
        evaluation_split="test",
    ),
    _OPEN(
        "wiki_qa",
        "hub:microsoft/wiki_qa",
        wiki_qa,
        in_lm_ft=True,
        size=20_360,  # rows; those that answer are a twentieth of them
        home="www.microsoft.com/en-us/download/details.aspx?id=52419 (WikiQA-train.tsv)",
        evaluation_split="validation",
    ),
    _OPEN(
        "yahoo_answers_qa",
        "hub:yahoo_answers_qa",
        yahoo_answers_qa,
        in_lm_ft=True,
        size=87_362,
        home="ciir.cs.umass.edu/downloads/nfL6 (nfL6.json)",
    ),
    _OPEN(
        "freebase_qa",
        "hub:freebase_qa",
        freebase_qa,
        size=20_358,
        home="github.com/kelvin-jiang/FreebaseQA (FreebaseQA-train.json)",
        evaluation_split="validation",
    ),
    _OPEN(
        "ms_marco",
        "hub:microsoft/ms_marco#v1.1",
        ms_marco,
        size=80_143,
        home="microsoft.github.io/msmarco (train_v1.1.json.gz)",
        evaluation_split="validation",
    ),
)
