"""The paper's tables at the scale of a config (launch/reproduce.py): systems, numbers of passages, seeds, and its ablations.

A part is a question; its cells are (variant of the config, system, k). All cells of all parts are artifacts of one workdir, so that what
two parts share is made once and a stopped sweep goes on. An LM or encoder that is trained is trained once a seed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax import artifacts, distributed, trainings
from radit_jax.errors import InputError
from radit_jax.evaluation import figures, metrics, report
from radit_jax.inputs import with_fields
from radit_jax.logbook import say
from radit_jax.pipeline import Pipeline
from radit_jax.table import ROWS, System, row

SYSTEMS: Mapping[str, System] = {**ROWS, "LM-ft, no retrieval": (True, None)}
# Retrievers alone, asked the training questions: tuned? Each question by a query encoder that has not seen it (cross-validation).
RETRIEVERS = {"untuned retriever": False, "R-ft": True}
GAIN = ": R-ft − untuned retriever"
FOLDS = 3
# What is compared within a variant: (after, before).
PAIRS = (
    ("R-ft only", "neither tuned"),
    ("LM-ft only", "neither tuned"),
    ("both", "LM-ft only"),
    ("both", "neither tuned"),
    ("R-ft", "untuned retriever"),
)
FILE = "reproduction.json"


@dataclasses.dataclass(frozen=True)
class Part:
    """One table: `variants` are names with changes of the config's fields; ks () is config.evaluate.k alone."""

    about: str
    variants: Mapping[str, Mapping[str, Any]]
    systems: Sequence[str]
    ks: Sequence[int] = ()


_QUERY = {"lsr_ft.encoders": "query"}  # where many trainings are compared: a minute each, not a quarter of an hour
_BOTH = {"lsr_ft.encoders": "both"}
_LIKELIHOOD = {**_QUERY, "lsr_ft.prior": 0.0}
_EQ4 = {**_LIKELIHOOD, "lsr_ft.optimizer.peak_lr": 1e-5}
_ALL = {"lm_ft.lora.rank": 0, "lm_ft.optimizer.peak_lr": 1e-4}
_LORA = {"lm_ft.lora.rank": 16, "lm_ft.optimizer.peak_lr": 1e-3}
_COMPLETION = {**_QUERY, "lsr_ft.completion_examples": 1_500, "lsr_ft.completion_tokens": 20, "lsr_ft.completion_min_tokens": 32}
PARTS: Mapping[str, Part] = {
    "dual": Part("the dual ablation", {"": {}}, tuple(ROWS), (1, 3, 5, 10)),
    "recipe": Part("the dual ablation at evaluate.k", {"": {}}, tuple(ROWS)),
    "folds": Part("R-ft on questions that it has not seen", {"": {}}, tuple(RETRIEVERS)),
    "instruction": Part(
        "tuning without passages (IT) against tuning with them (RA-IT)",
        {"IT": {"lm_ft.passages": 0}, "RA-IT": {}},
        ("LM-ft, no retrieval", "LM-ft only"),
        (1, 3, 10),
    ),
    "passages": Part("training instances per example, k~", {f"k~ = {n}": {"lm_ft.passages": n} for n in (1, 3, 5)}, ("LM-ft only",)),
    "ensemble": Part(
        "how passages come together",
        {level: {"evaluate.level": level} for level in ("sequence", "token", "concat")},
        ("neither tuned", "both"),
    ),
    "data": Part(
        "what R-ft is trained on, and which encoder",
        {
            "questions": _QUERY,
            "95 % completion": {**_COMPLETION, "lsr_ft.completion_share": 0.95, "lsr_ft.epochs": 1},
            "completion alone": {**_COMPLETION, "lsr_ft.completion_share": 1.0},
            "questions, both encoders": _BOTH,
        },
        tuple(RETRIEVERS),
    ),
    "encoders": Part(
        "the dual ablation by the encoders that R-ft trains",
        {"query encoder": _QUERY, "both encoders": _BOTH},
        ("LM-ft only", "both"),
        (1, 3, 5),
    ),
    "target": Part(
        "what R-ft learns from",
        {
            "posterior": _QUERY,
            "prob, τ = 0.01, KL(p_R ‖ target)": {
                **_EQ4, "lsr_ft.score": "prob", "lsr_ft.tau": 0.01, "lsr_ft.direction": "retriever_first",
            },
            "prob, τ = 0.1, KL(p_R ‖ target)": {
                **_EQ4, "lsr_ft.score": "prob", "lsr_ft.tau": 0.1, "lsr_ft.direction": "retriever_first",
            },
            "log-prob, τ = 1, KL(p_R ‖ target)": {**_EQ4, "lsr_ft.direction": "retriever_first"},
            "log-prob, τ = 1, KL(target ‖ p_R)": _EQ4,
            "log-prob, τ = 1, KL(target ‖ p_R), at 2e-5": _LIKELIHOOD,  # the posterior but for its prior
            "log-prob, τ = 1, KL(target ‖ p_R) + KL(p_R ‖ untuned)": {**_EQ4, "lsr_ft.anchor": 1.0},
            "mean log-prob, τ = 0.1, KL(target ‖ p_R)": {**_EQ4, "lsr_ft.score": "mean_logprob", "lsr_ft.tau": 0.1},
            "posterior of the tuned LM": {**_QUERY, "lsr_ft.scorer": "tuned"},
            "posterior, scores × 10": {**_QUERY, "retriever.score_scale": 10.0},
            "posterior, scores × 40": {**_QUERY, "retriever.score_scale": 40.0},
        },
        tuple(RETRIEVERS),
    ),
    "length": Part(
        "how long LM-ft goes on, and how fast",
        {
            "340 steps": {},
            "900 steps": {"lm_ft.steps": 900},
            "all weights, 340 steps": _ALL,
            "all weights, 900 steps": {**_ALL, "lm_ft.steps": 900},
            "all weights, 340 steps at 3e-4": {**_ALL, "lm_ft.optimizer.peak_lr": 3e-4},
            "all weights, 340 steps at 3e-5": {**_ALL, "lm_ft.optimizer.peak_lr": 3e-5},
        },
        ("LM-ft only",),
    ),
    "adapters": Part(
        "which weights LM-ft trains",
        {
            "all": _ALL,
            "LoRA, rank 16 on q and v": _LORA,
            "LoRA, rank 16 on every map": {**_LORA, "lm_ft.lora.targets": ".*"},
            "QLoRA (nf4), rank 16 on q and v": {**_LORA, "lm_ft.lora.quantize": "nf4"},
        },
        ("LM-ft only",),
    ),
}  # fmt: skip
COLUMNS = (*report.COLUMNS, "mrr")
COMPARED = ("em", "recall@1", "mrr")


def make(base: Pipeline, parts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Makes (or opens) all cells of the parts, and returns them as data, which `workdir/reproduction.json` gets after every variant.

    The workdir stays that of `base`: a script that opens it without a config asks the recipe, not the last variant.
    """
    if unknown := [name for name in parts if name not in PARTS]:
        raise InputError(f"--parts names {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    cells: list[dict[str, Any]] = []
    value: dict[str, Any] = {"cells": cells, "seconds": {}, "config": base.config.to_dict()}
    for name, seed in itertools.product(parts, seeds):
        for variant, changes in PARTS[name].variants.items():
            pipeline = base.variant({"seed": seed, **changes})
            cells += _cells(pipeline, name, variant, seed)
            value["seconds"].setdefault(f"{name}{', ' * bool(variant)}{variant}", {})[seed] = pipeline.seconds
            if distributed.leads():
                artifacts.write_json(base.workdir / FILE, value)
    return value


def _cells(pipeline: Pipeline, part: str, variant: str, seed: int) -> Iterator[dict[str, Any]]:
    """The cells of one variant, the untuned LM's first: one LM is held at a time."""
    c = pipeline.config.evaluate
    systems = PARTS[part].systems
    for system in sorted(systems, key=lambda system: system in SYSTEMS and SYSTEMS[system][0]):
        if system in RETRIEVERS:
            yield _cell(part, variant, system, 0, seed, _unseen(pipeline, RETRIEVERS[system]))
            continue
        closed = SYSTEMS[system][1] is None
        for k in (c.k,) if closed else PARTS[part].ks or (c.k,):
            folder = row(pipeline, system, SYSTEMS[system], with_fields(c, {"k": k})).path
            yield _cell(part, variant, system, 0 if closed else k, seed, json.loads((folder / "per_question.json").read_text()))


def _cell(part: str, variant: str, system: str, k: int, seed: int, per_question: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    means = {name: round(100 * float(np.mean(values)), 1) for name, values in per_question.items()}
    say(f"{part} {variant} seed {seed}: {system}{f', k = {k}' * bool(k)}: {means}")
    return {"part": part, "variant": variant, "system": system, "k": k, "seed": seed, "per_question": per_question}


def _unseen(pipeline: Pipeline, tuned: bool) -> dict[str, list[float]]:
    """Recall and MRR of all questions of R-ft, a fold after the other, each by a query encoder that was trained on the other folds."""
    found: list[dict[str, float]] = []
    for fold in range(1, FOLDS + 1):
        of_fold = pipeline.variant({"lsr_ft.fold": f"{fold}/{FOLDS}"})
        _, retrieval = of_fold.retrieved("unseen", trainings.unseen(of_fold), of_fold.depth(), tuned)
        found += [metrics.retrieval_metrics(metrics.first_right(member.passages, member.example)) for member in retrieval]
    return {name: [row[name] for row in found] for name in found[0]}


# -- tables -----------------------------------------------------------------------------------------------------------------------------


def text(value: Mapping[str, Any]) -> str:
    """Every part as a table: means over questions and seeds, intervals over questions, and how far the seeds lie apart.

    Then the differences, the mean of the seeds first and each seed's after it.
    """
    return "\n\n".join(_table(part, cells) for part, cells in _by_part(value).items())


def _by_part(value: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in value["cells"]:
        found.setdefault(cell["part"], []).append(cell)
    return found


def _table(part: str, cells: Sequence[Mapping[str, Any]]) -> str:
    columns = [column for column in COLUMNS if any(column in cell["per_question"] for cell in cells)]
    by_seed = columns[0]
    rows = [("variant", "system", "k", *columns, f"{by_seed} by seed")]
    for (variant, system, k), of_cell in grouped(cells).items():
        if system == "untuned retriever" and variant != cells[0]["variant"]:
            continue  # the same in every variant
        shown = [report.cell(summary(of_cell, metric)) for metric in columns]
        seeds = " / ".join(f"{100 * np.mean(cell['per_question'][by_seed]):.1f}" for cell in of_cell)
        rows.append((variant or "–", system, str(k) if k else "–", *shown, seeds))
    lines = [f"{part}: {PARTS[part].about}", report.markdown(rows)]
    for name, found in differences(cells).items():
        lines.append(f"{name}: {report.signed(found)}" + "".join(f"; {report.signed(of_seed)}" for of_seed in found["by_seed"]))
    return "\n".join(lines)


def draw(value: Mapping[str, Any], folder: Path) -> None:
    """Every part as a figure: exact match by k and system (`PART.svg`), or what differs from what (`PART.svg`)."""
    for part, cells in _by_part(value).items():
        title, by_cell = f"{part}: {PARTS[part].about}", grouped(cells)
        if PARTS[part].ks:
            figures.by_k(_lines(by_cell), folder / f"{part}.svg", title=title, y="exact match, %")
            continue
        metric = "em" if "em" in cells[0]["per_question"] else "recall@1"
        found = {name.replace(f", {metric}", ""): found for name, found in differences(cells).items() if f", {metric}" in name}
        if metric != "em":  # retrievers alone: what each variant gains
            found = {name.removesuffix(GAIN): found for name, found in found.items() if name.endswith(GAIN)}
        if found:
            figures.differences(found, folder / f"{part}.svg", title=title, x=f"{metric}, points{', R-ft − untuned' * (metric != 'em')}")


def _lines(by_cell: Mapping[tuple[str, str, int], list[Mapping[str, Any]]]) -> dict[str, dict[int, Any]]:
    """{"system, variant": {k: its exact match}}; a system that is the same in all variants is there once, without one."""
    found: dict[str, dict[str, dict[int, Any]]] = {}
    for (variant, system, k), of_cell in by_cell.items():
        found.setdefault(system, {}).setdefault(variant, {})[k] = summary(of_cell, "em")
    lines: dict[str, dict[int, Any]] = {}
    for system, of_variants in found.items():
        same = all(points == next(iter(of_variants.values())) for points in of_variants.values())
        lines |= {system if same else f"{system}, {variant}": points for variant, points in of_variants.items()}
    return lines


def grouped(cells: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, int], list[Mapping[str, Any]]]:
    """{(variant, system, k): its cells, one a seed}."""
    found: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["variant"], cell["system"], cell["k"]), []).append(cell)
    return found


def summary(cells: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any] | None:
    """Mean and 95 % bootstrap interval over questions of a metric, each question's being its mean over seeds."""
    if metric not in cells[0]["per_question"]:
        return None
    return metrics.summarize({metric: _by_question(cells, metric)})[metric]


def differences(cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Paired differences of COMPARED at every k: PAIRS within a variant, and every variant beside the first.

    {"mean", "ci95", "by_seed": the same of each}; what differs in no question is left out.
    """
    found, by_cell = {}, grouped(cells)
    variants = list(dict.fromkeys(variant for variant, _, _ in by_cell))
    systems = dict.fromkeys(system for _, system, _ in by_cell)
    compared = {f"{variant}: " * bool(variant) + f"{a} − {b}": ((variant, a), (variant, b)) for variant in variants for a, b in PAIRS}
    between = itertools.product(variants[1:], systems)
    compared |= {f"{variant} − {variants[0]}: {system}": ((variant, system), (variants[0], system)) for variant, system in between}
    ks = sorted({k for _, _, k in by_cell})
    for (name, (after, before)), metric, k in itertools.product(compared.items(), COMPARED, ks):
        pair = [by_cell.get((*one, k)) for one in (after, before)]
        if not all(pair) or any(metric not in cells[0]["per_question"] for cells in pair) or (metric != "em" and k != ks[-1]):
            continue  # ranks hang on no k
        mean = metrics.paired_difference(*(_by_question(of_cell, metric) for of_cell in pair))
        if any(mean["ci95"]):
            by_seed = [metrics.paired_difference(*(cell["per_question"][metric] for cell in of_seed)) for of_seed in zip(*pair)]
            found[f"{name}, {metric}{f' at k = {k}' * (metric == 'em')}"] = {**mean, "by_seed": by_seed}
    return found


def _by_question(cells: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    return np.mean([cell["per_question"][metric] for cell in cells], axis=0).tolist()
