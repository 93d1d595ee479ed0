"""Fifty made-up records of each of the eight choice tasks, in the schema of their authors, for tests and make_choice_references.py."""

from __future__ import annotations

import random

COUNT = 50
NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("a kettle", "the old boat", "a wool scarf", "the garden gate", "a jar of honey", "the red bicycle", "a box of nails", "the lamp")
PLACES = ("the kitchen", "a harbour", "the library", "a market", "the attic", "a meadow", "the station", "a workshop")
ACTS = ("washed", "painted", "sold", "carried", "repaired", "lost", "found", "hid")
REASONS = ("it was raining", "the sun was hot", "nobody was home", "the road was closed", "it was already late", "a friend had asked")


def records() -> dict[str, list[dict]]:
    """{task: records}; the same in every run."""
    return {name: [make(random.Random(f"{name} {n}")) for n in range(COUNT)] for name, make in MAKERS.items()}


def _scene(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} {rng.choice(ACTS)} {rng.choice(THINGS)} near {rng.choice(PLACES)} because {rng.choice(REASONS)}."


def _several(rng: random.Random, what: tuple[str, ...], count: int) -> list[str]:
    return rng.sample(what, count)


def boolq(rng: random.Random) -> dict:
    passage = f"{_scene(rng)} {_scene(rng)}"
    return {"question": f"did {rng.choice(NAMES)} have {rng.choice(THINGS)}", "passage": passage, "answer": rng.random() < 0.5}


def piqa(rng: random.Random) -> dict:
    first, second = (f"Take {rng.choice(THINGS)} to {rng.choice(PLACES)} and wait." for _ in range(2))
    return {"goal": f"How to look after {rng.choice(THINGS)}?", "sol1": first, "sol2": f"{second} Then go.", "label": rng.randrange(2)}


def siqa(rng: random.Random) -> dict:
    answers = [f"{act} {rng.choice(THINGS)}" for act in _several(rng, ACTS, 3)]
    name = rng.choice(NAMES)
    return {
        "context": _scene(rng),
        "question": f"What will {name} want to do next?",
        **dict(zip(("answerA", "answerB", "answerC"), answers)),
        "label": str(rng.randrange(1, 4)),
    }


def hellaswag(rng: random.Random) -> dict:
    wikihow = rng.random() < 0.5
    begun = f"[header] How to use {rng.choice(THINGS)} [title] Go to {rng.choice(PLACES)}." if wikihow else _scene(rng)
    return {
        "activity_label": rng.choice(("Home and Garden", "Sailing", "Cooking")),
        "ctx_a": begun,
        "ctx_b": rng.choice(("", "then she", "the man")),
        "endings": [f"{act} {rng.choice(THINGS)} [substeps] and left." for act in _several(rng, ACTS, 4)],
        "label": rng.randrange(4),
    }


def winogrande(rng: random.Random) -> dict:
    one, two = _several(rng, NAMES, 2)
    sentence = f"{one} gave {rng.choice(THINGS)} to {two} because _ {rng.choice(ACTS)} it in {rng.choice(PLACES)}."
    return {"sentence": sentence, "option1": one, "option2": two, "answer": str(rng.randrange(1, 3))}


def arc(rng: random.Random) -> dict:
    choices = {"text": [f"{thing} in {rng.choice(PLACES)}" for thing in _several(rng, THINGS, 4)], "label": list("ABCD")}
    question = f"{rng.choice(NAMES)} says that {rng.choice(REASONS)}. Which of these explains it best?"
    return {"id": str(rng.randrange(10**6)), "question": question, "choices": choices, "answerKey": rng.choice("ABCD")}


def obqa(rng: random.Random) -> dict:
    record = arc(rng)
    stem = f"{rng.choice(NAMES)} went to {rng.choice(PLACES)} with {rng.choice(THINGS)} so that"
    return {"id": record["id"], "question_stem": stem, "choices": record["choices"], "answerKey": record["answerKey"]}


MAKERS = {
    "boolq": boolq,
    "piqa": piqa,
    "siqa": siqa,
    "hellaswag": hellaswag,
    "winogrande": winogrande,
    "arc_easy": arc,
    "arc_challenge": arc,
    "obqa": obqa,
}
