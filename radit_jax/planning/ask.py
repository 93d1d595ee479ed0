"""What launch/plan.py prints: the plan of a config, or the table of the paper's trainings on several slices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.planning import fit, report, topology
from radit_jax.planning.compiled import Cost
from radit_jax.planning.topology import Topology

PROGRAMS = ("embed", "search", "score", "lm_step", "lsr_step", "prefill", "decode")
GOALS = {"lm_ft": ("lm_step",), "lsr_ft": ("score", "lsr_step"), "radit": tuple(name for name in PROGRAMS if name != "search")}
WITH_ATTENTION = ("lm_step", "score", "prefill")  # the programs that attend over whole rows
REFERENCE = "reference"  # the attention without a kernel


def plan(
    c: ConfigDict,
    where: str | None,
    names: Sequence[str] | None,
    corpus: dict[str, int],
    *,
    attention: str,
    look: bool,
    full: bool,
    as_json: bool,
) -> None:
    """Prints the plan of every program. InputError for a topology or program that does not exist."""
    if where is None:
        raise InputError("which chips? (--topology=v5p:4x4x8)")
    slice_ = topology.parse(where)
    if c.goal not in GOALS:
        raise InputError(f"config.goal is {c.goal!r}, expected {', '.join(GOALS)}")
    names = tuple(names or GOALS[c.goal])
    for name in names:
        if name not in PROGRAMS:
            raise InputError(f"program {name!r}, expected some of {', '.join(PROGRAMS)}")
    results = [
        _planned(name, c, slice_, {"attention": kind, **corpus}, look=look, full=full)
        for name in names
        for kind in (("auto", REFERENCE) if attention == "both" and name in WITH_ATTENTION else (_one(attention),))
    ]
    if as_json:
        about = {"topology": slice_.name, "accelerator": slice_.accelerator, "chips": slice_.chips}
        print(json.dumps({**about, "programs": [_facts(*result) for result in results]}))
    else:
        print(report.text(slice_, [cost for cost, _ in results]))
        print("".join(f"\n{cost.name}: {advice['says']}" for cost, advice in results if advice))


def _one(attention: str) -> str:
    return "auto" if attention == "both" else attention


def _planned(
    name: str, c: ConfigDict, where: Topology, settings: dict[str, Any], *, look: bool, full: bool, elsewhere: bool = True
) -> tuple[Cost, dict[str, Any]]:
    """(the cost, advice): the configured plan, or with `look` the first that fits; what would fit where it does not (`elsewhere`)."""
    if look:
        fields, tried = fit.fitting(name, c, where, settings)
        if fields is not None:
            flags = " ".join(f"--config.{field}={value}" for field, value in fields.items())
            advice = {"fields": fields, "compiled": len(tried), "says": f"{flags} (laid out {len(tried)})"}
            return fit.plan(name, with_fields(c, fields), where, settings, full=True) if full else tried[-1], advice
        if not tried:
            raise InputError(f"{name}: no mesh of {where.name} divides the batch and the model of this config")
        cost, compiled = min(tried, key=lambda cost: cost.total), len(tried)
    else:
        cost, compiled = fit.plan(name, c, where, settings, full=full), 1
    if cost.fits or not elsewhere:
        return cost, {}
    larger, tried = fit.smallest(name, c, where, settings, cost)
    missing = f"{report.size(-cost.spare)} a chip missing on {where.name}"
    if larger is None:
        says = f"{missing}; no listed slice of {where.chip.name} holds it as configured"
        return cost, {"smallest": None, "compiled": compiled + len(tried), "says": f"{says} (laid out {compiled + len(tried)})"}
    mesh = f"--topology={larger.name} --config.mesh.data={tried[-1].data} --config.mesh.model={tried[-1].model}"
    says = f"{missing}; the smallest listed slice that holds it: {mesh} ({larger.chips} chips; laid out {compiled + len(tried)})"
    return cost, {"smallest": larger.name, "compiled": compiled + len(tried), "says": says, "there": tried[-1].to_dict()}


def _facts(cost: Cost, advice: dict[str, Any]) -> dict[str, Any]:
    return {**cost.to_dict(), "advice": advice or None}


# -- the table --------------------------------------------------------------------------------------------------------------------------

MODELS = {  # LM-ft of the paper's batch: rows of 2048 tokens in one update, and updates
    "LLaMA-7B": ("huggyllama/llama-7b", 64, 500),
    "LLaMA-13B": ("huggyllama/llama-13b", 128, 400),
    "LLaMA-65B": ("huggyllama/llama-65b", 128, 300),
    "Llama-3-8B": ("meta-llama/Meta-Llama-3-8B", 64, 500),
}
SLICES = ("v5e-64", "v5p-64", "v6e-64")
CORPUS = 399_000_000  # passages of the paper


def table(only: str, *, full: bool) -> None:
    """Prints the rows whose name contains `only` ("all": every one), each as soon as it is compiled."""
    print(report.markdown([]), flush=True)
    for name, work, c, where, settings in _rows():
        if only in ("all", "") or only.lower() in f"{name} {where.accelerator}".lower():
            cost, _ = _planned(work, c, where, settings, look=True, full=full, elsewhere=False)
            print(report.markdown([report.row(name, where, cost)]).splitlines()[-1], flush=True)


def _rows() -> Iterator[tuple[str, str, ConfigDict, Topology, dict[str, Any]]]:
    from configs import common

    for name, (checkpoint, rows, steps) in MODELS.items():
        c = common.llama_65b(common.base())
        c.lm.checkpoint, c.lm_ft.rows, c.lm_ft.accumulate, c.lm_ft.steps = checkpoint, rows, 1, steps
        for where in map(topology.parse, SLICES):
            yield name, "lm_step", c, where, {}
    search = common.dragon_plus(common.base())
    search.retriever.vector_dtype = "bfloat16"
    yield "search", "search", search, topology.parse("v5p-128"), {"corpus": CORPUS, "dim": 768}
