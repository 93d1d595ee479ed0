"""One card per set of questions: where it is, what it is asked with, which passages it gets, and whether it may be trained on.

Nothing reaches training but through `training_questions`, which refuses test splits and evaluation-only sets (SPEC section 9, trap 8).
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from radit_jax.data.prompts import evaluation_example, training_example
from radit_jax.data.questions import Question
from radit_jax.data.sources import TFDS, load_questions
from radit_jax.errors import InputError
from radit_jax.types import Example


@dataclasses.dataclass(frozen=True)
class Card:
    """What is to know about one set."""

    name: str
    source: str  # for sources.load_questions
    category: str  # of prompts.TRAINING_PROMPTS
    retrieval: str = "passages"  # of prompts.RETRIEVAL_RULES
    in_lm_ft: bool = False  # one of the sets of the LM-ft mixture
    in_r_ft: bool = False  # one of the question answering sets of R-ft
    size: int | None = None  # training examples, for the mixture; None: count them
    trainable: bool = True
    train_split: str | None = "train"  # None: the source has no splits
    evaluation_split: str | None = None

    def training_examples(self, questions: list[Question], seed: int, any_answer: bool = False) -> list[Example]:
        """The questions with this set's prompt, random markers and retrieval rule."""
        return [
            training_example(question, seed=seed, category=self.category, rule=self.retrieval, any_answer=any_answer)
            for question in questions
        ]

    def evaluation_examples(self, questions: list[Question]) -> list[Example]:
        """The questions with the fixed markers and this set's retrieval rule."""
        return [evaluation_example(question, rule=self.retrieval) for question in questions]


_ALL = [
    Card("web_questions", "tfds:web_questions", "open_qa", in_lm_ft=True, in_r_ft=True, size=3_778, evaluation_split="test"),
    Card("squad_v1", "tfds:squad/v1.1", "reading_comprehension", "own text", size=87_599, evaluation_split="validation"),
    Card("squad_v2", "tfds:squad/v2.0", "reading_comprehension", "own text", in_lm_ft=True, size=130_319, evaluation_split="validation"),
    # Evaluation only: the paper never trains on them.
    Card("natural_questions_open", "tfds:natural_questions_open", "open_qa", trainable=False, evaluation_split="validation"),
    Card("trivia_qa", "tfds:trivia_qa/unfiltered.nocontext", "open_qa", trainable=False, evaluation_split="validation"),
]
CARDS: dict[str, Card] = {card.name: card for card in _ALL}


def card_for(source: str, *, category: str = "open_qa", retrieval: str = "passages") -> Card:
    """The card with this name or source; any other source is a set of the user's own, with this category and rule."""
    if source in CARDS:
        return CARDS[source]
    if not source.startswith(TFDS):
        name = Path(source).name.split(".")[0]
        return Card(name, source, category, retrieval, in_lm_ft=True, in_r_ft=True, train_split=None)
    for card in _ALL:
        if source == card.source or source == card.source.partition("/")[0]:
            return card
    for card in _ALL:  # another configuration of a set: the same rules, so trivia_qa/rc is not trained on either
        if source.partition("/")[0] == card.source.partition("/")[0]:
            return dataclasses.replace(card, source=source, size=None)
    raise InputError(f"{source}: no such set, expected one of {', '.join(CARDS)} or a jsonl(.gz) file")


def training_split(card: Card, split: str | None = None) -> str | None:
    """The split to train on: `split`, or the card's. Raises InputError for what may not be trained on."""
    if not card.trainable:
        raise InputError(f"{card.name} is for evaluation only, it may not be trained on")
    split = split or card.train_split
    if card.train_split is None and re.search(r"(^|[^a-z])test([^a-z]|$)", Path(card.source).name.lower()):
        raise InputError(f"{card.source}: a test file may not be trained on, expected a training file")
    for part in re.split(r"[+]", split or ""):
        base = part.partition("[")[0].strip()
        if base and card.train_split and base != card.train_split:
            raise InputError(f"{card.name}: the split {base!r} may not be trained on, expected {card.train_split!r} or a slice of it")
    return split


def training_questions(card: Card, *, split: str | None = None, limit: int | None = None, max_bad_records: int = 0) -> list[Question]:
    """The questions of a card to train on. Raises InputError for a test split and for an evaluation-only set."""
    return load_questions(card.source, split=training_split(card, split), limit=limit, max_bad_records=max_bad_records)


def evaluation_questions(card: Card, *, split: str | None = None, limit: int | None = None, max_bad_records: int = 0) -> list[Question]:
    """The questions of a card to be asked: of `split`, or of the card's own evaluation split."""
    return load_questions(card.source, split=split or card.evaluation_split, limit=limit, max_bad_records=max_bad_records)
