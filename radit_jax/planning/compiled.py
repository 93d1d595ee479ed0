"""A program compiled for a topology: the bytes it needs, the operations and traffic of one call, and the least time these take."""

from __future__ import annotations

import dataclasses
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from radit_jax.errors import InputError
from radit_jax.planning import flops, hlo
from radit_jax.planning.chips import Chip
from radit_jax.planning.programs import Program

OPTIMIZED = "*after_optimizations.txt"  # what XLA writes beside an executable when asked
MEMORY = "*memory-usage-report.txt"
BUFFERS = "*after_optimizations-buffer-assignment.txt"
DAY = 24 * 3600


@dataclasses.dataclass(frozen=True)
class Cost:
    """One program on one slice. Bytes, traffic and seconds are those of a chip and of one call."""

    name: str
    note: str
    data: int  # the mesh
    model: int
    chips: int
    compile_s: float
    arguments: int  # bytes, as below
    temporaries: int
    outputs: int  # beside those that take an argument's place
    total: int
    hbm: int  # what the chip has
    fits: bool
    flops: int  # of all chips; counted from the program
    flops_passed: int  # the same in passes of bfloat16 matrix units
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
        derived = ("spare", "bound_by", "least_s", "rate", "days", "chip_hours")
        return {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}


def compile_program(program: Program, chip: Chip, chips: int) -> Cost:
    """Compiles for the devices of the program's mesh. A program that the chip cannot hold is a Cost that does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        traced = program.trace()
        began = time.monotonic()
        with jax.set_mesh(program.mesh):
            lowered = traced.lower()
        try:
            executable = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "out of memory" not in str(error):
                raise InputError(f"{program.name}: the compiler refuses it ({str(error).splitlines()[0]})") from error
            executable = None
        seconds = time.monotonic() - began
        traffic = hlo.traffic(_read(folder, OPTIMIZED), program.endless)
        arguments, temporaries, outputs = _bytes(executable) if executable else _refused(_read(folder, MEMORY), _read(folder, BUFFERS))
    operations = flops.of(traced.jaxpr, program.endless)
    part = program.mesh.size  # chips that share one call
    return Cost(
        name=program.name,
        note=program.note,
        data=program.mesh.shape["data"],
        model=program.mesh.shape["model"],
        chips=chips,
        compile_s=round(seconds, 1),
        arguments=arguments,
        temporaries=temporaries,
        outputs=outputs,
        total=arguments + temporaries + outputs,
        hbm=chip.hbm,
        fits=executable is not None,
        flops=operations.counted * chips // part,
        flops_passed=operations.passed * chips // part,
        traffic=traffic.hbm,
        collectives={kind: {"count": traffic.counts[kind], "bytes": round(size)} for kind, size in traffic.bytes.most_common()},
        seconds={
            "compute": operations.passed / part / chip.flops,
            "hbm": traffic.hbm / chip.hbm_rate,
            "ici": sum(traffic.bytes.values()) / chip.ici_rate,
        },
        amount=program.amount,
        unit=program.unit,
        calls=program.calls,
    )


def _read(folder: str, pattern: str) -> str:
    """The file of the largest module (a program may be compiled in parts)."""
    return max(Path(folder).glob(pattern), key=lambda path: path.stat().st_size).read_text()


def _bytes(executable: Any) -> tuple[int, int, int]:
    m = executable.memory_analysis()
    temporaries = m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return m.argument_size_in_bytes, temporaries, m.output_size_in_bytes - m.alias_size_in_bytes


def _refused(report: str, buffers: str) -> tuple[int, int, int]:
    """The same of a program that the compiler has laid out and then refused, from what it wrote on the way."""
    arguments = sum(map(int, re.findall(r"^allocation \d+: size (\d+),? .*\bparameter \d", buffers, re.MULTILINE)))
    return arguments, int(re.search(r"Total bytes: (\d+)", report)[1]) - arguments, 0
