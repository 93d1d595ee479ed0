"""A set of the user's own: jsonl questions (DESIGN: the commands' contract)."""

from __future__ import annotations

from collections.abc import Iterator

from radit_jax.data.card import Record, checked, distinct
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, field, id_field, text_field


def own(record: Record) -> Iterator[Question]:
    """{"question", "answers"[, "id", "gold_id", "context", "choices", "reasoning", "history"]}; unknown fields are passed over."""
    yield Question(
        id=id_field(record, "id") if record.get("id") is not None else "",
        question=text_field(record, "question").strip(),
        answers=distinct(_texts(record, "answers")),
        gold_id=id_field(record, "gold_id") if record.get("gold_id") is not None else None,
        context=text_field(record, "context").strip() if record.get("context") is not None else None,
        choices=_choices(record),
        reasoning=text_field(record, "reasoning").strip() if record.get("reasoning") is not None else None,
        history=tuple(_texts(record, "history")) if record.get("history") is not None else (),
    )


def _texts(record: Record, name: str) -> list[str]:
    values = field(record, name)
    if not isinstance(values, list):
        raise BadRecord(f'field "{name}" is a {type(values).__name__}, expected a list of texts')
    return [text_field({name: value}, name) for value in values]


def _choices(record: Record) -> tuple[str, ...]:
    if record.get("choices") is None:
        return ()
    return tuple(checked({str(n): text.strip() for n, text in enumerate(_texts(record, "choices"))}).values())
