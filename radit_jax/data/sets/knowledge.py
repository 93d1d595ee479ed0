"""Knowledge tasks of the paper, for evaluation alone: KILT's jsonl, MMLU, and open questions as the catalogue has them (SPEC section 8)."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator

from radit_jax.data.card import Card, Record, checked, distinct
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, field, id_field, text_field

_LETTERS = "ABCD"


def kilt(record: Record) -> Iterator[Question]:
    """{"id", "input", "output": [{"answer", "provenance": [{"wikipedia_id"}]}], "meta"}; of a slot, the question of its relation."""
    outputs = field(record, "output")
    answers = [output["answer"] for output in outputs if output.get("answer")]
    pages = [page for output in outputs for page in output.get("provenance") or () if page.get("wikipedia_id")]
    asked = text_field(record, "input").strip()
    templates = (record.get("meta") or {}).get("template_questions") or ()
    yield Question(
        id_field(record, "id"),
        str(next(iter(templates), asked)).strip(),
        distinct(answers),
        gold_id=str(pages[0]["wikipedia_id"]) if pages else None,
    )


def kilt_slots(record: Record) -> Iterator[Question]:
    """The same, asked as "entity [SEP] relation"."""
    yield from kilt({**record, "meta": None})


def kilt_dialogue(record: Record) -> Iterator[Question]:
    """The same, where the input is a dialogue, a turn a line."""
    for question in kilt(record):
        *history, last = [turn.strip() for turn in question.question.split("\n") if turn.strip()]
        yield Question(question.id, last, question.answers, question.gold_id, history=tuple(history))


def mmlu(record: Record) -> Iterator[Question]:
    """{"question", "subject", "choices": four texts, "answer": 0 to 3 or A to D}."""
    choices = checked(dict(zip(_LETTERS, (str(choice).strip() for choice in field(record, "choices")))))
    answer = field(record, "answer")
    letter = answer if answer in choices else _LETTERS[answer] if isinstance(answer, int) and 0 <= answer < len(choices) else None
    if letter is None:
        raise BadRecord(f'field "answer" is {answer!r}, expected 0 to {len(choices) - 1}')
    yield Question("", text_field(record, "question").strip(), (choices[letter],), choices=tuple(choices.values()))


def natural_questions_open(record: Record) -> Iterator[Question]:
    """{"question", "answer": […]}."""
    yield Question("", text_field(record, "question").strip(), distinct(field(record, "answer")))


def trivia_qa(record: Record) -> Iterator[Question]:
    """{"question_id", "question", "answer": {"value", "aliases"}}: the value first; the test split has neither (its value is "<unk>")."""
    texts = [field(record, "answer", "value"), *field(record, "answer", "aliases")]
    yield Question(id_field(record, "question_id"), text_field(record, "question"), distinct(text for text in texts if text != "<unk>"))


def popqa(record: Record) -> Iterator[Question]:
    """{"id", "question", "possible_answers": a list, or its JSON}."""
    answers = field(record, "possible_answers")
    try:
        answers = json.loads(answers) if isinstance(answers, str) else answers
    except ValueError:
        raise BadRecord(f'field "possible_answers" is {answers[:40]!r}, expected a list') from None
    yield Question(id_field(record, "id"), text_field(record, "question").strip(), distinct(answers))


_HELD_OUT = functools.partial(Card, category="open_qa", trainable=False, evaluation_split="validation")
_KILT = "github.com/facebookresearch/KILT ({}-dev-kilt.jsonl)"
CARDS = (
    _HELD_OUT("natural_questions_open", "tfds:natural_questions_open", natural_questions_open),
    _HELD_OUT("trivia_qa", "tfds:trivia_qa/unfiltered.nocontext", trivia_qa),  # what open-domain work evaluates on
    _HELD_OUT("popqa", "hub:akariasai/PopQA", popqa, evaluation_split="test"),
    _HELD_OUT("mmlu", "hub:cais/mmlu#all", mmlu, train_split="dev", home="github.com/hendrycks/test"),
    _HELD_OUT("nq", "hub:facebook/kilt_tasks#nq", kilt, home=_KILT.format("nq")),
    _HELD_OUT("tqa", "hub:facebook/kilt_tasks#triviaqa_support_only", kilt, home=_KILT.format("triviaqa")),
    _HELD_OUT("eli5", "hub:facebook/kilt_tasks#eli5", kilt, home=_KILT.format("eli5")),
    _HELD_OUT("hotpotqa", "hub:facebook/kilt_tasks#hotpotqa", kilt, home=_KILT.format("hotpotqa")),
    _HELD_OUT("fever", "hub:facebook/kilt_tasks#fever", kilt, home=_KILT.format("fever")),
    _HELD_OUT("aida", "hub:facebook/kilt_tasks#aidayago2", kilt, home=_KILT.format("aidayago2")),
    _HELD_OUT("zsre", "hub:facebook/kilt_tasks#structured_zeroshot", kilt, home=_KILT.format("structured_zeroshot")),
    _HELD_OUT("trex", "hub:facebook/kilt_tasks#trex", kilt_slots, home=_KILT.format("trex")),
    _HELD_OUT("wow", "hub:facebook/kilt_tasks#wow", kilt_dialogue, home=_KILT.format("wow")),
)
