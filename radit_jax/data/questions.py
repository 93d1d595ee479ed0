"""A question as its source gives it, before any prompt (data/prompts.py turns it into an Example)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, every accepted answer (the first is the one trained on), and where the answer is, if that is known."""

    id: str
    question: str
    answers: tuple[str, ...]
    gold_id: str | None = None  # id of the document that holds the answer
    context: str | None = None  # the text the question is asked about (reading comprehension)
