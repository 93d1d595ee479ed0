"""Questions from where they are kept: a jsonl file, or a set of tensorflow-datasets read through `data_source` (no TensorFlow)."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, BadRecords, id_field, json_lines, text_field
from radit_jax.errors import InputError

TFDS = "tfds:"
UNANSWERABLE = "I don't know"  # the target of SQuAD v2 questions that their text does not answer (SPEC section 3)


def load_questions(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_bad_records: int = 0,
    data_dir: str | Path | None = None,
) -> list[Question]:
    """The questions of `source`, in its order, at most the first `limit`.

    source: a jsonl(.gz) file of {"question", "answers"[, "id", "gold_id", "context"]}, or `tfds:NAME[/CONFIG]` with a NAME of TFDS_SETS.
    split: the split of a `tfds:` set, as tensorflow-datasets spells it ("train", "validation[:500]"); a file has none.
    data_dir: where `tfds:` sets are prepared; by default TFDS_DATA_DIR, else ~/tensorflow_datasets.
    Raises InputError with the place of the bad record that is one more than `max_bad_records`, and if no question is left.
    """
    bad = BadRecords(max_bad_records)
    questions = _from_tfds(source, split, data_dir, bad) if source.startswith(TFDS) else _from_file(source, split, bad)
    loaded = list(itertools.islice(questions, limit))
    if not loaded:
        raise InputError(f"{source}: no questions (limit {limit}, {bad.count} bad records), expected at least one")
    return loaded


# --- files -------------------------------------------------------------------------------------------------------------------------


def _from_file(source: str, split: str | None, bad: BadRecords) -> Iterator[Question]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise InputError(f"{source}: no such file, expected a jsonl(.gz) file of questions or {TFDS}NAME ({', '.join(TFDS_SETS)})")
    if split is not None:
        raise InputError(f"{source}: a file has no split {split!r}; name the file that holds it")
    lines: dict[str, int] = {}  # ids name the rows of what is stored later, so the same id may not come twice
    for line, question in json_lines(path, _parse_question, bad):
        if not question.id:
            question = dataclasses.replace(question, id=f"{path.name.split('.')[0]}-{line}")
        if question.id in lines:
            bad.add(f"{path}:{line}", f"the id {question.id!r} was used before, in line {lines[question.id]}")
            continue
        lines[question.id] = line
        yield question


def _parse_question(record: dict[str, Any]) -> Question:
    return Question(
        id=id_field(record, "id") if record.get("id") is not None else "",
        question=text_field(record, "question").strip(),
        answers=_answers(_answer_list(record)),
        gold_id=id_field(record, "gold_id") if record.get("gold_id") is not None else None,
        context=text_field(record, "context").strip() if record.get("context") is not None else None,
    )


def _answer_list(record: dict[str, Any]) -> list[str]:
    if "answers" not in record:
        raise BadRecord(f'no field "answers" (found {", ".join(record)})')
    if not isinstance(record["answers"], list):
        raise BadRecord(f'field "answers" is a {type(record["answers"]).__name__}, expected a list of texts')
    return [text_field({"answers": answer}, "answers") for answer in record["answers"]]


def _answers(texts: Iterable[str]) -> tuple[str, ...]:
    """Distinct answers in order, without white space around them."""
    answers = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
    if not answers:
        raise BadRecord("the list of answers is empty, expected at least one")
    return answers


# --- tensorflow-datasets -----------------------------------------------------------------------------------------------------------


def _from_tfds(source: str, split: str | None, data_dir: str | Path | None, bad: BadRecords) -> Iterator[Question]:
    name, _, config = source.removeprefix(TFDS).partition("/")
    if name not in TFDS_SETS:
        raise InputError(f"{source}: no such set here, expected one of {', '.join(TFDS + known for known in TFDS_SETS)}")
    parse = TFDS_SETS[name].parse
    config = config or TFDS_SETS[name].config
    if split is None:
        raise InputError(f"{source}: no split is named, expected one such as {' or '.join(TFDS_SETS[name].splits)}")
    seen: collections.Counter[str] = collections.Counter()
    for row, record in enumerate(_open_tfds(f"{name}/{config}" if config else name, split, data_dir)):
        try:
            question = parse(record)
        except (BadRecord, UnicodeDecodeError) as problem:
            bad.add(f"{source} {split}, record {row}", problem)
            continue
        id = question.id or f"{name}-{_digest(question.question)}"  # not the row: it differs between slices of a split
        seen[id] += 1  # some sets hold a question twice
        yield dataclasses.replace(question, id=id if seen[id] == 1 else f"{id}-{seen[id]}")


def _open_tfds(name: str, split: str, data_dir: str | Path | None) -> Sequence[Mapping[str, Any]]:
    """The prepared set, prepared now if it is not there yet (which needs a network)."""
    import tensorflow_datasets as tfds  # here: whoever brings jsonl does not wait for it
    from tensorflow_datasets.question_answering.web_questions import WebQuestions  # noqa: F401  it is known by name only once imported

    tfds.disable_progress_bar()
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # tfds reads it only when it is imported
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints while it prepares; stdout is for answers
            return tfds.data_source(name, split=split, data_dir=data_dir)
    except Exception as error:  # it fails in many ways: unknown config or split, no network, a damaged file, a missing package
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        where = data_dir or "~/tensorflow_datasets (or TFDS_DATA_DIR)"
        raise InputError(
            f"{TFDS}{name}, split {split!r}: {reason}; expected the set prepared as array_record in {where}, or a network to prepare it"
        ) from error


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _texts(values: Iterable[bytes | str]) -> list[str]:
    return [_text(value) for value in values]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _web_questions(record: Mapping[str, Any]) -> Question:
    return Question("", _text(record["question"]), _answers(_texts(record["answers"])))


def _natural_questions_open(record: Mapping[str, Any]) -> Question:
    return Question("", _text(record["question"]), _answers(_texts(record["answer"])))


def _trivia_qa(record: Mapping[str, Any]) -> Question:
    """The value first, then its aliases; the test split has neither (its value is "<unk>")."""
    texts = [text for text in [_text(record["answer"]["value"]), *_texts(record["answer"]["aliases"])] if text != "<unk>"]
    return Question(_text(record["question_id"]), _text(record["question"]), _answers(texts))


def _squad(record: Mapping[str, Any]) -> Question:
    unanswerable = bool(record.get("is_impossible", False))  # v2.0 only
    answers = (UNANSWERABLE,) if unanswerable else _answers(_texts(record["answers"]["text"]))
    return Question(_text(record["id"]), _text(record["question"]).strip(), answers, context=_text(record["context"]))


@dataclasses.dataclass(frozen=True)
class TfdsSet:
    """How the records of one set become questions, its splits with answers, and the configuration read unless another is named."""

    parse: Callable[[Mapping[str, Any]], Question]  # leaves the id empty where the set has none
    splits: tuple[str, ...]
    config: str | None = None


TFDS_SETS: dict[str, TfdsSet] = {
    "web_questions": TfdsSet(_web_questions, ("train", "test")),
    "natural_questions_open": TfdsSet(_natural_questions_open, ("train", "validation")),
    "trivia_qa": TfdsSet(_trivia_qa, ("train", "validation"), "unfiltered.nocontext"),  # what open-domain work evaluates on
    "squad": TfdsSet(_squad, ("train", "validation"), "v1.1"),
}
