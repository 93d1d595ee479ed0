"""The paper's protocol: any of its tasks by any system of a workdir, an artifact each, and the table beside the paper's own rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax import artifacts, distributed
from radit_jax.artifacts import Artifact
from radit_jax.data.prompts import background_prompt
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord
from radit_jax.data.training_sets import evaluation_questions
from radit_jax.errors import InputError
from radit_jax.evaluation import evaluate, paper, report, tasks
from radit_jax.evaluation.tasks import Asked, Task
from radit_jax.pipeline import ROWS, Pipeline, digest

DEPTH = 10  # passages looked at for recall@10, whatever the ensemble's k


def make(pipeline: Pipeline, names: Sequence[str], sources: Sequence[str]) -> dict[str, Any]:
    """Answers every task by every named row, and returns the table as data; it is also written to `workdir/tasks.json`.

    What is there already is not asked again.
    """
    chosen = [tasks.task_for(source.strip()) for source in sources]
    if twice := {task.name for task in chosen if sum(other.name == task.name for other in chosen) > 1}:
        raise InputError(f"the task {min(twice)} is named twice")
    prepared = [_Prepared(pipeline, task) for task in chosen]
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:  # one LM after the other: one is held at a time
        for one in prepared:
            if one.task.retrieve or not ROWS[name][1]:  # without retrieval a tuned retriever changes nothing
                artifact = one.row(name)
                rows[name][one.task.name] = json.loads((artifact.path / "row.json").read_text())
    shots = pipeline.config.tasks.shots
    value = {
        "rows": rows,
        "metrics": {one.task.name: one.task.metric for one in prepared},
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


class _Prepared:
    """One task as it is asked in this run: its questions, its in-context examples, and their passages when a row wants them."""

    def __init__(self, pipeline: Pipeline, task: Task):
        c = pipeline.config.tasks
        self.pipeline = pipeline
        questions = self._questions(task, c.split, None)
        self.shots: list[Question] = []
        if c.shots:
            apart = task.card.train_split is not None  # else the source is one file: its first drawn questions are not asked
            pool = self._questions(task, task.card.train_split, None) if apart else questions
            if len(pool) < c.shots + (not apart):
                raise InputError(f"{task.name}: {c.shots} in-context examples, but only {len(pool)} questions to take them from")
            drawn = np.random.default_rng(pipeline.config.seed).permutation(len(pool))[: c.shots]
            self.shots = [pool[int(n)] for n in drawn]
            if not apart:
                taken = {question.id for question in self.shots}
                questions = [question for question in questions if question.id not in taken]
        questions = questions[: c.limit or None]
        try:
            self.task, self.asked = tasks.ask(task, questions)
            _, self.asked_shots = tasks.ask(task, self.shots)
        except (BadRecord, ValueError) as problem:
            raise InputError(f"{task.name}: {problem}") from None

    def _questions(self, task: Task, split: str | None, limit: int | None) -> list[Question]:
        most = self.pipeline.config.corpus.max_bad_records
        split = split or task.card.evaluation_split if task.card.train_split is not None else None
        return evaluation_questions(task.card, split=split, limit=limit, max_bad_records=most)

    def row(self, name: str) -> Artifact:
        """`row.json`, `per_question.json` and `answers.json` of this task by one system."""
        pipeline, task = self.pipeline, self.task
        c, e = pipeline.config, pipeline.config.evaluate
        lm_tuned, retriever_tuned = ROWS[name]
        examples = [one.example for one in self.asked]
        wants = task.retrieve and retriever_tuned is not None
        found = pipeline.retrieved(f"task-{task.name}", examples, max(e.k, DEPTH), tuned=retriever_tuned) if wants else None
        before = self.before(retriever_tuned if wants else None)
        made_from = {
            "name": name,
            "task": [task.name, task.score, task.metric],
            "lm": pipeline.tuned_lm.fingerprint if lm_tuned else pipeline.inputs["lm.checkpoint"],
            "dtype": c.lm.dtype,
            "max_tokens": c.lm.max_tokens,
            "retrieved": found[0].fingerprint if found else None,
            "questions": digest([(a.example.id, a.example.prompt, a.example.background, a.choices, a.example.answers) for a in self.asked]),
            "before": before,
            "options": {"k": e.k, "level": e.level, "score_scale": c.retriever.score_scale, "max_new_tokens": task.max_new_tokens},
        }

        def write(folder: Path) -> dict[str, Any]:
            options = evaluate.EvaluateOptions(k=e.k, level=e.level, score_scale=c.retriever.score_scale, before=before)
            ensemble = pipeline.ensemble(lm_tuned, max_new_tokens=task.max_new_tokens)
            retrieved = None if found is None else list(found[1])
            records, per_question, facts = evaluate.run_task(task, self.asked, ensemble, retrieved, options)
            evaluate.store(folder, name, records, per_question)
            return facts

        return pipeline.stage(f"task-{task.name}-{name.replace(' ', '_')}", made_from, write)

    def before(self, retriever_tuned: bool | None) -> tuple[str, ...]:
        """The in-context examples as texts, each with its own first passage (paper section 3.1)."""
        if not self.asked_shots:
            return ()
        examples = [one.example for one in self.asked_shots]
        passages: list[str | None] = [example.background for example in examples]
        if retriever_tuned is not None:
            found = self.pipeline.retrieved(f"shots-{self.task.name}", examples, 1, tuned=retriever_tuned)[1]
            passages = [own or member.passages[0].content for own, member in zip(passages, found)]
        pairs = zip(self.asked_shots, passages)
        return tuple(f"{background_prompt(passage, _prompt(one))}{_target(one)}\n\n" for one, passage in pairs)


def _prompt(one: Asked) -> str:
    return one.choices[one.right][0] if one.choices else one.example.prompt


def _target(one: Asked) -> str:
    return one.choices[one.right][1] if one.choices else one.example.target
