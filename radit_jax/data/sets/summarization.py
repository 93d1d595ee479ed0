"""Summarization: an article and its summary; nothing is retrieved (SPEC section 7)."""

from __future__ import annotations

from collections.abc import Iterator

from radit_jax.data.card import Card, Record, distinct
from radit_jax.data.questions import Question
from radit_jax.data.records import id_field, text_field


def cnn_dailymail(record: Record) -> Iterator[Question]:
    """{"id", "article", "highlights"}."""
    summary = " ".join(text_field(record, "highlights").split())
    yield Question(id_field(record, "id"), "", distinct([summary]), context=text_field(record, "article").strip())


CARDS = (
    Card(
        "cnn_dailymail",
        "tfds:cnn_dailymail",
        cnn_dailymail,
        "summarization",
        "own text",
        in_lm_ft=True,
        size=287_113,
        home="github.com/abisee/cnn-dailymail",
        evaluation_split="validation",
    ),
)
