"""The paper's protocol: any of its tasks by any system of a workdir, an artifact each, and the table beside the paper's own rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from radit_jax import artifacts, distributed
from radit_jax.artifacts import Artifact
from radit_jax.asking import Asking, askings
from radit_jax.evaluation import evaluate, paper, report
from radit_jax.pipeline import Pipeline
from radit_jax.table import ROWS


def make(pipeline: Pipeline, names: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """Answers every task by every named row, and returns the table as data; it is also written to `workdir/tasks.json`.

    What is there already is not asked again.
    """
    prepared = askings(pipeline, [source.strip() for source in sources])
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:  # one LM after the other: one is held at a time
        for asking in prepared:
            if asking.task.retrieve or not ROWS[name][1]:  # without retrieval a tuned retriever changes nothing
                artifact = row(pipeline, asking, name)
                rows[name][asking.task.name] = json.loads((artifact.path / "row.json").read_text())
    shots = pipeline.config.tasks.shots
    value = {
        "rows": rows,
        "metrics": {asking.task.name: asking.task.metric for asking in prepared},
        "shots": shots,
        "paper": paper.rows(shots),
        "config": pipeline.config.to_dict(),
    }
    if distributed.leads():
        artifacts.write_json(pipeline.workdir / "tasks.json", value)
    return value


def text(value: dict[str, Any]) -> str:
    """The table as people read it."""
    return report.tasks(value["rows"], value["metrics"], value["paper"], shots=value["shots"])


def row(pipeline: Pipeline, asking: Asking, name: str) -> Artifact:
    """`row.json`, `per_question.json` and `answers.json` of a task by one system."""
    task = asking.task
    lm_tuned, retriever_tuned = ROWS[name]
    lm = pipeline.tuned_lm.fingerprint if lm_tuned else pipeline.inputs["lm.checkpoint"]
    made_from = {"name": name, "lm": lm, **asking.made_from(retriever_tuned)}

    def write(folder: Path) -> dict[str, Any]:
        ensemble = pipeline.ensemble(lm_tuned, max_new_tokens=task.max_new_tokens)
        records, per_question, facts = asking.answer(ensemble, retriever_tuned)
        evaluate.store(folder, name, records, per_question)
        return facts

    return pipeline.stage(f"task-{task.name}-{name.replace(' ', '_')}", made_from, write)
