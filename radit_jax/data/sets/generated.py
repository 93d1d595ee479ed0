"""Reading comprehension from a generated encyclopedia: what LM-ft learns from where a corpus comes without questions.

It teaches the form alone, to answer from the passage in front of the question and with nothing more; the facts are of no use.
"""

from __future__ import annotations

import dataclasses

from radit_jax.data.card import Card
from radit_jax.data.invented import Invented
from radit_jax.data.questions import Question
from radit_jax.data.sets.own import own

NAME = "invented"


def card() -> Card:
    """For LM-ft alone: the retriever has nothing to learn from facts that are not in the corpus."""
    return Card(NAME, NAME, own, "reading_comprehension", "own text", in_lm_ft=True)


def questions(encyclopedia: Invented, split: str, limit: int | None) -> list[Question]:
    """The first `limit` questions of a split (all without one), each with the passage that answers it."""
    asked = encyclopedia.questions(split, encyclopedia.count(split) if limit is None else limit)
    return [dataclasses.replace(question, context=_passage(encyclopedia, question.gold_id)) for question in asked]


def _passage(encyclopedia: Invented, id: str) -> str:
    return encyclopedia.passage(int(id.rpartition("-")[2])).content
