"""What a program costs on a topology: the bytes it needs, the operations and traffic of one call, and the least time these take."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from radit_jax.planning import hlo
from radit_jax.planning.topology import Topology

DAY = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Cost:
    """One program on one slice. Bytes, traffic and seconds are those of a chip and of one call."""

    name: str
    note: str
    data: int  # the mesh
    model: int
    chips: int
    full: bool  # code was generated; otherwise the compiler was stopped when the layout was done
    compile_s: float
    arguments: int  # bytes, as below
    temporaries: int
    outputs: int  # beside those that take an argument's place
    total: int
    hbm: int  # what the chip has
    fits: bool
    flops: int  # of all chips; counted from the program
    flops_passed: int  # the same in passes of bfloat16 matrix units
    flops_asked: int  # those that the task asks for, of all chips; 0: not counted
    traffic: int  # of HBM
    collectives: dict[str, dict[str, int]]  # kind → count, bytes that a chip receives
    seconds: dict[str, float]  # the least time by compute, hbm and ici
    amount: int
    unit: str
    calls: int | None

    @property
    def spare(self) -> int:
        """Bytes left; below 0, bytes missing."""
        return self.hbm - self.total

    @property
    def bound_by(self) -> str:
        return max(self.seconds, key=self.seconds.__getitem__)

    @property
    def least_s(self) -> float:
        """No call is faster, even if computing, memory and interconnect overlap wholly."""
        return max(self.seconds.values())

    @property
    def utilisation(self) -> float | None:
        """The share of the chips' peak that what the task asks for takes at most: recomputed products and waiting are not in it."""
        peak = self.flops_passed / self.seconds["compute"]  # of all chips
        return self.flops_asked / self.least_s / peak if self.flops_asked else None

    @property
    def rate(self) -> float:
        """Units a second at most, of all chips."""
        return self.amount / self.least_s

    @property
    def days(self) -> float | None:
        return None if self.calls is None else self.calls * self.least_s / DAY

    @property
    def chip_hours(self) -> float | None:
        return None if self.days is None else self.days * 24 * self.chips

    def to_dict(self) -> dict[str, Any]:
        derived = ("spare", "bound_by", "least_s", "utilisation", "rate", "days", "chip_hours")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


def cost(name: str, where: Topology, found: dict[str, Any]) -> Cost:
    """The cost of what compiler.compile_for has found of a program."""
    chip, chips = where.chip, where.chips
    traffic = hlo.traffic(found["module"], found["endless"])
    arguments, temporaries, outputs = buffers(found["buffers"])
    return Cost(
        name=name,
        note=found["note"],
        data=found["data"],
        model=found["model"],
        chips=chips,
        full=found["full"],
        compile_s=found["seconds"],
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        total=arguments + temporaries + outputs,
        hbm=chip.hbm,
        fits=found["fits"],
        flops=found["counted"],
        flops_passed=found["passed"],
        flops_asked=found["asked"],
        traffic=traffic.hbm,
        collectives={kind: {"count": traffic.counts[kind], "bytes": round(size)} for kind, size in traffic.bytes.most_common()},
        seconds={
            "compute": found["passed"] / chips / chip.flops,
            "hbm": traffic.hbm / chip.hbm_rate,
            "ici": sum(traffic.bytes.values()) / chip.ici_rate,
        },
        amount=found["amount"],
        unit=found["unit"],
        calls=found["calls"],
    )


def buffers(assignment: str) -> tuple[int, int, int]:
    """Bytes of HBM for arguments, temporaries and outputs that take no argument's place, as the compiler has assigned them."""
    sums = {"parameter": 0, "preallocated-temp": 0, "live-out": 0}  # an argument whose place an output takes is both: an argument here
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (?!color)(.*)$", assignment, re.MULTILINE):  # colours are other memories
        kind = next((kind for kind in sums if kind in rest), None)
        if kind:
            sums[kind] += int(size)
    arguments, temporaries, outputs = sums.values()
    return arguments, temporaries, outputs
