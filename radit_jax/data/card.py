"""One card per set of questions: where it is, how its records read, what it is asked with, and whether it may be trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from radit_jax.data.prompts import evaluation_example, training_example
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord
from radit_jax.types import Example

Record = Mapping[str, Any]  # plain values: texts, numbers, lists, mappings
UNANSWERABLE = "I don't know"  # the target where the text does not answer the question (SPEC section 3)


@dataclasses.dataclass(frozen=True)
class Card:
    """What is to know about one set."""

    name: str
    source: str  # where data/sources.py reads it, unless NAME:PATH says where the authors' files lie
    parse: Callable[[Record], Iterable[Question]]  # of one record: none, one or many; an id is left empty where the set has none
    category: str  # of prompts.TRAINING_PROMPTS
    retrieval: str = "passages"  # of prompts.RETRIEVAL_RULES
    in_lm_ft: bool = False  # one of the sets of the LM-ft mixture (D_L)
    in_r_ft: bool = False  # one of the question answering sets of R-ft (D_R)
    size: int | None = None  # training examples by the paper; None: not one of its sets
    home: str = ""  # where a person finds the authors' files
    group: Callable[[Iterable[Record]], Iterator[Record]] | None = None  # of all records, where one question needs several
    trainable: bool = True
    train_split: str | None = "train"  # None: the source has no splits
    evaluation_split: str | None = None
    part: tuple[int | None, int | None] = (None, None)  # of the questions: from, to

    def split_of(self, wanted: str) -> str | None:
        """The split to read where `wanted` is asked for ("": the card's own); a file has none."""
        return (wanted or None) if self.train_split is not None else None

    def training_examples(self, questions: list[Question], seed: int, any_answer: bool = False) -> list[Example]:
        """The questions with this set's prompt, random markers and retrieval rule."""
        return [
            training_example(question, seed=seed, category=self.category, rule=self.retrieval, any_answer=any_answer)
            for question in questions
        ]

    def evaluation_examples(self, questions: list[Question]) -> list[Example]:
        """The questions with the fixed markers and this set's retrieval rule."""
        return [evaluation_example(question, rule=self.retrieval) for question in questions]


def distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Answers in order, each once, without white space around them; a BadRecord where none is left."""
    answers = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not answers:
        raise BadRecord("the list of answers is empty, expected at least one")
    return answers


def labelled(choices: Any) -> dict[str, str]:
    """{label: text} of [{"label", "text"}, …] or {"label": […], "text": […]}, the two ways in which choices are published."""
    try:
        pairs = zip(choices["label"], choices["text"]) if isinstance(choices, Mapping) else ((c["label"], c["text"]) for c in choices)
        found = {str(label): str(text).strip() for label, text in pairs}
    except (KeyError, TypeError):
        raise BadRecord('field "choices" is not a list of {"label", "text"}') from None
    return checked(found)


def checked(choices: dict[str, str]) -> dict[str, str]:
    """The choices, if there are two or more of them, none empty."""
    if len(choices) < 2 or not all(choices.values()):
        raise BadRecord(f"{len(choices)} choices ({', '.join(map(repr, choices.values()))}), expected two or more texts")
    return choices


def chosen(choices: Mapping[str, str], label: Any) -> str:
    """The choice with this label."""
    if str(label) not in choices:
        raise BadRecord(f"the answer is {label!r}, expected one of {', '.join(choices)}")
    return choices[str(label)]
