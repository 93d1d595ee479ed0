"""Random runs and judgements: what tests and make_retrieval_references.py measure."""

from __future__ import annotations

import random

QUESTIONS, DOCUMENTS, DEPTH = 30, 60, 40


def runs() -> tuple[dict[str, dict[str, int]], dict[str, list[str]]]:
    """({question: {document: grade}}, {question: documents, best first}); some are judged alone, some are found alone."""
    rng = random.Random(7)
    names = [f"d{n}" for n in range(DOCUMENTS)]
    relevant, ranked = {}, {}
    for n in range(QUESTIONS):
        judged = rng.sample(names, rng.randrange(1, 15))
        relevant[f"q{n}"] = {name: rng.choice((0, 1, 1, 2, 3)) for name in judged} | {judged[0]: 1}
        ranked[f"q{n}"] = rng.sample(names, rng.randrange(1, DEPTH))
    return relevant, ranked
