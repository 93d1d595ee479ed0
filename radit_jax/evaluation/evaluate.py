"""Who answered how well: one system (LM, retrieval or none) over one set of questions, in free text or by choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax import artifacts, distributed, progress
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics
from radit_jax.evaluation.tasks import NO_QUESTION, Asked, Task
from radit_jax.inference.ensemble import Answer, Ensemble, Prompted, passage_logweights
from radit_jax.types import Example, Retrieved

LEVELS = ("sequence", "token", "concat")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """How questions are answered."""

    k: int = 10  # passages in the ensemble (paper: 10)
    level: str = "sequence"  # "sequence" as in the paper, "token": the mixture at every step, "concat": k passages in one prompt
    score_scale: float = 1.0  # of the retriever, as in training
    before: tuple[str, ...] = ()  # in-context examples, in front of every prompt

    def __post_init__(self):
        if self.level not in LEVELS:
            raise InputError(f"evaluate.level is {self.level!r}, expected {', '.join(LEVELS)}")


def read_of(example: Example) -> tuple[Any, ...]:
    """What of a question changes its answers, or how they and its passages are measured: for fingerprints."""
    return example.id, example.prompt, example.background, example.answers, example.gold_id


def prompts(ensemble: Ensemble, example: Example, prompt: str, retrieved: Retrieved | None, options: EvaluateOptions) -> Prompted:
    """The prompts of a question: after its own text, or one after each of k passages (one after all for "concat"), or closed book."""
    backgrounds: list[str | None] = [example.background]
    logw_K = np.zeros(1, np.float32)
    if example.background is None and retrieved is not None:
        passages = retrieved.passages[: options.k]
        if len(passages) < options.k:
            raise InputError(f"evaluate.k is {options.k}, but only {len(passages)} passages were retrieved for {example.id}")
        backgrounds = [passage.content for passage in passages]
        if options.level == "concat":
            backgrounds = ["\n".join(backgrounds)]
        else:
            logw_K = passage_logweights(retrieved.scores_K[: options.k], options.score_scale)
    return ensemble.prompted(example.id, prompt, backgrounds, logw_K, before=options.before)


def answer_all(
    name: str, ensemble: Ensemble, examples: Sequence[Example], retrieved: Sequence[Retrieved] | None, options: EvaluateOptions
) -> tuple[list[Answer], dict[str, float]]:
    """Free-text answers with k passages each (Eq. 2), or closed book when `retrieved` is None; also the rate."""
    found = retrieved if retrieved is not None else [None] * len(examples)
    prompted = [prompts(ensemble, example, example.prompt, of_example, options) for example, of_example in zip(examples, found)]
    level = "sequence" if options.level == "concat" else options.level
    with progress.bar(f"evaluate {name}", len(prompted), unit="questions") as advance:
        answers = ensemble.generate(prompted, level=level, advance=advance)
    return answers, {"questions_per_s": round(advance.rate, 2), **ensemble.facts(), "seconds": round(advance.elapsed, 1)}


def judge(examples: Sequence[Example], answers: Sequence[Answer], retrieved: Sequence[Retrieved] | None) -> dict[str, list[float]]:
    """Per-question metrics: exact match, F1, and (with retrieval) answer recall@1/5/10 and MRR."""
    rows: list[dict[str, float]] = []
    for i, (example, answer) in enumerate(zip(examples, answers)):
        row = {"em": metrics.exact_match(answer.text, example.answers), "f1": metrics.f1(answer.text, example.answers)}
        if retrieved is not None:
            row |= metrics.retrieval_metrics(metrics.first_right(retrieved[i].passages, example))
        rows.append(row)
    return {key: [row[key] for row in rows] for key in rows[0]}


# -- tasks ------------------------------------------------------------------------------------------------------------------------------


def run_task(
    task: Task, asked: Sequence[Asked], ensemble: Ensemble, retrieved: Sequence[Retrieved] | None, options: EvaluateOptions
) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, float]]:
    """(a record of every question, per-question metrics, the rate)."""
    if task.is_choice:
        return _choose(task, asked, ensemble, retrieved, options)
    examples = [one.example for one in asked]
    answers, facts = answer_all(task.name, ensemble, examples, retrieved, options)
    per_question = judge(examples, answers, retrieved)
    if task.metric == "rouge_l":
        per_question["rouge_l"] = metrics.rouge_l([answer.text for answer in answers], [example.answers for example in examples])
    return answered(examples, answers), per_question, facts


def record(example: Example) -> dict[str, Any]:
    """What is stored of a question."""
    return {"id": example.id, "question": example.query, "answers": list(example.answers)}


def answered(examples: Sequence[Example], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The records of questions with their free-text answers, and what the LM said from each passage alone (not at token level)."""
    return [
        record(example) | {"answer": answer.text, "logprob": answer.logprob, **_own(answer)} for example, answer in zip(examples, answers)
    ]


def _own(answer: Answer) -> dict[str, Any]:
    return {"own_texts": list(answer.own_texts), "own_logprobs": list(answer.own_logprobs)} if answer.own_texts else {}


def _choose(task, asked, ensemble, retrieved, options) -> tuple[list[dict[str, Any]], dict[str, list[float]], dict[str, float]]:
    with progress.bar(f"evaluate {task.name}", len(asked), unit="questions") as advance:
        logp = choice_logprobs(ensemble, asked, retrieved, options, advance=advance)
    chosen = [int(np.argmax(score_C)) for score_C in _scores(task.score, ensemble, asked, logp)]
    records = [
        record(one.example)
        | {"chosen": at, "right": one.right, "choices": [target for _, target in one.choices], "logprobs": [float(x) for x in logp_C]}
        for one, at, logp_C in zip(asked, chosen, logp)
    ]
    facts = {"questions_per_s": round(advance.rate, 2), **ensemble.facts(), "seconds": round(advance.elapsed, 1)}
    return records, {"acc": [float(at == one.right) for at, one in zip(chosen, asked)]}, facts


def choice_logprobs(
    ensemble: Ensemble,
    asked: Sequence[Asked],
    retrieved: Sequence[Retrieved] | None,
    options: EvaluateOptions,
    *,
    advance=lambda n: None,
) -> list[np.ndarray]:
    """log p(choice) of every choice of every question, by Eq. 2 over its passages; the end of the answer is not part of it.

    Choices that share a prompt are scored side by side, others each after its own.
    """
    prompted, listed, owners = [], [], []
    for i, one in enumerate(asked):
        for prompt, targets in _by_prompt(one):
            prompted.append(prompts(ensemble, one.example, prompt, None if retrieved is None else retrieved[i], options))
            listed.append([ensemble.maker.target_ids(target) for target in targets])
            owners.append(i)
    found: list[list[np.ndarray]] = [[] for _ in asked]
    for i, logp_C in zip(owners, ensemble.choose(prompted, listed, advance=advance)):
        found[i].append(logp_C)
    return [np.concatenate(parts) for parts in found]


def _by_prompt(one: Asked) -> Iterator[tuple[str, list[str]]]:
    """(prompt, targets of the choices after it), in the order of the choices."""
    if len({prompt for prompt, _ in one.choices}) == 1:
        yield one.choices[0][0], [target for _, target in one.choices]
    else:
        yield from ((prompt, [target]) for prompt, target in one.choices)


def _scores(score: str, ensemble: Ensemble, asked: Sequence[Asked], logp: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The scores by which the choices of each question compare (SPEC section 5)."""
    if score == "nll_compl":
        return [logp_C - prior_C for logp_C, prior_C in zip(logp, _priors(ensemble, asked))]
    lengths = {
        "nll": lambda target: 1,
        "nll_char": lambda target: len(target.strip()),
        "nll_token": lambda target: len(ensemble.maker.target_ids(target)),
    }
    return [logp_C / [lengths[score](target) for _, target in one.choices] for one, logp_C in zip(asked, logp)]


def _priors(ensemble: Ensemble, asked: Sequence[Asked]) -> list[np.ndarray]:
    """log p(choice | "Answer:") of every choice, each distinct one scored once."""
    targets = list(dict.fromkeys(target for one in asked for _, target in one.choices))
    prompted = [ensemble.prompted(target, NO_QUESTION, [None], np.zeros(1, np.float32)) for target in targets]
    found = ensemble.choose(prompted, [[ensemble.maker.target_ids(target)] for target in targets])
    logp = {target: float(logp_1[0]) for target, logp_1 in zip(targets, found)}
    return [np.asarray([logp[target] for _, target in one.choices], np.float32) for one in asked]


# -- what is kept -----------------------------------------------------------------------------------------------------------------------


def write_row(
    folder: Path, name: str, examples: Sequence[Example], answers: Sequence[Answer], retrieved: Sequence[Retrieved] | None
) -> dict[str, Any]:
    """Stores a row of the table: `row.json` (name, n, metrics), `per_question.json` and `answers.json`; returns the row."""
    return store(folder, name, answered(examples, answers), judge(examples, answers, retrieved))


def store(folder: Path, name: str, records: list[dict[str, Any]], per_question: dict[str, list[float]]) -> dict[str, Any]:
    """Of several processes the leader writes."""
    row = {"name": name, "n": len(records), "metrics": metrics.summarize(per_question)}
    if distributed.leads():
        for file, value in (("row.json", row), ("per_question.json", per_question), ("answers.json", records)):
            artifacts.write_json(folder / file, value)
    return row
