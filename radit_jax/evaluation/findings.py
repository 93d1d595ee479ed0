"""What is read off a table of systems, question by question: who won where, which ranks moved, whether p_R knows what the LM needs.

Questions are plain data, as the report shows them:

    {"id", "question", "answers", "systems": {name: {"answer", "logprob", "em"}}, "first": {retriever: rank from 0 or None},
     "passages": [{"id", "title", "text", "holds", "weights": {retriever: p_R}, "said": {LM: {"answer", "logprob", "right"}}}]}
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

BEFORE, AFTER = "untuned", "R-ft"  # the retrievers
BINS = 10
Question = Mapping[str, Any]


def differs(question: Question) -> bool:
    """Whether some systems are right and others wrong."""
    return len({one["em"] > 0 for one in question["systems"].values()}) > 1


def sample(questions: Sequence[Question], count: int) -> list[Question]:
    """The questions on which the systems differ first, else in their order."""
    return sorted(questions, key=lambda question: not differs(question))[:count]


def changed(questions: Iterable[Question], after: str, before: str) -> dict[str, list[Question]]:
    """{"won": …, "lost": …}: right with the one system and wrong with the other."""
    found: dict[str, list[Question]] = {"won": [], "lost": []}
    for question in questions:
        systems = question["systems"]
        if after in systems and before in systems and systems[after]["em"] != systems[before]["em"]:
            found["won" if systems[after]["em"] > systems[before]["em"] else "lost"].append(question)
    return found


def moves(questions: Iterable[Question]) -> collections.Counter[tuple[int | None, int | None]]:
    """How many questions have their first passage with an answer at which rank before and after R-ft."""
    return collections.Counter((q["first"][BEFORE], q["first"][AFTER]) for q in questions if {BEFORE, AFTER} <= q["first"].keys())


def directions(moved: Mapping[tuple[int | None, int | None], int]) -> dict[str, int]:
    """How many went up, down, stayed, or were never there."""
    found = {"up": 0, "down": 0, "where it was": 0, "never found": 0}
    for (before, after), count in moved.items():
        ranks = [np.inf if rank is None else rank for rank in (before, after)]
        same = "never found" if before is None else "where it was"
        found[same if before == after else "up" if ranks[1] < ranks[0] else "down"] += count
    return found


def binned(points: Iterable[tuple[float, float]]) -> list[dict[str, float]]:
    """(weight in 0 … 1, value) by tenths of weight: mean weight "x", mean value "y" and number "n" of each that has any."""
    points_Nx2 = np.asarray(list(points), np.float64).reshape(-1, 2)
    bins_N = np.minimum((points_Nx2[:, 0] * BINS).astype(int), BINS - 1)
    inside = [points_Nx2[bins_N == number] for number in range(BINS)]
    return [{"x": float(of[:, 0].mean()), "y": float(of[:, 1].mean()), "n": len(of)} for of in inside if len(of)]


def calibration(questions: Sequence[Question], retriever: str) -> dict[str, list[dict[str, float]]]:
    """By tenths of p_R, how often a passage holds an answer, and how often each LM is right from it alone."""
    seen = [(p["weights"][retriever], p) for q in questions for p in q["passages"] if retriever in p["weights"]]
    lms = dict.fromkeys(lm for _, passage in seen for lm in passage["said"])
    found = {"it holds an answer": binned((weight, passage["holds"]) for weight, passage in seen)}
    for lm in lms:
        found[f"the {lm} is right from it"] = binned((w, p["said"][lm]["right"]) for w, p in seen if lm in p["said"])
    return {name: bins for name, bins in found.items() if bins}


def mass(questions: Sequence[Question], retriever: str) -> float | None:
    """Mean p_R on passages that hold an answer: what the ensemble's weights give to them."""
    each = [
        sum(p["weights"][retriever] for p in q["passages"] if p["holds"] and retriever in p["weights"])
        for q in questions
        if any(retriever in p["weights"] for p in q["passages"])
    ]
    return float(np.mean(each)) if each else None


def smoothed(points: Sequence[tuple[float, float]], parts: int = 25) -> list[tuple[float, float]]:
    """Means of each point's neighbours: a twenty-fifth of all, and of few points some more."""
    reach = max(len(points) // (2 * parts), min(2, len(points) // 8))
    ys = [y for _, y in points]
    around = [ys[max(0, i - reach) : i + reach + 1] for i in range(len(ys))]
    return [(x, sum(near) / len(near)) for (x, _), near in zip(points, around)]


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most about so many points: means of as many neighbours as it takes."""
    width = -(-len(points) // most) if points else 1
    groups = [points[i : i + width] for i in range(0, len(points), width)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
