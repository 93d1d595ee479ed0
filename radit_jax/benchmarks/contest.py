"""Ours against a named peer on fixed records: timed by turns in one run, and a ratio only where both computed the same."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from radit_jax.benchmarks.peer import MAIN, NEEDS, OURS, Peer, Run, take_turns


@dataclasses.dataclass(frozen=True)
class Work:
    """One kind of work on fixed records: how we do it, what the peer is told, and how both results are compared."""

    unit: str
    amount: int  # of `unit`, done by one call of `run`
    run: Callable[[], Any]
    job: dict[str, Any]  # JSON; the peer's outputs are in the form of ours
    compare: Callable[[Any, Any], dict[str, float]]  # figures of agreement
    agrees: Callable[[dict[str, float]], bool]
    script: str = "torch_peer.py"  # of tests/peers
    others: dict[str, str] = dataclasses.field(default_factory=dict)  # peers as they ship, with their scripts; they get the same job
    differs: dict[str, str] = dataclasses.field(default_factory=dict)  # why one of them computes something else, where it does
    cannot: dict[str, str] = dataclasses.field(default_factory=dict)  # what cannot do this work as it ships, and why


def compare(kind: str, work: Work, *, repetitions: int, peer_python: str | None) -> dict[str, Any]:
    """Times the work on all sides by turns; there is no ratio where the peer is missing or computed something else.

    Peers as they ship are timed whatever they compute, and it is said whether that was the same; of one that is not there or fails, why.
    """
    scripts = {MAIN: work.script, **work.others} if peer_python else {}
    peers = {name: Peer(peer_python, script, {"kind": kind, **work.job}) for name, script in scripts.items()}
    runs, outputs, failed = take_turns(work.run, peers, repetitions)
    ours = runs[OURS]
    result = {"kind": kind, "unit": f"{work.unit}/s", "ours": _speeds(work, ours), "cannot": work.cannot}
    if not peers:
        note = f"no peer: give --peer_python or RADIT_PEER_PYTHON, a Python with {NEEDS[work.script]}"
        return result | {"peer": None, "ratio": None, "note": note}
    found = {name: failed.get(name) or _against(work, ours, runs[name], outputs[OURS], outputs[name]) for name in peers}
    result |= found.pop(MAIN) | {"peer_about": peers[MAIN].about, "others": found}
    for name, why in work.differs.items():
        if found[name].get("same") is False:
            found[name]["differs"] = why
    if not result["same"]:
        result |= {"ratio": None, "cpu_ratio": None, "note": "no ratio: the two did not compute the same"}
    return result


def _against(work: Work, ours: Sequence[Run], theirs: Sequence[Run], our_output: Any, their_output: Any) -> dict[str, Any]:
    agreement = {key: round(float(value), 6) for key, value in work.compare(our_output, their_output).items()}
    return {
        "peer": _speeds(work, theirs),
        "agreement": agreement,
        "same": work.agrees(agreement),
        "ratio": _ratio(ours, theirs, "seconds"),
        "cpu_ratio": _ratio(ours, theirs, "cpu_seconds"),
    }


def text(results: Sequence[dict[str, Any]]) -> str:
    """The results as people read them."""
    lines = []
    for result in results:
        sides = [f"{name} {_span(result[name])}" for name in ("ours", "peer") if result[name]]
        ratio = f"ratio {result['ratio']:.2f} (by CPU time {result['cpu_ratio']:.2f})" if result["ratio"] else result["note"]
        agreement = _agreement(result)
        lines.append(f"{result['kind']:9} {result['unit']}: {'; '.join(sides)}; {ratio}" + (f"; {agreement}" if agreement else ""))
        for name, other in result.get("others", {}).items():
            lines.append(f"    {name} as it ships: {_shipped(other)}")
        lines += [f"    {name} as it ships: cannot: {why}" for name, why in result.get("cannot", {}).items()]
    return "\n".join(lines)


def _shipped(other: dict[str, Any]) -> str:
    if "missing" in other:
        return f"not installed (no module {other['missing']})"
    if "failed" in other:
        return f"failed: {other['failed']}"
    verdict = "the same" if other["same"] else "something else"
    why = f": {other['differs']}" if "differs" in other else ""
    return f"{_span(other['peer'])}; we take 1/{other['ratio']:.2f} of its time; it computes {verdict} ({_agreement(other)}){why}"


def _agreement(result: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in result.get("agreement", {}).items())


# -- figures ------------------------------------------------------------------------------------------------------------------------


def _speeds(work: Work, runs: Sequence[Run]) -> dict[str, float]:
    per_s = sorted(work.amount / run["seconds"] for run in runs)
    median = statistics.median(per_s)
    cpu = statistics.median(run["cpu_seconds"] for run in runs)
    return {
        "median": round(median, 2),
        "least": round(per_s[0], 2),
        "most": round(per_s[-1], 2),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": max(run["peak_mib"] for run in runs),
    }


def _ratio(ours: Sequence[Run], theirs: Sequence[Run], what: str) -> float:
    """How many times as much the peer takes, by medians."""
    return round(statistics.median(run[what] for run in theirs) / statistics.median(run[what] for run in ours), 3)


def _span(speeds: dict[str, float]) -> str:
    return f"{speeds['median']:g} ({speeds['least']:g}–{speeds['most']:g}), peak {speeds['peak_mib']} MiB"
