"""Plans as text: a table a program for people, one row a plan in markdown."""

from __future__ import annotations

from collections.abc import Sequence

from radit_jax.evaluation import report
from radit_jax.planning.chips import GiB
from radit_jax.planning.compiled import Cost
from radit_jax.planning.topology import Topology

HEAD = (
    "config",
    "slice",
    "chips",
    "mesh",
    "what",
    "arguments",
    "temporaries",
    "of",
    "fits",
    "bound by",
    "at most",
    "run at least",
    "compiler",
)


def text(topology: Topology, costs: Sequence[Cost]) -> str:
    """Everything of every program, for reading."""
    chip = topology.chip
    head = (
        f"{topology.name} ({topology.accelerator}): {topology.chips:,} chips of {chip.hbm / GiB:.2f} GiB, "
        f"{chip.flops / 1e12:.0f} TFLOP/s, HBM {chip.hbm_rate / 1e9:,.0f} GB/s, ICI {chip.ici_rate / 1e9:.0f} GB/s"
    )
    return "\n\n".join([head, *map(_program, costs)])


def _program(cost: Cost) -> str:
    about = f"{cost.name} on {cost.data}×{cost.model} (data × model){', ' * bool(cost.note)}{cost.note}; {compiled(cost)}"
    rows = [
        ("memory of a chip", f"{memory(cost)}: {verdict(cost)}"),
        ("FLOPs of a call", f"{cost.flops:.3g} on all chips, counted from the program" + _slower(cost)),
        *[(kind, f"{found['count']:,} × a call, {size(found['bytes'])} into a chip") for kind, found in cost.collectives.items()],
        ("HBM traffic", f"{size(cost.traffic)} a chip and call"),
        ("least time of a call", f"{duration(cost.least_s)} ({', '.join(f'{k} {duration(s)}' for k, s in cost.seconds.items())})"),
        ("bound by", cost.bound_by),
        ("at most", f"{figures(cost.rate, 4)} {cost.unit}/s" + utilisation(cost)),
    ]
    if cost.calls is not None:
        rows.append(("the run at least", f"{cost.calls:,} calls, {run(cost)}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([about, *[f"  {name:<{width}}  {value}" for name, value in rows]])


def _slower(cost: Cost) -> str:
    """Float32 products take several passes."""
    return f" ({cost.flops_passed / cost.flops:.1f} × that in bfloat16 passes)" if cost.flops_passed > cost.flops else ""


def figures(number: float, significant: int) -> str:
    """A number of so many figures, without an exponent: 247,000."""
    return f"{float(f'{number:.{significant}g}'):,.15g}"


def utilisation(cost: Cost) -> str:
    """What of the peak is for the task, not for what is computed twice or waited for."""
    return "" if cost.utilisation is None else f", {100 * cost.utilisation:.0f} % of the peak"


def compiled(cost: Cost) -> str:
    return f"{'compiled' if cost.full else 'laid out'} in {cost.compile_s:.0f} s"


def memory(cost: Cost) -> str:
    parts = f"arguments {size(cost.arguments)} + temporaries {size(cost.temporaries)} + outputs {size(cost.outputs)}"
    return f"{parts} = {size(cost.total)} of {size(cost.hbm)}"


def verdict(cost: Cost) -> str:
    return f"fits, {size(cost.spare)} to spare" if cost.fits else f"DOES NOT FIT, {size(-cost.spare)} missing"


def run(cost: Cost) -> str:
    return f"{cost.days:.3g} days, {cost.chip_hours:,.4g} chip-hours"


def row(name: str, topology: Topology, cost: Cost) -> tuple[str, ...]:
    """One plan as a row of the table."""
    fits = f"yes, {size(cost.spare)} spare" if cost.fits else f"no, {size(-cost.spare)} missing"
    rate, whole = (
        (f"{figures(cost.rate, 3)} {cost.unit}/s" + utilisation(cost), "–" if cost.days is None else run(cost)) if cost.fits else ("–", "–")
    )
    mesh = f"{cost.data}×{cost.model}"
    return (
        name, topology.name, f"{topology.chips}", mesh, cost.note, size(cost.arguments), size(cost.temporaries), size(cost.hbm), fits,
        cost.bound_by, rate, whole, compiled(cost),
    )  # fmt: skip


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return report.markdown([HEAD, *rows])


def size(number: float) -> str:
    """Bytes for reading, in powers of 1024 as memory is counted."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024 or unit == "GiB":
            return f"{number:,.0f} {unit}" if unit in ("B", "KiB") else f"{number:,.2f} {unit}"
        number /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
