"""Figures of a sweep (reproduction.py) as SVG files: cells and differences in, a file out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

Value = Mapping[str, Any]  # {"mean", "ci95"} in shares of one
STYLE = {"svg.hashsalt": "radit_jax", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def by_k(lines: Mapping[str, Mapping[int, Value]], file: Path, *, title: str, y: str) -> None:
    """A line a system over the number of passages, with 95 % intervals; a system at k = 0 alone is a level of its own."""
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        ks = sorted({k for points in lines.values() for k in points if k})
        for n, (name, points) in enumerate(lines.items()):
            if set(points) == {0}:
                axes.axhline(100 * points[0]["mean"], color="gray", linestyle=":", label=name)
                continue
            at = [ks.index(k) + 0.05 * (n - 2) for k in sorted(points)]
            means, reach = _bars([points[k] for k in sorted(points)])
            axes.errorbar(at, means, yerr=reach, marker="o", markersize=4, capsize=2, linewidth=1.5, label=name)
        axes.set(title=title, xlabel="passages, k", ylabel=y, xticks=range(len(ks)), xticklabels=ks)
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8)
        _save(figure, file)


def differences(found: Mapping[str, Value], file: Path, *, title: str, x: str) -> None:
    """A line a difference with its 95 % interval, and a small mark for each seed ("by_seed")."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.7 + 0.34 * len(found)), layout="constrained")
        axes = figure.subplots()
        for at, value in enumerate(found.values()):
            means, reach = _bars([value])
            axes.errorbar(means, [at], xerr=reach, marker="o", capsize=3, color="C0")
            seeds = [100 * of_seed["mean"] for of_seed in value.get("by_seed", ())]
            if len(seeds) > 1:
                axes.plot(seeds, [at + 0.22] * len(seeds), "|", color="C1", markersize=5)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set(title=title, xlabel=x, yticks=range(len(found)), yticklabels=list(found))
        axes.invert_yaxis()
        _save(figure, file)


def _bars(values: Sequence[Value]) -> tuple[list[float], list[list[float]]]:
    """Means, and how far the intervals reach below and above, in percent."""
    means = [100 * value["mean"] for value in values]
    below = [100 * (value["mean"] - value["ci95"][0]) for value in values]
    above = [100 * (value["ci95"][1] - value["mean"]) for value in values]
    return means, [below, above]


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="svg", metadata={"Date": None})
