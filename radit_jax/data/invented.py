"""`invented`: an encyclopedia of people, places, works and institutions that no LM has ever read, and questions about it.

A closed-book LM cannot know an answer, so what retrieval and tuning add is visible in minutes; any size up to 10⁷ passages is a stream.
Everything is computed from (seed, index) by a counter-based hash: passage i costs the same at any i, and nothing is stored.

The corpus is made of blocks of 34 passages. A block holds one *family* of each of eight kinds of entity: two or three entities whose
names differ in a letter or a word ("Marlen Ostrevik", "Marlen Ostrevich"). An entity of most kinds has several passages, each with its
own facts, 100 facts a block. A fact is an (entity, relation) pair; ten facts of each block are asked about in the test split, ten others
in dev and the other eighty in train, so the splits share no fact, whatever the size of the corpus. Dev and test ask in wordings that
train never uses. Passages after the last whole block are in the corpus but not asked about.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from radit_jax.data import invented_words as words
from radit_jax.data.invented_relations import CLOSING, KINDS, RELATIONS
from radit_jax.data.questions import Question
from radit_jax.errors import InputError
from radit_jax.types import Passage

SPLITS = {"test": (0,), "dev": (1,), "train": (2, 3, 4, 5, 6, 7, 8, 9)}  # which facts of every ten
_TRAIN_WORDINGS = 3


class _Slot(NamedTuple):
    """A passage's place in its block: which entity of which kind it is about, and the relations it states."""

    kind: str
    variant: int
    relations: tuple[str, ...]


_SLOTS = tuple(
    _Slot(kind, variant, section) for kind, about in KINDS.items() for variant in range(about.family) for section in about.sections
)
_FACTS = tuple((row, relation) for row, slot in enumerate(_SLOTS) for relation in slot.relations)


class _Dice:
    """A stream of choices that is a function of its key alone: 512 bits of BLAKE2b, spent by division."""

    __slots__ = ("bits",)

    def __init__(self, key: str):
        self.bits = int.from_bytes(hashlib.blake2b(key.encode()).digest(), "little")

    def roll(self, sides: int) -> int:
        self.bits, side = divmod(self.bits, sides)
        return side

    def pick(self, table: Sequence[Any]) -> Any:
        self.bits, side = divmod(self.bits, len(table))
        return table[side]


class _Shuffle:
    """A permutation of range(size) in O(1): i → (a·i + b) mod size, with a coprime to size."""

    def __init__(self, size: int, dice: _Dice):
        self.size = size
        self.factor = size // 4 + dice.roll(size // 2 + 1)
        self.offset = dice.roll(size)
        while math.gcd(self.factor, size) != 1:
            self.factor += 1

    def __call__(self, index: int) -> int:
        return (self.factor * index + self.offset) % self.size


# ---- names: a family's number, spelled in the mixed radix of its tables, so that different numbers have different names


class _Name(NamedTuple):
    title: str
    full: str  # as it stands inside a sentence
    short: str


def _apart(variant: int, *root: int) -> tuple[int, int]:
    """(which word, which spelling): a family differs in a word or in a spelling, decided by the digits that spell its shared root."""
    return (0, variant) if sum(root) % 2 else (variant, 0)


def _person_name(variant: int, first: int, mid: int, end: int, stem: int, given_end: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    surname = _surname_of(first, mid, end, spelling)
    name = f"{words.GIVEN_STEMS[stem]}{words.GIVEN_ENDS[given_end][word]} {surname}"
    return _Name(name, name, surname)


def _surname_of(first: int, mid: int, end: int, spelling: int) -> str:
    return words.FIRSTS[first] + words.MIDS[mid] + words.ENDS[end][spelling]


def _town_of(first: int, mid: int, end: int, spelling: int) -> str:
    return words.FIRSTS[first] + words.TOWN_MIDS[mid] + words.TOWN_ENDS[end][spelling]


def _town_name(variant: int, first: int, mid: int, end: int, qualifier: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    name = f"{words.TOWN_QUALIFIERS[qualifier][word]} {_town_of(first, mid, end, spelling)}".lstrip()
    return _Name(name, name, "the town")


def _academy_name(variant: int, first: int, mid: int, end: int, noun: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    name = f"{_surname_of(first, mid, end, spelling)} {words.SCHOOLS[noun][word]}"
    return _Name(name, name, f"the {words.SCHOOLS[noun][word].lower()}")


def _company_name(variant: int, first: int, mid: int, end: int, noun: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    name = f"{_surname_of(first, mid, end, spelling)} {words.FIRMS[noun][word]}"
    return _Name(name, name, "the company")


def _novel_name(variant: int, first: int, end: int, adjective: int, noun: int) -> _Name:
    word, spelling = _apart(variant, first, end)
    name = f"The {words.TITLES[adjective][word]} {words.TITLE_NOUNS[noun]} of {words.FIRSTS[first]}{words.ENDS[end][spelling]}"
    return _Name(name, name, "the novel")


def _ship_name(variant: int, first: int, mid: int, end: int, noun: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    name = f"{words.SHIPS[noun][word]} of {_town_of(first, mid, end, spelling)}"
    return _Name(name, f"the {name}", "the ship")


def _painting_name(variant: int, first: int, mid: int, end: int, scene: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    name = f"{words.SCENES[scene][word]} at {_town_of(first, mid, end, spelling)}"
    return _Name(name, name, "the picture")


def _plant_name(variant: int, first: int, mid: int, end: int, noun: int) -> _Name:
    word, spelling = _apart(variant, first, mid, end)
    look = words.PLANT_LOOKS[(first + noun) % len(words.PLANT_LOOKS)][word]
    name = f"{look} {_surname_of(first, mid, end, spelling)} {words.PLANTS[noun]}"
    return _Name(_capital(name), f"the {name}", "the plant")


_TOWN_TABLES = (words.FIRSTS, words.TOWN_MIDS, words.TOWN_ENDS)
_SURNAME_TABLES = (words.FIRSTS, words.MIDS, words.ENDS)
_NAMES: dict[str, tuple[Callable[..., _Name], tuple[int, ...]]] = {
    kind: (spell, tuple(len(table) for table in tables))
    for kind, spell, tables in (
        ("person", _person_name, (*_SURNAME_TABLES, words.GIVEN_STEMS, words.GIVEN_ENDS)),
        ("town", _town_name, (*_TOWN_TABLES, words.TOWN_QUALIFIERS)),
        ("academy", _academy_name, (*_SURNAME_TABLES, words.SCHOOLS)),
        ("novel", _novel_name, (words.FIRSTS, words.ENDS, words.TITLES, words.TITLE_NOUNS)),
        ("company", _company_name, (*_SURNAME_TABLES, words.FIRMS)),
        ("ship", _ship_name, (*_TOWN_TABLES, words.SHIPS)),
        ("painting", _painting_name, (*_TOWN_TABLES, words.SCENES)),
        ("plant", _plant_name, (*_SURNAME_TABLES, words.PLANTS)),
    )
}
CAPACITY = len(_SLOTS) * min(math.prod(radices) for _, radices in _NAMES.values())  # passages until names run out


def _digits(number: int, radices: tuple[int, ...]) -> Iterator[int]:
    for radix in radices:
        number, digit = divmod(number, radix)
        yield digit


# ---- values: what the answers are


def _root(dice: _Dice) -> str:
    return dice.pick(words.FIRSTS) + dice.pick(words.MIDS)


def _surname(dice: _Dice) -> str:
    return _root(dice) + dice.pick(dice.pick(words.ENDS))


def _person(dice: _Dice) -> str:
    return f"{dice.pick(words.GIVEN_STEMS)}{dice.pick(dice.pick(words.GIVEN_ENDS))} {_surname(dice)}"


def _town(dice: _Dice) -> str:
    return dice.pick(words.FIRSTS) + dice.pick(words.TOWN_MIDS) + dice.pick(dice.pick(words.TOWN_ENDS))


_VALUES: dict[str, Callable[[_Dice, int], str]] = {  # of the dice and the year the entity's story starts
    "birth_date": lambda dice, era: f"{1 + dice.roll(28)} {dice.pick(words.MONTHS)} {era}",
    "death_year": lambda dice, era: str(era + 41 + dice.roll(50)),
    "year": lambda dice, era: str(1300 + dice.roll(690)),
    "thousands": lambda dice, era: f"{1 + dice.roll(89)},{dice.roll(1000):03d}",
    "metres": lambda dice, era: f"{12 + dice.roll(1900)} metres",
    "person": lambda dice, era: _person(dice),
    "town": lambda dice, era: _town(dice),
    "river": lambda dice, era: f"{_root(dice)}a",
    "trade": lambda dice, era: f"{dice.pick(words.MATERIALS)} {dice.pick(words.TRADES)}",
    "device": lambda dice, era: _root(dice).lower() + dice.pick(words.DEVICES),
    "award": lambda dice, era: f"{_surname(dice)} {dice.pick(words.AWARDS)}",
    "cheese": lambda dice, era: _root(dice) + dice.pick(words.CHEESES),
    "newspaper": lambda dice, era: f"{_root(dice)} {dice.pick(words.PAPERS)}",
    "creature": lambda dice, era: f"{dice.pick(words.LOOKS)} {dice.pick(words.ANIMALS)}",
    "press": lambda dice, era: f"{_surname(dice)} {dice.pick(words.PRESSES)}",
    "product": lambda dice, era: f"{dice.pick(words.MATERIALS)} {dice.pick(words.GOODS)}",
    "shipyard": lambda dice, era: f"{_surname(dice)} shipyard",
    "food": lambda dice, era: f"{dice.pick(words.TREATMENTS)} {dice.pick(words.FOODS)}",
    "gallery": lambda dice, era: f"{_surname(dice)} {dice.pick(words.GALLERIES)}",
    "valley": lambda dice, era: f"{_root(dice)} {dice.pick(words.VALLEYS)}",
}


def _answers(value: str) -> tuple[str, ...]:
    bare = value.removesuffix(" metres").removesuffix(" shipyard")
    return (value,) if bare == value else (value, bare)


# ---- telling


class _Entity(NamedTuple):
    name: _Name
    pronouns: dict[str, str]
    era: int


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _forms(subject: str, object_: str, possessive: str) -> dict[str, str]:
    return {"S": _capital(subject), "s": subject, "o": object_, "P": _capital(possessive), "p": possessive}


def _named(name: str) -> dict[str, str]:
    return _forms(name, name, name + ("'" if name.endswith("s") else "'s"))


def _pronouns(kind: str, short: str, dice: _Dice) -> dict[str, str]:
    if kind == "person":
        return dice.pick((_forms("she", "her", "her"), _forms("he", "him", "his")))
    return _forms("it", short, "its")


def _sentences(slot: _Slot, entity: _Entity, facts: list[tuple[str, str]], dice: _Dice) -> Iterator[str]:
    """An opening that names the entity, its facts in a random order and wording, and an aside where there is room."""
    yield dice.pick(KINDS[slot.kind].intros).format_map(_named(entity.name.full))
    forms = entity.pronouns
    room = len(facts) < 4
    told = [facts.pop(dice.roll(len(facts))) for _ in range(len(facts))]
    for relation_name, value in sorted(told, key=lambda fact: fact[0] in CLOSING):
        relation = RELATIONS[relation_name]
        yield dice.pick(relation.states).format_map({**forms, "a": value})
        # After another person's name "he" would be either of the two.
        unclear = slot.kind == "person" and relation.value == "person"
        forms = _named(entity.name.short) if unclear or dice.roll(3) == 0 else entity.pronouns
    if room:
        yield dice.pick(KINDS[slot.kind].asides).format_map(forms)


# ---- the data set


@dataclasses.dataclass(frozen=True)
class Invented:
    """The encyclopedia of `passages` passages that `seed` makes. Passage i depends on (seed, i) alone, not on the size.

    Raises InputError for a size that is not in 34 … CAPACITY (10 million and more).
    """

    passages: int
    seed: int = 0

    def __post_init__(self):
        if not len(_SLOTS) <= self.passages <= CAPACITY:
            raise InputError(f"invented: passages = {self.passages:,}, expected {len(_SLOTS)} … {CAPACITY:,}")

    def corpus(self) -> Iterator[Passage]:
        """All passages in order, one at a time."""
        return map(self.passage, range(self.passages))

    def passage(self, index: int) -> Passage:
        """Passage `index` of range(passages): 25–60 words, 2–4 facts about one entity."""
        if not 0 <= index < self.passages:
            raise InputError(f"invented: passage {index:,}, expected 0 … {self.passages - 1:,}")
        slot, entity, facts, dice = self._facts(index)
        return Passage(self._id(index), entity.name.title, " ".join(_sentences(slot, entity, facts, dice)))

    def count(self, split: str) -> int:
        """How many questions `questions` can ask in this split."""
        wordings = _TRAIN_WORDINGS if split == "train" else 1
        return self._facts_of(split) * wordings

    def questions(self, split: str, n: int) -> Iterator[Question]:
        """The first n questions of "train", "dev" or "test", every fact in one wording before any fact of train in a second.

        Raises InputError for an unknown split or more than `count(split)` questions.
        """
        if not 0 <= n <= self.count(split):
            raise InputError(f"invented: {n:,} {split} questions, but {self.passages:,} passages allow {self.count(split):,}")
        order = _Shuffle(self._facts_of(split), _Dice(f"order {self.seed} {split}"))
        return (self._question(split, order(number % order.size), number // order.size) for number in range(n))

    def _facts_of(self, split: str) -> int:
        if split not in SPLITS:
            raise InputError(f"invented: split {split!r}, expected one of {', '.join(SPLITS)}")
        return self.passages // len(_SLOTS) * len(_FACTS) // 10 * len(SPLITS[split])

    def _question(self, split: str, number: int, turn: int) -> Question:
        block, within = divmod(number, len(_FACTS) // 10 * len(SPLITS[split]))
        ten, residue = divmod(within, len(SPLITS[split]))
        turned = _Dice(f"facts {self.seed} {block}").roll(10)  # so that no relation is always of one split
        row, relation_name = _FACTS[10 * ten + (SPLITS[split][residue] + turned) % 10]
        index = block * len(_SLOTS) + row
        _, entity, facts, _ = self._facts(index)
        relation = RELATIONS[relation_name]
        wordings = relation.asks if split == "train" else relation.asks_held_out
        wording = wordings[(_Dice(f"wording {self.seed} {index} {relation_name}").roll(6) + turn) % len(wordings)]
        return Question(
            id=f"{self._id(index)}-{relation_name}-{split}{turn}",
            question=wording.format(n=entity.name.full.removeprefix("the ")),
            answers=_answers(dict(facts)[relation_name]),
            gold_id=self._id(index),
        )

    def _id(self, index: int) -> str:
        return f"invented{self.seed}-{index}"

    def _facts(self, index: int) -> tuple[_Slot, _Entity, list[tuple[str, str]], _Dice]:
        """What passage `index` is about and states, and the dice that go on to choose its wording."""
        block, row = divmod(index, len(_SLOTS))
        slot = _SLOTS[row]
        entity = self._entity(slot.kind, block, slot.variant)
        dice = _Dice(f"passage {self.seed} {index}")
        return slot, entity, [(name, _VALUES[RELATIONS[name].value](dice, entity.era)) for name in slot.relations], dice

    def _entity(self, kind: str, family: int, variant: int) -> _Entity:
        spell, radices = _NAMES[kind]
        name = spell(variant, *_digits(self._families[kind](family), radices))
        dice = _Dice(f"entity {self.seed} {kind} {family} {variant}")
        return _Entity(name, _pronouns(kind, name.short, dice), 1350 + dice.roll(550))

    @functools.cached_property
    def _families(self) -> dict[str, _Shuffle]:
        return {kind: _Shuffle(math.prod(radices), _Dice(f"names {self.seed} {kind}")) for kind, (_, radices) in _NAMES.items()}
