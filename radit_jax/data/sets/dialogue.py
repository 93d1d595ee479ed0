"""Dialogue: every reply of an assistant after all turns before it (SPEC section 7; Open Assistant's trees)."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator

from radit_jax.data.card import Card, Record
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, field, text_field

USER, ASSISTANT = "prompter", "assistant"


def oasst1(record: Record) -> Iterator[Question]:
    """A tree: {"message_tree_id", "prompt": {"message_id", "role", "text", "deleted"?, "replies": [message, …]}}."""
    yield from _replies(field(record, "prompt"), ())


def _replies(message: Record, turns: tuple[str, ...]) -> Iterator[Question]:
    if message.get("deleted"):
        return
    role, text = field(message, "role"), text_field(message, "text").strip()
    if role != (USER, ASSISTANT)[len(turns) % 2]:
        raise BadRecord(f"the role of message {message.get('message_id')} is {role!r}, expected {(USER, ASSISTANT)[len(turns) % 2]!r}")
    if role == ASSISTANT:
        yield Question(text_field(message, "message_id"), turns[-1], (text,), history=turns[:-1])
    for reply in message.get("replies") or ():
        yield from _replies(reply, (*turns, text))


def trees(messages: Iterable[Record]) -> Iterator[Record]:
    """The trees of single messages {"message_id", "parent_id", "message_tree_id", …}, as the Hub has them; trees stay as they are."""
    found: dict[str, dict] = {}
    children: dict[str, list[dict]] = collections.defaultdict(list)
    for message in messages:
        if "prompt" in message:
            yield message
            continue
        node = {**message, "replies": children[text_field(message, "message_id")]}
        if message.get("parent_id"):
            children[message["parent_id"]].append(node)
        else:
            found[message["message_id"]] = node
    yield from ({"message_tree_id": name, "prompt": node} for name, node in found.items())


CARDS = (
    Card(
        "oasst1",
        "hub:OpenAssistant/oasst1",
        oasst1,
        "dialogue",
        in_lm_ft=True,
        in_r_ft=True,
        size=31_598,
        home="huggingface.co/datasets/OpenAssistant/oasst1 (2023-04-12_oasst_ready.trees.jsonl.gz)",
        group=trees,
        evaluation_split="validation",
    ),
)
