"""A task as it is asked over the corpus of a pipeline: its questions, its in-context examples, and the passages of both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from radit_jax.artifacts import Artifact, digest
from radit_jax.data.prompts import background_prompt
from radit_jax.data.questions import Question
from radit_jax.data.training_sets import evaluation_questions
from radit_jax.errors import InputError
from radit_jax.evaluation import evaluate, tasks
from radit_jax.evaluation.tasks import Task
from radit_jax.inference.ensemble import Ensemble
from radit_jax.inputs import twice
from radit_jax.retrieval.retrieve import Retrieval

if TYPE_CHECKING:
    from radit_jax.pipeline import Pipeline


def askings(pipeline: Pipeline, sources: Sequence[str]) -> list[Asking]:
    """The tasks of these names. InputError where two have one name."""
    chosen = [tasks.task_for(source) for source in sources]
    if repeated := twice(task.name for task in chosen):
        raise InputError(f"the task {repeated[0]} is named twice")
    return [Asking(pipeline, task) for task in chosen]


class Asking:
    """One task with the settings of config.tasks and config.evaluate."""

    def __init__(self, pipeline: Pipeline, task: Task):
        c = pipeline.config.tasks
        self.pipeline = pipeline
        questions = self._questions(task, c.split)
        shots: list[Question] = []
        if c.shots:
            apart = task.card.train_split is not None  # else the source is one file: what is drawn from it is not asked
            pool = self._questions(task, task.card.train_split) if apart else questions
            if len(pool) < c.shots + (not apart):
                raise InputError(f"{task.name}: {c.shots} in-context examples, but only {len(pool)} questions to take them from")
            drawn = np.random.default_rng(pipeline.config.seed).permutation(len(pool))[: c.shots]
            shots = [pool[int(n)] for n in drawn]
            if not apart:
                taken = {question.id for question in shots}
                questions = [question for question in questions if question.id not in taken]
        self.task, self.asked = tasks.ask(task, questions[: c.limit or None])
        _, self.asked_shots = tasks.ask(task, shots)
        self.examples = [one.example for one in self.asked]

    def retrieved(self, tuned: bool | None) -> tuple[Artifact, Retrieval] | None:
        """The passages by the untuned or the tuned query encoder; None without retrieval, and for a task that has none."""
        if tuned is None or not self.task.retrieve:
            return None
        depth = self.pipeline.depth(self.pipeline.config.evaluate.k)
        return self.pipeline.retrieved(f"task-{self.task.name}", self.examples, depth, tuned=tuned)

    def options(self, tuned: bool | None) -> evaluate.EvaluateOptions:
        c = self.pipeline.config
        how = {"k": c.evaluate.k, "level": c.evaluate.level, "score_scale": c.retriever.score_scale}
        return evaluate.EvaluateOptions(**how, before=self._before(tuned if self.task.retrieve else None))

    def answer(self, ensemble: Ensemble, tuned: bool | None) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, float]]:
        """(a record of every question, per-question metrics, the rate) by one LM and one retriever."""
        found = self.retrieved(tuned)
        return evaluate.run_task(self.task, self.asked, ensemble, None if found is None else list(found[1]), self.options(tuned))

    def made_from(self, tuned: bool | None) -> dict[str, Any]:
        """What the answers of a given LM hang on, for fingerprints: questions, passages, options. Passages are found now."""
        c, task, options, found = self.pipeline.config, self.task, self.options(tuned), self.retrieved(tuned)
        return {
            "task": [task.name, task.score, task.metric],
            "dtype": c.lm.dtype,
            "max_tokens": c.lm.max_tokens,
            "retrieved": found[0].fingerprint if found else None,
            "questions": digest([(*evaluate.read_of(one.example), one.choices) for one in self.asked]),
            "before": options.before,
            "options": {"k": options.k, "level": options.level, "score_scale": options.score_scale, "max_new_tokens": task.max_new_tokens},
        }

    def _questions(self, task: Task, split: str) -> list[Question]:
        most = self.pipeline.config.corpus.max_bad_records
        return evaluation_questions(task.card, split=task.card.split_of(split), max_bad_records=most)

    def _before(self, tuned: bool | None) -> tuple[str, ...]:
        """The in-context examples as texts, each with its own first passage (SPEC section 5)."""
        if not self.asked_shots:
            return ()
        examples = [one.example for one in self.asked_shots]
        passages: list[str | None] = [example.background for example in examples]
        if tuned is not None:
            found = self.pipeline.retrieved(f"shots-{self.task.name}", examples, 1, tuned=tuned)[1]
            passages = [own or member.passages[0].content for own, member in zip(passages, found)]
        parts = (one.choices[one.right] if one.choices else (one.example.prompt, one.example.target) for one in self.asked_shots)
        return tuple(f"{background_prompt(passage, prompt)}{target}\n\n" for passage, (prompt, target) in zip(passages, parts))
