"""Looking for what fits, by compiling: a mesh and micro-batches for this slice, or the smallest slice that holds the program.

A program that does not fit is refused within seconds, one that fits is compiled to its end (a minute or so for an LM): so the search goes
from what is fastest to what is leanest, and stops at the first that fits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from radit_jax.errors import InputError
from radit_jax.planning import compiled, programs, topology
from radit_jax.planning.compiled import Cost
from radit_jax.planning.topology import Topology

MOST = 24  # compilations of one search


def plan(name: str, c: ConfigDict, where: Topology, settings: programs.Settings) -> Cost:
    """The cost of one program as configured, on the mesh that the config says."""
    mesh = topology.mesh(where, c.mesh.data, c.mesh.model)
    return compiled.compile_program(programs.build(name, c, mesh, settings), where.chip, where.chips)


def fitting(name: str, c: ConfigDict, where: Topology, settings: programs.Settings) -> tuple[dict[str, int] | None, list[Cost]]:
    """(the fields of the config that make the program fit, everything compiled on the way); None if nothing fitted.

    Of an LM step the batch of an update stays what it is: fewer rows in a micro-batch are more micro-batches.
    """
    tried = []
    for fields in _choices(name, c, where):
        if len(tried) == MOST:
            break
        try:
            cost = plan(name, _with(c, fields), where, settings)
        except InputError:  # a mesh that does not divide the heads
            continue
        tried.append(cost)
        if cost.fits:
            return fields, tried
    return None, tried


def smallest(name: str, c: ConfigDict, where: Topology, settings: programs.Settings, missing: Cost) -> tuple[Topology | None, list[Cost]]:
    """(the smallest listed slice of the same chip that holds the program, everything compiled on the way), above `where`.

    The model axis grows where there are more chips than rows. Slices whose share of the arguments alone is too much are passed over.
    """
    tried = []
    for larger in where.listed():
        if larger.chips <= where.chips or missing.arguments * where.chips / larger.chips > where.chip.hbm:
            continue
        for model in _axis_sizes(larger, c.mesh.model):
            try:
                cost = plan(name, _with(c, {"mesh.data": -1, "mesh.model": model}), larger, settings)
            except InputError:
                continue
            tried.append(cost)
            if cost.fits:
                return larger, tried
            break  # a longer model axis is for --fit
    return None, tried


def _choices(name: str, c: ConfigDict, where: Topology) -> Iterator[dict[str, int]]:
    """Fields to try: shorter model axes and larger micro-batches first, since both mean less traffic."""
    rows, accumulate = c.lm_ft.rows, c.lm_ft.accumulate
    micro = [m for m in range(1, rows * accumulate + 1) if rows * accumulate % m == 0 and m >= accumulate] if name == "lm_step" else [1]
    for m in micro:
        for model in _axis_sizes(where, 1):
            data = where.chips // model
            if name != "lm_step":
                yield {"mesh.data": data, "mesh.model": model}
            elif rows * accumulate // m % data == 0:
                yield {"mesh.data": data, "mesh.model": model, "lm_ft.rows": rows * accumulate // m, "lm_ft.accumulate": m}


def _axis_sizes(where: Topology, least: int) -> list[int]:
    return [size for size in range(least, where.chips + 1) if where.chips % size == 0]


def _with(c: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    changed = ConfigDict(c.to_dict())
    for path, value in fields.items():
        group, field = path.split(".")
        changed[group][field] = value
    return changed
