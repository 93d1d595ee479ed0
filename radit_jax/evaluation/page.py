"""The report of a whole run as one HTML page that opens offline: plain data in, a string out. No scripts, and nothing is fetched.

The data, of which all but "title" and "rows" may be missing (old workdirs know less; that part is left out then):

    title, about           what was run
    rows, differences      as in table.json
    paper                  {"task", "rows": {our system: {shots: percent}}}
    tasks                  as tasks.json
    trainings              [{"name", "lines": of metrics.jsonl, "rates": [(step, learning rate)], "chosen": step or None}]
    candidates             k of R-ft: its target's entropy is at most log k
    questions, depth       as in findings.py, all of them; passages looked at for ranks
    favourite              findings.binned of (p_R, is it the passage that the LM likes best?) over the training questions
    by_k                   {system: [(k, {"mean", "ci95"})]}, exact match
    stages                 [{"stage", "folder", "facts"}] in order
    config, versions       {name: value}, fields by dotted names
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from radit_jax.evaluation import charts, findings, report
from radit_jax.evaluation.charts import Series, lines
from radit_jax.evaluation.findings import AFTER, BEFORE
from radit_jax.evaluation.markup import Markup, element, interval, join, percent, table
from radit_jax.evaluation.page_questions import PAIRS, questions
from radit_jax.evaluation.style import STYLE
from radit_jax.progress import duration

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser fetches nothing and runs nothing, whatever a passage says
Data = Mapping[str, Any]


def html(data: Data) -> str:
    """The page."""
    made = [(name, title, section(data)) for name, title, section in SECTIONS]
    shown = [one for one in made if one[2]]
    head = join(
        [
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", data["title"]),
            element("style", Markup(STYLE)),
        ]
    )
    body = [element("h1", data["title"]), element("p", data.get("about", ""), class_="soft"), _tiles(data)]
    body.append(element("nav", *(element("a", title, href=f"#{name}") for name, title, _ in shown)))
    body += [element("section", element("h2", title, id=name), inside) for name, title, inside in shown]
    return "<!DOCTYPE html>\n" + element("html", element("head", head), element("body", *body), lang="en") + "\n"


def _tiles(data: Data) -> Markup:
    """What one wants to know first."""
    means = {row["name"]: row["metrics"] for row in data["rows"]}
    tiles = [(f"exact match, {name}", percent(found["em"]["mean"])) for name, found in means.items() if "em" in found]
    tiles.append(("questions", f"{data['rows'][0]['n']:,}"))
    if seconds := sum(stage["facts"].get("seconds", 0) for stage in data.get("stages", ())):
        tiles.append(("for all stages", duration(seconds)))
    return element("div", *(element("div", element("b", value), name) for name, value in tiles), class_="tiles")


# -- systems ----------------------------------------------------------------------------------------------------------------------------


def _systems(data: Data) -> Markup:
    paper = data.get("paper")
    columns = [column for column in report.COLUMNS if any(column in row["metrics"] for row in data["rows"])]
    shots = sorted({shots for row in paper["rows"].values() for shots in row}) if paper else []
    head = ["system", *columns, *(f"paper, {n}-shot" for n in shots)]
    rows = []
    for row in data["rows"]:
        cells = [interval(row["metrics"].get(column)) for column in columns]
        theirs = paper["rows"].get(row["name"], {}) if paper else {}
        rows.append([row["name"], *cells, *(f"{theirs[n]:.1f}" if n in theirs else "–" for n in shots)])
    says = element("p", "Means in percent; below each its 95 % bootstrap interval over questions.")
    if paper:
        note = (
            f"The paper's figures are exact match on {paper['task']} with LLaMA 65B over all of Wikipedia: another model, another corpus."
        )
        says = join([says, element("p", note, class_="soft")])
    drawn = [charts.intervals("Exact match", _with_paper(data["rows"], paper), x="percent", beside="the paper, 0-shot" if paper else "")]
    pairs = [(f"{name}, {metric}", value, None) for name, found in data.get("differences", {}).items() for metric, value in found.items()]
    if pairs:
        drawn.append(charts.intervals("Paired differences over the same questions", pairs, x="points", zero=True))
    return join([says, table(head, rows), element("div", *drawn, class_="charts")])


def _with_paper(rows: Sequence[Data], paper: Data | None) -> list[tuple[str, Data, float | None]]:
    figures_of = paper["rows"] if paper else {}
    found = [(row["name"], row["metrics"].get("em"), figures_of.get(row["name"], {}).get(0)) for row in rows]
    return [(name, value, other and other / 100) for name, value, other in found if value]


def _tasks(data: Data) -> Markup:
    """Other tasks that this workdir was asked, beside the paper's rows."""
    found = data.get("tasks")
    if not found:
        return Markup()
    metrics = found["metrics"]
    rows = [
        [name, *(interval(row[task]["metrics"][metric]) if task in row else "–" for task, metric in metrics.items())]
        for name, row in found["rows"].items()
    ]
    beside = {name: row for name, row in found["paper"].items() if set(row) & set(metrics)}
    rows += [[f"paper: {name}", *(f"{row[task]:.1f}" if task in row else "–" for task in metrics)] for name, row in beside.items()]
    says = element("p", f"{found['shots']}-shot, percent. The paper's rows are of LLaMA 65B.")
    return join([says, table(["system", *(f"{task} ({metric})" for task, metric in metrics.items())], rows)])


# -- training ---------------------------------------------------------------------------------------------------------------------------


def _trainings(data: Data) -> Markup:
    drawn = [chart for training in data.get("trainings", ()) for chart in _training(training)]
    if not drawn:
        return Markup()
    says = "Faint: every step. Strong: the mean of its neighbours. Looks at held-out questions or development tasks are dots."
    return join([element("p", says), element("div", *drawn, class_="charts")])


def _training(training: Data) -> list[Markup]:
    name, drawn = training["name"], []
    if loss := _points(training, "loss"):
        drawn.append(lines(f"{name}: loss", _curves(loss, 0), x="step", y="loss (nats)"))
    if rates := training.get("rates"):
        drawn.append(lines(f"{name}: learning rate", [Series("", findings.thinned(rates), 2)], x="step", y="learning rate"))
    looks = sorted({key for line in training["lines"] for key in line if key.startswith(("validation_", "dev_"))})
    if seen := [
        Series(key.replace("_", " "), points := _points(training, key), n, sizes=[3.5] * len(points)) for n, key in enumerate(looks)
    ]:
        chosen = f" (step {training['chosen']} was kept)" if training.get("chosen") else ""
        drawn.append(lines(f"{name}: looks on the way{chosen}", seen, x="step", y="mean"))
    return drawn


def _entropy(data: Data) -> Markup:
    k = data.get("candidates")
    training = next((one for one in data.get("trainings", ()) if _points(one, "target_entropy")), None)
    if training is None or not k:
        return Markup()
    target, own = _points(training, "target_entropy"), _points(training, "retriever_entropy")
    series = [Series("target", findings.thinned(findings.smoothed(target)), 0), Series("p_R", findings.thinned(findings.smoothed(own)), 1)]
    flat = {f"log {k} = {math.log(k):.2f}: flat, teaches nothing": math.log(k)}
    floor = [Series("", [(target[0][0], 0.0)], 0)]
    drawn = [lines("Entropy of the target and of p_R", series + floor, x="step", y="nats", rules=flat)]
    if agrees := _points(training, "top1_agrees"):
        curves = _curves([(x, 100 * y) for x, y in agrees], 3)
        drawn.append(lines("p_R's first passage is the target's first", curves, x="step", y="percent of the batch"))
    share = sum(y for _, y in target) / len(target) / math.log(k)
    says = f"R-ft pulls p_R towards a target made of the LM's scores of {k} passages; its mean entropy is {100 * share:.0f} % of log {k}."
    return join([element("p", says), element("div", *drawn, class_="charts")])


def _curves(points: Sequence[charts.Point], colour: int) -> list[Series]:
    """Every step, and the mean of its neighbours."""
    return [
        Series("each step", findings.thinned(points), colour, faint=True),
        Series("mean around it", findings.thinned(findings.smoothed(points)), colour),
    ]


def _points(training: Data, key: str) -> list[charts.Point]:
    return [(line["step"], line[key]) for line in training["lines"] if key in line]


# -- retrieval --------------------------------------------------------------------------------------------------------------------------


def _ranks(data: Data) -> Markup:
    questions = data.get("questions", ())
    if not (all_moves := findings.moves(questions)):
        return Markup()
    depth = data.get("depth") or 1 + max((rank for move in all_moves for rank in move if rank is not None), default=0)
    groups = {"all questions": questions}
    for after, before in PAIRS:
        changed = findings.changed(questions, after, before)
        groups |= {f"{kind}: {after} against {before}": of_kind for kind, of_kind in changed.items()}
    counted = {name: findings.moves(of_group) for name, of_group in groups.items()}
    rows = [[name, sum(moves.values()), *findings.directions(moves).values()] for name, moves in counted.items()]
    moving = {name: moves for name, moves in counted.items() if any(before != after for before, after in moves)}
    drawn = [charts.slopes(name[0].upper() + name[1:], moves, depth) for name, moves in moving.items()]
    says = f"The rank of the first passage that holds an answer, among the first {depth}, before R-ft and after it."
    head = ["questions", "all", *findings.directions({})]
    return join([element("p", says), table(head, rows), element("div", *drawn, class_="charts")])


def _calibration(data: Data) -> Markup:
    questions, drawn, says = data.get("questions", ()), [], []
    for retriever, when in ((BEFORE, "before R-ft"), (AFTER, "after R-ft")):
        found = findings.calibration(questions, retriever)
        if found:
            drawn.append(
                _calibrated(f"Test questions, {when}", [_binned(name, bins, n + 1) for n, (name, bins) in enumerate(found.items())])
            )
            says.append(f"{when} {percent(findings.mass(questions, retriever) or 0.0)}")
    if favourite := data.get("favourite"):
        drawn.append(_calibrated("Training questions, before R-ft", [_binned("the LM likes it best", favourite, 0)]))
    if not drawn:
        return Markup()
    about = (
        "Passages by their weight p_R: a dot is a tenth, and large where the tenth holds many. The LM likes best the passage under which "
        "the right answer is most probable. On the dashed line p_R is the share itself."
    )
    weight = f"Mean weight on passages that hold an answer: {', '.join(says)} percent." if says else ""
    return join([element("p", about), element("p", weight), element("div", *drawn, class_="charts")])


def _binned(name: str, bins: Sequence[Mapping[str, float]], colour: int) -> Series:
    total = sum(one["n"] for one in bins)
    sizes = [2.5 + 7 * math.sqrt(one["n"] / total) for one in bins]
    notes = [f"{name}: {one['y']:.0%} of {one['n']:,} passages with p_R about {one['x']:.2f}" for one in bins]
    return Series(name, [(one["x"], one["y"]) for one in bins], colour, sizes=sizes, notes=notes)


def _calibrated(title: str, series: Sequence[Series]) -> Markup:
    return lines(title, series, x="p_R of the passage", y="share of passages", unit=True, diagonal="as often as p_R says")


def _by_k(data: Data) -> Markup:
    systems = {name: found for name, found in data.get("by_k", {}).items() if len(found) > 1}
    if not systems:
        return Markup()
    series = [
        Series(name, [(k, 100 * value["mean"]) for k, value in found], n, sizes=[4] * len(found), notes=[report.cell(v) for _, v in found])
        for n, (name, found) in enumerate(systems.items())
    ]
    ks = sorted({k for found in systems.values() for k, _ in found})
    rows = [[name, *(interval(dict(found).get(k)) for k in ks)] for name, found in systems.items()]
    drawn = lines("Exact match by number of passages", series, x="k", y="percent")
    return join([table(["system", *(f"k = {k}" for k in ks)], rows), element("div", drawn, class_="charts")])


# -- the run ----------------------------------------------------------------------------------------------------------------------------


def _stages(data: Data) -> Markup:
    stages = data.get("stages", ())
    if not stages:
        return Markup()
    seconds = [stage["facts"].get("seconds", 0.0) for stage in stages]
    memory = [stage["facts"].get("peak_memory_mib") for stage in stages]
    known = any(memory)
    head = ["stage", "", "time", *(["peak memory"] if known else []), "rate"]
    rows = []
    for stage, taken, peak in zip(stages, seconds, memory):
        rate = ", ".join(f"{key.removesuffix('_per_s')} {value:,.6g}/s" for key, value in stage["facts"].items() if key.endswith("_per_s"))
        cells = [element("span", stage["stage"], title=stage["folder"]), charts.bar(taken / max([*seconds, 1e-9])), duration(taken)]
        rows.append([*cells, *([f"{peak:,} MiB" if peak else "–"] if known else []), rate])
    says = "Each stage was made once; what was there already counts with the time it took then."
    if known:
        says += " Peak memory is the most that the process had held by the end of the stage, of this stage or of one before it."
    return join([element("p", says), table(head, rows, words=2)])


def _config(data: Data) -> Markup:
    parts = []
    for name, title in (("versions", "Versions and machine"), ("config", "All fields of the config")):
        if found := data.get(name):
            listed = table(["", ""], [[element("code", key), element("code", value)] for key, value in found.items()], words=2)
            parts.append(element("details", element("summary", title), listed, **({"open": ""} if name == "versions" else {})))
    return join(parts)


SECTIONS = (
    ("systems", "Systems", _systems),
    ("tasks", "Tasks", _tasks),
    ("by-k", "Exact match by k", _by_k),
    ("ranks", "Ranks before and after R-ft", _ranks),
    ("calibration", "Does p_R know what the LM needs?", _calibration),
    ("training", "Training", _trainings),
    ("entropy", "What R-ft was taught", _entropy),
    ("stages", "Time and memory", _stages),
    ("questions", "Questions", questions),
    ("config", "Config and versions", _config),
)
