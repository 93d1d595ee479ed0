"""Charts as inline SVG: numbers in, markup out. Colours are classes of the page's style (s0, s1, …), so that they follow light and dark."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from radit_jax.evaluation import report
from radit_jax.evaluation.markup import Markup, element, join

WIDTH, HEIGHT = 400, 250
LEFT, RIGHT, TOP, BOTTOM = 70, 14, 12, 42
COLOURS = 5
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Series:
    """A line through its points; with `sizes` (radii) dots; `faint` stands behind another."""

    name: str
    points: Sequence[Point]
    colour: int = 0
    faint: bool = False
    sizes: Sequence[float] | None = None
    notes: Sequence[str] | None = None  # what a dot says when it is pointed at


@dataclasses.dataclass(frozen=True)
class Frame:
    """Where numbers lie in a chart: x and y from their lowest to their highest tick."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    height: int = HEIGHT
    left: int = LEFT

    def x(self, value: float) -> float:
        return round(self.left + _share(value, self.x_ticks) * (WIDTH - self.left - RIGHT), 1)

    def y(self, value: float) -> float:
        return round(self.height - BOTTOM - _share(value, self.y_ticks) * (self.height - TOP - BOTTOM), 1)


def ticks(low: float, high: float, about: int = 5, whole: bool = False) -> list[float]:
    """Round numbers, evenly from at most `low` to at least `high`; `whole` ones where they count something."""
    if not high > low:
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if low else (0.0, 1.0)
    rough = (high - low) / max(about - 1, 1)
    unit = 10.0 ** max(math.floor(math.log10(rough)), 0 if whole else -math.inf)
    step = next(unit * times for times in ((1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)) if unit * times >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: 0.5, 1,500, 2.5e-5."""
    if value and abs(value) < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}".replace("-", "−")
    return f"{value:,.6g}".replace("-", "−")


def lines(
    title: str,
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    rules: Mapping[str, float] | None = None,
    unit: bool = False,
    diagonal: str = "",
) -> Markup:
    """Series over x, which counts from 0; `rules` are named horizontal lines.

    `unit` fixes both axes to 0 … 1, and `diagonal` names the line y = x.
    """
    rules, all_points = rules or {}, [point for one in series for point in one.points]
    ys = [y for _, y in all_points] + list(rules.values())
    whole = [0.0, 0.25, 0.5, 0.75, 1.0]
    xs = [x for x, _ in all_points]
    frame = Frame(whole, whole) if unit else Frame(ticks(0, max(xs), whole=True), ticks(min(ys), max(ys)))
    parts = [_axes(frame, x, y)]
    if diagonal:
        parts.append(_path([(0, 0), (1, 1)], frame, "rule"))
    parts += [_path([(frame.x_ticks[0], at), (frame.x_ticks[-1], at)], frame, "rule") for at in rules.values()]
    parts += [_dots(one, frame) if one.sizes else _path(one.points, frame, _class(one)) for one in series]
    keys = [(one.name, _class(one)) for one in series if one.name] + [(name, "rule") for name in (*rules, *filter(None, [diagonal]))]
    return _figure(title, frame.height, parts, keys)


def intervals(
    title: str, items: Sequence[tuple[str, Mapping[str, Any], float | None]], *, x: str, zero: bool = False, beside: str = ""
) -> Markup:
    """One line an item (name, {"mean", "ci95"}, a number beside it or None): its mean and interval, in percent."""
    values = [value for _, one, _ in items for value in (one["mean"], *one["ci95"])] + [v for *_, v in items if v is not None]
    across = ticks(100 * min([0.0, *values]), 100 * max([0.01, *values]))
    height = TOP + BOTTOM + 40 * len(items)
    frame = Frame(across, [0, len(items)], height, left=RIGHT)
    parts = [_grid_x(frame), _label(x, (frame.left + WIDTH - RIGHT) / 2, height - 6, "middle")]
    if zero:
        parts.append(_path([(0, 0), (0, len(items))], frame, "rule"))
    for n, (name, one, other) in enumerate(items):
        at, (low, high) = TOP + 40 * n + 27, one["ci95"]
        shown = f"{name}: {(report.signed if zero else report.cell)(one)}"
        parts.append(_label(shown, frame.left, at - 10, "start"))
        parts.append(element("path", d=f"M{frame.x(100 * low)} {at}H{frame.x(100 * high)}", class_="whisker s0"))
        parts.append(element("circle", cx=frame.x(100 * one["mean"]), cy=at, r=4.5, class_="dot s0"))
        if other is not None:
            parts.append(element("path", d=f"M{frame.x(100 * other)} {at - 6}l5 6l-5 6l-5 -6z", class_="hollow s1"))
    keys = [("mean and 95 % interval", "s0"), *([(beside, "s1")] if beside else [])]
    return _figure(title, height, parts, keys)


def slopes(title: str, moves: Mapping[tuple[int | None, int | None], int], depth: int) -> Markup:
    """How many questions moved from which rank to which (from 0; None: not among the first `depth`): lines as thick as they are many."""
    height, left, right = TOP + 16 * depth + 46, 90, WIDTH - 90
    parts = [_label("before", left, height - 10, "middle"), _label("after R-ft", right, height - 10, "middle")]

    def at(rank: int | None) -> float:
        return TOP + 8 + 16 * (depth if rank is None else rank)

    for rank in (*range(depth), None):
        name = "none" if rank is None else str(rank + 1)
        parts += [_label(name, left - 10, at(rank) + 4, "end"), _label(name, right + 10, at(rank) + 4, "start")]
    most = max(moves.values(), default=1)
    for (before, after), count in sorted(moves.items(), key=lambda move: move[1]):
        down = at(after) - at(before)
        kind = "up" if down < 0 else "down" if down > 0 else "same"
        note = element("title", f"{_rank(before)} to {_rank(after)}: {count}")
        thick = round(1 + 6 * count / most, 1)
        parts.append(element("path", note, d=f"M{left} {at(before)}L{right} {at(after)}", class_=f"slope {kind}", stroke_width=thick))
    count = sum(moves.values())
    return _figure(f"{title} ({count:,})", height, parts, [("moved up", "up"), ("moved down", "down"), ("where it was", "same")])


def bar(share: float) -> Markup:
    """A bar of a table's cell."""
    inside = element("rect", width=round(100 * share, 1), height=8)
    return element("svg", inside, viewBox="0 0 100 8", preserveAspectRatio="none", class_="bar", aria_hidden="true")


# -- parts ------------------------------------------------------------------------------------------------------------------------------


def _share(value: float, at: Sequence[float]) -> float:
    return (value - at[0]) / (at[-1] - at[0])


def _rank(rank: int | None) -> str:
    return "none" if rank is None else f"rank {rank + 1}"


def _class(one: Series) -> str:
    return f"{'faint ' if one.faint else ''}s{one.colour % COLOURS}"


def _path(points: Sequence[Point], frame: Frame, class_: str) -> Markup:
    drawn = "L".join(f"{frame.x(x)} {frame.y(y)}" for x, y in points)
    return element("path", d=f"M{drawn}", class_=f"line {class_}") if points else Markup()


def _dots(one: Series, frame: Frame) -> Markup:
    notes = one.notes or [one.name] * len(one.points)
    made = zip(one.points, one.sizes, notes)
    dots = [
        element("circle", element("title", n), cx=frame.x(x), cy=frame.y(y), r=round(r, 1), class_=f"dot {_class(one)}")
        for (x, y), r, n in made
    ]
    return join([_path(one.points, frame, f"thin {_class(one)}"), *dots])


def _label(text: str, x: float, y: float, anchor: str) -> Markup:
    return element("text", text, x=x, y=y, text_anchor=anchor)


def _grid_x(frame: Frame) -> Markup:
    down = frame.height - BOTTOM
    parts = [element("path", d=f"M{frame.x(at)} {TOP}V{down}", class_="grid") for at in frame.x_ticks]
    return join(parts + [_label(number(at), frame.x(at), down + 15, "middle") for at in frame.x_ticks])


def _axes(frame: Frame, x: str, y: str) -> Markup:
    """The grid, its numbers, and what they are."""
    right = WIDTH - RIGHT
    across = [element("path", d=f"M{frame.left} {frame.y(at)}H{right}", class_="grid") for at in frame.y_ticks]
    beside = [_label(number(at), frame.left - 6, frame.y(at) + 4, "end") for at in frame.y_ticks]
    names = [_label(x, (frame.left + right) / 2, frame.height - 5, "middle")]
    middle = (TOP + frame.height - BOTTOM) / 2
    names.append(element("text", y, x=-middle, y=11, text_anchor="middle", transform="rotate(-90)"))
    return join([_grid_x(frame), *across, *beside, *names])


def _figure(title: str, height: int, parts: Sequence[Markup], keys: Sequence[tuple[str, str]]) -> Markup:
    drawn = element("svg", *parts, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=title)
    legend = [element("span", element("i", class_=f"key {class_}"), name) for name, class_ in keys]
    return element("figure", element("figcaption", title), drawn, element("p", *legend, class_="legend") if len(keys) > 1 else "")
