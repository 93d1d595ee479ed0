"""Looking for what fits, by compiling: a mesh and micro-batches for this slice, or the smallest slice that holds the program.

The compiler only lays the programs out, which takes it seconds. The search goes from what is fastest to what is leanest, and stops at the
first that fits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.planning import compiled, compiler
from radit_jax.planning.compiled import Cost
from radit_jax.planning.topology import Topology

MOST = 12  # compilations of one search
STEPS = ("lm_step", "lsr_step")  # their gradients are as large as the parameters: a third of the state that AdamW keeps


def plan(name: str, c: ConfigDict, where: Topology, settings: dict[str, Any], *, full: bool = False) -> Cost:
    """The cost of one program as configured, on the mesh that the config says; with `full`, code is generated for it too."""
    request = {"name": name, "config": c.to_dict(), "topology": where.name, "settings": settings}
    return compiled.cost(name, where, compiler.compile_for(request, full=full))


def fitting(name: str, c: ConfigDict, where: Topology, settings: dict[str, Any]) -> tuple[dict[str, int] | None, list[Cost]]:
    """(the fields of the config that make the program fit, everything compiled on the way); None if nothing fitted.

    Of an LM step the batch of an update stays what it is: fewer rows in a micro-batch are more micro-batches.
    """
    tried = []
    for fields in _choices(name, c, where):
        if len(tried) == MOST:
            break
        try:
            cost = plan(name, with_fields(c, fields), where, settings)
        except InputError:  # a mesh that does not divide the heads
            continue
        tried.append(cost)
        if cost.fits:
            return fields, tried
        if least(cost) > cost.hbm:  # on any mesh
            break
    return None, tried


def least(cost: Cost) -> float:
    """Bytes below which no mesh and no micro-batch brings a program: its share of the arguments, and of the gradients."""
    return cost.arguments * (4 / 3 if cost.name in STEPS else 1)


def smallest(name: str, c: ConfigDict, where: Topology, settings: dict[str, Any], missing: Cost) -> tuple[Topology | None, list[Cost]]:
    """(the smallest listed slice of the same chip that holds the program, everything compiled on the way), above `where`.

    The model axis grows where there are more chips than rows. Slices whose share of the arguments alone is too much are passed over.
    """
    tried = []
    for larger in where.listed():
        if larger.chips <= where.chips or least(missing) * where.chips / larger.chips > where.chip.hbm:
            continue
        for model in _axis_sizes(larger, c.mesh.model):
            try:
                cost = plan(name, with_fields(c, {"mesh.data": -1, "mesh.model": model}), larger, settings)
            except InputError:
                continue
            tried.append(cost)
            if cost.fits:
                return larger, tried
            break  # a longer model axis is for --fit
    return None, tried


def _choices(name: str, c: ConfigDict, where: Topology) -> Iterator[dict[str, int]]:
    """Fields to try. Memory falls with the model axis and with more micro-batches, and both mean more traffic: the least of both first."""
    rows, accumulate = c.lm_ft.rows * c.lm_ft.accumulate, c.lm_ft.accumulate
    micro = [m for m in range(accumulate, rows + 1) if rows % m == 0] if name == "lm_step" else [1]
    for m, model in sorted(itertools.product(micro, _axis_sizes(where, 1)), key=lambda pair: (math.prod(pair), pair[1])):
        fields = {"mesh.data": where.chips // model, "mesh.model": model}
        if name != "lm_step":
            yield fields
        elif rows // m % fields["mesh.data"] == 0:
            yield {**fields, "lm_ft.rows": rows // m, "lm_ft.accumulate": m}


def _axis_sizes(where: Topology, least: int) -> list[int]:
    return [size for size in range(least, where.chips + 1) if where.chips % size == 0]
