"""A question as its source gives it, before any prompt (data/prompts.py turns it into an Example)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, every accepted answer (the first is the one trained on), and what the set says beside it."""

    id: str
    question: str
    answers: tuple[str, ...]
    gold_id: str | None = None  # id of the document that holds the answer
    context: str | None = None  # the text the question is asked about (reading comprehension), or that is to be summarized
    choices: tuple[str, ...] = ()  # among which the answer is, in the order of the set
    reasoning: str | None = None  # that leads to the answer (chain of thought)
    history: tuple[str, ...] = ()  # what was said before, by turns: asked, answered, asked, …, answered
