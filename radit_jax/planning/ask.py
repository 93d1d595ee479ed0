"""What launch/plan.py prints: the plan of a config, or the table of the paper's trainings on several slices."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from radit_jax.errors import InputError
from radit_jax.models.flash import REFERENCE
from radit_jax.planning import fit, programs, report, topology
from radit_jax.planning.compiled import Cost
from radit_jax.planning.programs import Settings
from radit_jax.planning.topology import Topology

WITH_ATTENTION = ("lm_step", "score")  # the programs that attend over whole rows


def plan(
    c: ConfigDict, where: str | None, names: Sequence[str] | None, corpus: dict[str, int], *, attention: str, fit: bool, as_json: bool
) -> None:
    """Prints the plan of every program. InputError for a topology or program that does not exist."""
    if where is None:
        raise InputError("which chips? (--topology=v5p:4x4x8)")
    slice_ = topology.parse(where)
    names = tuple(names or programs.of_goal(c.goal))
    for name in names:
        if name not in programs.BUILDERS:
            raise InputError(f"program {name!r}, expected some of {', '.join(programs.BUILDERS)}")
    results = [
        _planned(name, c, slice_, Settings(kind, **corpus), look=fit)
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


def _planned(name: str, c: ConfigDict, where: Topology, settings: Settings, *, look: bool) -> tuple[Cost, dict[str, Any]]:
    """(the cost, advice): the configured plan, or with `look` the first that fits; what would fit where it does not."""
    if look:
        fields, tried = fit.fitting(name, c, where, settings)
        if fields is not None:
            flags = " ".join(f"--config.{field}={value}" for field, value in fields.items())
            return tried[-1], {"fields": fields, "compiled": len(tried), "says": f"{flags} (compiled {len(tried)})"}
        if not tried:
            raise InputError(f"{name}: no mesh of {where.name} divides the batch and the model of this config")
        cost, compiled = min(tried, key=lambda cost: cost.total), len(tried)
    else:
        cost, compiled = fit.plan(name, c, where, settings), 1
    if cost.fits:
        return cost, {}
    larger, tried = fit.smallest(name, c, where, settings, cost)
    missing = f"{report.size(-cost.spare)} a chip missing on {where.name}"
    if larger is None:
        says = f"{missing}; no listed slice of {where.chip.name} holds it as configured"
        return cost, {"smallest": None, "compiled": compiled + len(tried), "says": f"{says} (compiled {compiled + len(tried)})"}
    mesh = f"--topology={larger.name} --config.mesh.data={tried[-1].data} --config.mesh.model={tried[-1].model}"
    says = f"{missing}; the smallest listed slice that holds it: {mesh} ({larger.chips} chips; compiled {compiled + len(tried)})"
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


def table(only: str) -> None:
    """Prints the rows whose name contains `only` ("all": every one), each as soon as it is compiled."""
    print(report.markdown([]), flush=True)
    for name, work, c, where, settings in _rows():
        if only in ("all", "") or only.lower() in f"{name} {where.accelerator}".lower():
            cost, _ = _fitted(work, c, where, settings)
            print(report.markdown([report.row(name, where, cost)]).splitlines()[-1], flush=True)


def _fitted(work: str, c: ConfigDict, where: Topology, settings: Settings) -> tuple[Cost, list[Cost]]:
    """The first mesh and micro-batch that fit; where none does, the leanest that was tried."""
    _, tried = fit.fitting(work, c, where, settings)
    return (tried[-1] if tried[-1].fits else min(tried, key=lambda cost: cost.total)), tried


def _rows() -> Iterator[tuple[str, str, ConfigDict, Topology, Settings]]:
    from configs import common

    for name, (checkpoint, rows, steps) in MODELS.items():
        c = common.llama_65b(common.base())
        c.lm.checkpoint, c.lm_ft.rows, c.lm_ft.accumulate, c.lm_ft.steps = checkpoint, rows, 1, steps
        for where in map(topology.parse, SLICES):
            yield name, "lm_step", c, where, Settings()
    search = common.dragon_plus(common.base())
    yield "search", "search", search, topology.parse("v5p-128"), Settings(corpus=CORPUS, dim=768)
