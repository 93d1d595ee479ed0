"""All sets by name, and the one door to training: it refuses test splits and sets for evaluation (SPEC section 9, trap 8)."""

from __future__ import annotations

import collections
import dataclasses
import difflib
import hashlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from radit_jax.data import sources
from radit_jax.data.card import Card, Record
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, BadRecords
from radit_jax.data.sets import chain_of_thought, commonsense, dialogue, knowledge, open_qa, reading_comprehension, summarization
from radit_jax.data.sets.own import own
from radit_jax.data.sources import HUB, TFDS
from radit_jax.errors import InputError
from radit_jax.paths import named

_ROOMS = (dialogue, open_qa, reading_comprehension, summarization, chain_of_thought, knowledge, commonsense)
FEW = 64  # examples of the paper's few-shot stage
_SLICE = re.compile(r"(.+)\[(\d*):(\d*)\]")
CARDS: dict[str, Card] = {card.name: card for room in _ROOMS for card in room.CARDS}


def card_for(source: str, *, category: str = "open_qa", retrieval: str = "passages") -> Card:
    """The card of `NAME`, of `NAME:PATH` (the authors' files lie at PATH), or of a `tfds:` or `hub:` source.

    Any other source is a file of the user's own, with this category and rule. A file may end in [FROM:TO]: these of its questions.
    InputError names near misses.
    """
    if (sliced := _SLICE.fullmatch(source)) and not source.startswith((TFDS, HUB)):
        first, last = (int(number) if number else None for number in sliced.group(2, 3))
        return dataclasses.replace(card_for(sliced[1], category=category, retrieval=retrieval), part=(first, last))
    if source in CARDS:
        return CARDS[source]
    name, colon, path = source.partition(":")
    if source.startswith((TFDS, HUB)):
        return _by_source(source)
    if colon and name in CARDS:
        train_split = CARDS[name].train_split if named(path).is_dir() else None
        return dataclasses.replace(CARDS[name], source=path, train_split=train_split, evaluation_split=None)
    if colon or not Path(source).suffix:
        near = difflib.get_close_matches(name, CARDS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(CARDS)}, or a jsonl file"
        raise InputError(f"{source}: no such set; {hint}")
    return Card(Path(source).name.split(".")[0], source, own, category, retrieval, in_lm_ft=True, in_r_ft=True, train_split=None)


def _by_source(source: str) -> Card:
    mark = "#" if source.startswith(HUB) else "/"
    for card in CARDS.values():
        if source == card.source or source == card.source.partition(mark)[0]:
            return card
    for card in CARDS.values():  # another configuration of a set: the same rules, so trivia_qa/rc is not trained on either
        if source.partition(mark)[0] == card.source.partition(mark)[0]:
            return dataclasses.replace(card, source=source, size=None)
    known = [card.source for card in CARDS.values() if card.source.startswith(source.partition(":")[0])]
    raise InputError(f"{source}: no such set here, expected one of {', '.join(known)}")


def training_split(card: Card, split: str | None = None, *, few: bool = False) -> str | None:
    """The split to train on: `split`, or the card's. Raises InputError for what may not be trained on.

    few: a few examples of a set for evaluation may be, from its training split (the paper's 64-shot stage).
    """
    if not card.trainable and not few:
        raise InputError(f"{card.name} is for evaluation only, it may not be trained on")
    split = split or card.train_split
    held_out = r"(^|[^a-z])test([^a-z]|$)" if card.trainable else r"(^|[^a-z])(test|dev|valid|validation)([^a-z]|$)"
    if card.train_split is None and re.search(held_out, Path(card.source).name.lower()):
        raise InputError(f"{card.source}: a test file may not be trained on, expected a training file")
    for part in re.split(r"[+]", split or ""):
        base = part.partition("[")[0].strip()
        if base and card.train_split and base != card.train_split:
            raise InputError(f"{card.name}: the split {base!r} may not be trained on, expected {card.train_split!r} or a slice of it")
    return split


def training_questions(
    card: Card, *, split: str | None = None, limit: int | None = None, max_bad_records: int = 0, few: bool = False
) -> list[Question]:
    """The questions of a card to train on. Raises InputError for a test split and for an evaluation-only set.

    few: of a set for evaluation, at most FEW may be trained on.
    """
    if few and not card.trainable and not 0 < (limit or 0) <= FEW:
        raise InputError(f"{card.name} is for evaluation: at most {FEW} of its questions may be trained on (train.limit is {limit or 0})")
    return load_questions(card, split=training_split(card, split, few=few), limit=limit, max_bad_records=max_bad_records)


def evaluation_questions(card: Card, *, split: str | None = None, limit: int | None = None, max_bad_records: int = 0) -> list[Question]:
    """The questions of a card to be asked: of `split`, or of the card's own evaluation split."""
    return load_questions(card, split=split or card.evaluation_split, limit=limit, max_bad_records=max_bad_records)


def load_questions(
    card: Card | str,
    *,
    split: str | None = None,
    limit: int | None = None,
    max_bad_records: int = 0,
    data_dir: str | Path | None = None,
) -> list[Question]:
    """The questions of a card (or of card_for(source)), in the order of its source, at most the first `limit`.

    Raises InputError with the place of the bad record that is one more than `max_bad_records`, and if no question is left.
    """
    card = card_for(card) if isinstance(card, str) else card
    bad = BadRecords(max_bad_records)
    try:
        loaded = list(itertools.islice(itertools.islice(_questions(card, split, bad, data_dir), *card.part), limit))
    except sources.NotFetched as error:
        by_hand = f"; fetch it by hand ({card.home}) and name it {card.name}:PATH" if card.home else ""
        raise InputError(f"{error}{by_hand}") from error
    except BadRecord as problem:  # of a group, which is read whole
        raise InputError(f"{card.source}: {problem}") from None
    if not loaded:
        raise InputError(f"{card.source}: no questions (limit {limit}, {bad.count} bad records), expected at least one")
    return loaded


def _questions(card: Card, split: str | None, bad: BadRecords, data_dir: str | Path | None) -> Iterator[Question]:
    """Every question with an id of its own. One that a set repeats gets a number; in a file of the user's own that is a bad record."""
    mine = card.parse is own
    seen: collections.Counter[str] = collections.Counter()
    places: dict[str, str] = {}
    for where, record in _grouped(card, sources.records(card.source, split, bad, data_dir)):
        try:
            found = list(card.parse(record))
        except BadRecord as problem:
            bad.add(where, problem)
            continue
        except (AttributeError, KeyError, TypeError, ValueError) as problem:  # fields of other types than the authors'
            bad.add(where, f"not a record of {card.name} ({type(problem).__name__}: {problem})")
            continue
        for question in found:
            id = question.id or (f"{card.name}-{where.rpartition(':')[2]}" if mine else f"{card.name}-{_digest(question)}")
            seen[id] += 1
            if mine and seen[id] > 1:
                bad.add(where, f"the id {id!r} was used before, in {places[id]}")
                continue
            places[id] = where if mine else ""
            yield dataclasses.replace(question, id=id if seen[id] == 1 else f"{id}-{seen[id]}")


def _grouped(card: Card, placed: sources.Placed) -> Iterator[tuple[str, Record]]:
    if card.group is None:
        return placed
    return ((f"{card.source}, group {n}", record) for n, record in enumerate(card.group(record for _, record in placed)))


def _digest(question: Question) -> str:
    """Not the row: it differs between slices of a split."""
    text = "\0".join((question.question, *filter(None, [question.context]), *question.history))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
