"""Retrieval quality of any question set, before R-ft and after it: means, paired differences, and which questions moved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radit_jax import artifacts, distributed
from radit_jax.data import training_sets
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics, report, retrieval, tasks
from radit_jax.evaluation.findings import AFTER, BEFORE
from radit_jax.evaluation.retrieval import BEIR, Judged
from radit_jax.pipeline import Pipeline
from radit_jax.types import Example


def make(pipeline: Pipeline, sources: Sequence[str], *, k: int, folder: Path | None) -> dict[str, Any]:
    """Searches the questions of every source with the untuned query encoder and, where the workdir has one, with the tuned.

    `folder` gets per-question measures of what moved (NAME.moved.jsonl) and TREC run files (NAME.untuned.run, NAME.R-ft.run).
    """
    if not 0 < k <= len(pipeline.store):
        raise InputError(f"k is {k}, the corpus has {len(pipeline.store):,} passages")
    systems = {BEFORE: False, **({AFTER: True} if pipeline.has("lsr_ft") else {})}
    sets: dict[str, Any] = {}
    for source in sources:
        name, judged, examples = _questions(pipeline, source)
        if name in sets:
            raise InputError(f"the questions {name} are named twice")
        rows = {system: _measured(pipeline, name, judged, examples, k, tuned, folder, system) for system, tuned in systems.items()}
        per_question = {system: _columns(found) for system, found in rows.items()}
        sets[name] = {"n": len(judged), "systems": {system: metrics.summarize(found) for system, found in per_question.items()}}
        if len(rows) == 2:
            before, after = per_question[BEFORE], per_question[AFTER]
            sets[name]["difference"] = {key: metrics.paired_difference(after[key], before[key]) for key in before}
            if folder is not None and distributed.leads():
                moved = _moved(judged, rows[BEFORE], rows[AFTER])
                artifacts.write_whole(folder / f"{name}.moved.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in moved))
    return {"k": k, "sets": sets, "config": pipeline.config.to_dict()}


def text(value: dict[str, Any]) -> str:
    """The tables as people read them."""
    return "\n".join(report.retrieval(name, found) for name, found in value["sets"].items())


def _questions(pipeline: Pipeline, source: str) -> tuple[str, list[Judged], list[Example]]:
    """(name, what is known of each question, how it is searched)."""
    c = pipeline.config
    if source.startswith(BEIR):
        judged = retrieval.beir_questions(source, c.corpus.max_bad_records)
        name = Path(source.removeprefix(BEIR).partition("#")[0]).name
        return name, judged, [Example(one.id, one.text, one.text, " -") for one in judged]
    task = tasks.task_for(source)
    how = {"split": task.card.split_of(c.tasks.split), "limit": c.tasks.limit or None, "max_bad_records": c.corpus.max_bad_records}
    questions = training_sets.evaluation_questions(task.card, **how)
    examples = [one.example for one in tasks.ask(task, questions)[1]]
    judged = [Judged(q.id, q.question, q.answers, {q.gold_id: 1} if q.gold_id else {}) for q in questions]
    return task.name, judged, examples


def _measured(pipeline, name, judged, examples, k, tuned, folder, system) -> list[dict[str, float]]:
    found = list(pipeline.retrieved(f"judged-{name}", examples, k, tuned=tuned)[1])
    store = pipeline.store
    documents = [[store.document_id(int(row), passage) for row, passage in zip(member.rows_K, member.passages)] for member in found]
    if folder is not None and distributed.leads():
        scored = [list(zip(of_one, map(float, member.scores_K))) for of_one, member in zip(documents, found)]
        artifacts.write_whole(folder / f"{name}.{system}.run", "".join(retrieval.run_lines(judged, scored, system)))
    return [retrieval.measure(one, member, k, of_one) for one, member, of_one in zip(judged, found, documents)]


def _columns(rows: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """By measure; only those that every question has."""
    keys = [key for key in rows[0] if all(key in row for row in rows)]
    return {key: [row[key] for row in rows] for key in keys}


def _moved(judged: Sequence[Judged], before: Sequence[dict], after: Sequence[dict]) -> list[dict[str, Any]]:
    """The questions with another measure after R-ft, most improved first, most harmed last."""
    found = []
    for one, old, new in zip(judged, before, after):
        key = "answer mrr" if "answer mrr" in old else "gold mrr"
        if old != new:
            found.append({"id": one.id, "question": one.text, "moved": new.get(key, 0.0) - old.get(key, 0.0), "before": old, "after": new})
    return sorted(found, key=lambda row: -row["moved"])
