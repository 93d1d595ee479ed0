"""Tables as text and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

COLUMNS = ("em", "f1", "recall@1", "recall@5", "recall@10")


def table(rows: Sequence[Mapping[str, Any]], *, title: str) -> str:
    """The rows as text: means in percent with 95 % bootstrap intervals."""
    grid = Table(title=title, title_justify="left")
    grid.add_column("system", no_wrap=True)
    for column in COLUMNS:
        grid.add_column(column, justify="right", no_wrap=True)
    grid.add_column("n", justify="right")
    for row in rows:
        grid.add_row(row["name"], *(cell(row["metrics"].get(column)) for column in COLUMNS), str(row["n"]))
    return _text(grid)


def tasks(
    rows: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str], paper: Mapping[str, Mapping[str, float]], *, shots: int
) -> str:
    """Systems by tasks: ours with 95 % bootstrap intervals, then the paper's."""
    grid = Table(title=f"Tasks, {shots}-shot (percent; ours with 95 % bootstrap intervals)", title_justify="left")
    grid.add_column("system", no_wrap=True)
    for task, metric in metrics.items():
        grid.add_column(f"{task} ({metric})", justify="right", no_wrap=True)
    for name, row in rows.items():
        grid.add_row(name, *(cell(row[task]["metrics"][metric]) if task in row else "–" for task, metric in metrics.items()))
    sizes = [next((row[task]["n"] for row in rows.values() if task in row), 0) for task in metrics]
    grid.add_row("questions", *(f"{size:,}" for size in sizes), end_section=True)
    for name, figures in paper.items():
        if set(figures) & set(metrics):
            grid.add_row(f"paper: {name}", *(f"{figures[task]:.1f}" if task in figures else "–" for task in metrics))
    return _text(grid)


def retrieval(name: str, found: Mapping[str, Any]) -> str:
    """Measures by systems, and the paired difference where there are two."""
    grid = Table(title=f"{name}: {found['n']:,} questions (percent, 95 % bootstrap intervals)", title_justify="left")
    grid.add_column("measure", no_wrap=True)
    for system in found["systems"]:
        grid.add_column(system, justify="right", no_wrap=True)
    difference = found.get("difference", {})
    if difference:
        grid.add_column("difference", justify="right", no_wrap=True)
    for key in next(iter(found["systems"].values())):
        cells = [cell(row[key]) for row in found["systems"].values()]
        grid.add_row(key, *cells, *([signed(difference[key])] if difference else []))
    return _text(grid)


def differences(pairs: Mapping[str, Mapping[str, Any]]) -> str:
    """Paired differences in points, with their intervals."""
    grid = Table(title="Paired differences (points, 95 % bootstrap interval over questions)", title_justify="left")
    for column in ("comparison", "metric", "difference"):
        grid.add_column(column, no_wrap=True)
    for name, by_metric in pairs.items():
        for metric, value in by_metric.items():
            grid.add_row(name, metric, signed(value))
    return _text(grid)


def stages(seconds: Mapping[str, float]) -> str:
    """Wall time of each stage."""
    return grid("Wall time", ("stage", "seconds"), [(stage, f"{value:.0f}") for stage, value in seconds.items()])


def grid(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under their columns; the last column is of figures."""
    shown = Table(title=title, title_justify="left")
    for column in columns[:-1]:
        shown.add_column(column)
    shown.add_column(columns[-1], justify="right")
    for row in rows:
        shown.add_row(*row)
    return _text(shown)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its head first."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (rows[0], ("---",) * len(rows[0]), *rows[1:]))


def cell(value: Mapping[str, Any] | None) -> str:
    """Mean and interval in percent."""
    if value is None:
        return "–"
    low, high = value["ci95"]
    return f"{100 * value['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def signed(value: Mapping[str, Any]) -> str:
    """A difference and its interval in points."""
    low, high = value["ci95"]
    return f"{100 * value['mean']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _text(grid: Table) -> str:
    console = Console(width=max(140, 24 + 26 * len(grid.columns)), color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return capture.get()
