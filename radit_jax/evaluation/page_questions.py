"""The questions of the report: a sample to unfold, each with its passages, their weights and what all systems say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from radit_jax.evaluation import findings
from radit_jax.evaluation.markup import Markup, element, join, logp, table

SHOWN = 40
PAIRS = (("R-ft only", "neither tuned"), ("both", "LM-ft only"))  # what R-ft changes: (after, before)
Data = Mapping[str, Any]


def questions(data: Data) -> Markup:
    """The sample, with what R-ft won and lost to choose from; nothing without questions."""
    asked = data.get("questions", ())
    if not asked:
        return Markup()
    chosen = findings.sample(asked, SHOWN)
    kinds = {one["id"]: kind for pair in PAIRS for kind, of_kind in findings.changed(chosen, *pair).items() for one in of_kind}
    differing = sum(map(findings.differs, asked))
    says = f"{len(chosen)} of {len(asked):,} questions, first those on which the systems differ ({differing:,} in all)."
    filters = [("every", "all"), ("won", "won by R-ft"), ("lost", "lost by R-ft")]
    inputs = [
        part
        for name, label in filters
        for part in (
            element("input", type="radio", name="kind", id=name, **({"checked": ""} if name == "every" else {})),
            element("label", label, for_=name, class_="filter"),
        )
    ]
    shown = element("div", *(_question(question, kinds.get(question["id"], "")) for question in chosen), class_="questions")
    return join([element("p", says), *inputs, shown])


def _question(question: Data, kind: str) -> Markup:
    marks = [_mark(name, one["em"] > 0) for name, one in question["systems"].items()]
    top = element("summary", element("strong", question["question"]), " ", element("span", *marks))
    answers = element("p", "Accepted: ", element("em", " · ".join(question["answers"])))
    rows = [[name, _answer(one["answer"], one["em"] > 0), logp(one["logprob"])] for name, one in question["systems"].items()]
    found = [f"{name}: {'none' if rank is None else rank + 1}" for name, rank in question["first"].items()]
    first = element("p", f"First passage with an answer, by retriever: {', '.join(found)}", class_="soft") if found else ""
    passages = [_passage(passage) for passage in question["passages"]]
    inside = [answers, table(["system", "answer", "log p"], rows, words=2), first, *passages]
    return element("details", top, *inside, class_=kind or None)


def _passage(passage: Data) -> Markup:
    """With its weights, its text, and what each LM says after it alone."""
    weights = ", ".join(f"p_R {weight:.2f} ({retriever})" for retriever, weight in passage["weights"].items())
    top = [element("span", "holds an answer", class_="mark right") if passage["holds"] else "", element("span", weights, class_="soft")]
    said = [
        element("p", f"{lm}: ", _answer(one["answer"], one["right"]), f" (log p {logp(one['logprob'])})")
        for lm, one in passage["said"].items()
    ]
    title = [element("strong", passage["title"]), ". "] if passage["title"] else []
    return element("div", element("p", *top), element("p", *title, passage["text"]), *said, class_="passage")


def _answer(said: str, right: bool) -> Markup:
    return element("span", f"{said or '(nothing)'} {_sign(right)}", class_=_colour(right))


def _mark(name: str, right: bool) -> Markup:
    return element("span", f"{name} {_sign(right)}", class_=f"mark {_colour(right)}")


def _sign(right: bool) -> str:
    return "✓" if right else "✗"


def _colour(right: bool) -> str:
    return "right" if right else "wrong"
