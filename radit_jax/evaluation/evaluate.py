"""Who answered how well: one system (LM, retrieval or none) over one question set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radit_jax import artifacts, distributed, progress
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics
from radit_jax.inference.ensemble import Answer, Ensemble, passage_logweights
from radit_jax.types import Example, Retrieved


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """How questions are answered."""

    k: int = 10  # passages in the ensemble (paper: 10)
    level: str = "sequence"  # "sequence" as in the paper, or "token": the mixture at every step
    score_scale: float = 1.0  # of the retriever, as in training


def answer_all(
    name: str, ensemble: Ensemble, examples: Sequence[Example], retrieved: Sequence[Retrieved] | None, options: EvaluateOptions
) -> tuple[list[Answer], dict[str, float]]:
    """Answers with k passages each (Eq. 2), or closed book when `retrieved` is None; also the rate."""
    prompted = []
    for i, example in enumerate(examples):
        if retrieved is None:
            prompted.append(ensemble.prompted(example.id, example.prompt, [None], [0.0]))
            continue
        passages = retrieved[i].passages[: options.k]
        if len(passages) < options.k:
            raise InputError(f"evaluate.k is {options.k}, but only {len(passages)} passages were retrieved for {example.id}")
        logw_K = passage_logweights(retrieved[i].scores_K[: options.k], options.score_scale)
        prompted.append(ensemble.prompted(example.id, example.prompt, [passage.content for passage in passages], logw_K))
    with progress.bar(f"evaluate {name}", len(prompted), unit="questions") as advance:
        answers = ensemble.generate(prompted, level=options.level, advance=advance)
    return answers, {"questions_per_s": round(advance.rate, 2), "seconds": round(advance.elapsed, 1)}


def judge(examples: Sequence[Example], answers: Sequence[Answer], retrieved: Sequence[Retrieved] | None) -> dict[str, list[float]]:
    """Per-question metrics: exact match, F1, and (with retrieval) answer recall@1/5/10 and MRR."""
    rows: list[dict[str, float]] = []
    for i, (example, answer) in enumerate(zip(examples, answers)):
        row = {"em": metrics.exact_match(answer.text, example.answers), "f1": metrics.f1(answer.text, example.answers)}
        if retrieved is not None:
            texts = [passage.content for passage in retrieved[i].passages]
            row |= metrics.retrieval_metrics(metrics.first_hit(texts, example.answers))
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]}


def write_row(
    folder: Path, name: str, examples: Sequence[Example], answers: Sequence[Answer], retrieved: Sequence[Retrieved] | None
) -> dict[str, Any]:
    """Stores a row of the table: `row.json` (name, n, metrics), `per_question.json` and `answers.json`; returns the row.

    Of several processes the leader writes.
    """
    per_question = judge(examples, answers, retrieved)
    row = {"name": name, "n": len(examples), "metrics": metrics.summarize(per_question)}
    records = [
        {"id": example.id, "question": example.query, "answers": list(example.answers), "answer": answer.text, "logprob": answer.logprob}
        for example, answer in zip(examples, answers)
    ]
    if distributed.leads():
        for file, value in (("row.json", row), ("per_question.json", per_question), ("answers.json", records)):
            artifacts.write_json(folder / file, value)
    return row
