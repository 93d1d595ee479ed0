"""Commonsense tasks of the paper, for evaluation alone: the answer is one of some choices, and nothing is retrieved (SPEC section 8)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping

from radit_jax.data.card import Card, Record, checked, chosen, labelled
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, field, text_field

_ASIDE = re.compile(r"\[.*?\]")  # of HellaSwag's WikiHow half: [header], [substeps]


def boolq(record: Record) -> Iterator[Question]:
    """{"question", "passage", "answer": true or false}."""
    answer = field(record, "answer")
    if not isinstance(answer, (bool, int)):
        raise BadRecord(f'field "answer" is {answer!r}, expected true or false')
    question, passage = text_field(record, "question").strip(), text_field(record, "passage").strip()
    yield Question("", question, ("yes" if answer else "no",), context=passage, choices=("no", "yes"))


def piqa(record: Record) -> Iterator[Question]:
    """{"goal", "sol1", "sol2", "label": 0 or 1}."""
    yield _numbered(text_field(record, "goal"), [text_field(record, name) for name in ("sol1", "sol2")], field(record, "label"))


def siqa(record: Record) -> Iterator[Question]:
    """{"context", "question", "answerA", "answerB", "answerC", "label": "1" to "3"}."""
    choices = [text_field(record, f"answer{letter}") for letter in "ABC"]
    question = _numbered(text_field(record, "question"), choices, int(field(record, "label")) - 1)
    yield Question("", question.question, question.answers, context=text_field(record, "context").strip(), choices=question.choices)


def hellaswag(record: Record) -> Iterator[Question]:
    """{"activity_label", "ctx_a", "ctx_b", "endings": four, "label": 0 to 3}; tfds joins ctx_a and ctx_b to "context"."""
    pieces = [text_field(record, "context")] if "context" in record else [text_field(record, "ctx_a"), record.get("ctx_b", "").capitalize()]
    begun = _readable(f"{text_field(record, 'activity_label')}: {' '.join(pieces)}")
    yield _numbered(begun, [_readable(ending) for ending in field(record, "endings")], field(record, "label"))


def winogrande(record: Record) -> Iterator[Question]:
    """{"sentence" with one "_", "option1", "option2", "answer": "1" or "2"}; tfds has "label": 0 or 1."""
    sentence = text_field(record, "sentence").strip()
    if sentence.count("_") != 1:
        raise BadRecord(f'field "sentence" has {sentence.count("_")} gaps "_", expected one')
    at = int(field(record, "answer")) - 1 if "answer" in record else field(record, "label")
    yield _numbered(sentence, [text_field(record, name) for name in ("option1", "option2")], at)


def arc(record: Record) -> Iterator[Question]:
    """{"question": {"stem", "choices"}, "answerKey"}, or flat: {"question", "choices", "answerKey"}."""
    asked = record if isinstance(record.get("question"), str) else field(record, "question")
    choices = labelled(field(asked, "choices"))
    stem = text_field(asked, "question" if asked is record else "stem").strip()
    yield Question("", stem, (chosen(choices, field(record, "answerKey")),), choices=tuple(choices.values()))


def obqa(record: Record) -> Iterator[Question]:
    """As `arc`; flat on the Hub: {"question_stem", "choices", "answerKey"}; in tfds {"question": {"stem", "choice_A", …}}."""
    if "question_stem" in record:
        record = {**record, "question": record["question_stem"]}
    asked = record.get("question")
    if isinstance(asked, Mapping) and "choice_A" in asked:
        choices = {str(n): asked[f"choice_{letter}"] for n, letter in enumerate("ABCD")}
        record = {**record, "question": asked["stem"], "choices": {"label": list(choices), "text": list(choices.values())}}
    yield from arc(record)


def _numbered(question: str, choices: list[str], at: int | str) -> Question:
    texts = tuple(checked({str(n): text.strip() for n, text in enumerate(choices)}).values())
    at = int(at)
    if not 0 <= at < len(texts):
        raise BadRecord(f"the answer is number {at} of {len(texts)} choices (a test split without answers?)")
    return Question("", question.strip(), (texts[at],), choices=texts)


def _readable(text: str) -> str:
    return _ASIDE.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


_CHOICES = functools.partial(Card, category="open_qa", trainable=False, evaluation_split="validation")
CARDS = (
    _CHOICES("boolq", "tfds:bool_q", boolq, home="github.com/google-research-datasets/boolean-questions (dev.jsonl)"),
    _CHOICES("piqa", "tfds:piqa", piqa, home="yonatanbisk.com/piqa"),
    _CHOICES("siqa", "hub:allenai/social_i_qa", siqa, home="allenai.org/data/socialiqa"),
    _CHOICES("hellaswag", "tfds:hellaswag", hellaswag, home="github.com/rowanz/hellaswag (data/hellaswag_val.jsonl)"),
    _CHOICES("winogrande", "tfds:winogrande", winogrande, home="winogrande.allenai.org (dev.jsonl)"),
    _CHOICES("arc_easy", "tfds:ai2_arc/ARC-Easy", arc, home="allenai.org/data/arc (ARC-Easy-Dev.jsonl)"),
    _CHOICES("arc_challenge", "tfds:ai2_arc/ARC-Challenge", arc, home="allenai.org/data/arc (ARC-Challenge-Dev.jsonl)"),
    _CHOICES("obqa", "tfds:openbookqa", obqa, home="allenai.org/data/open-book-qa (dev.jsonl)"),
)
