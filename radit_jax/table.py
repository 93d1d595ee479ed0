"""The table RA-DIT ends with, and its report: rows of systems, paired differences between them, wall time of every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from radit_jax import artifacts, distributed, dossier
from radit_jax.artifacts import Artifact
from radit_jax.errors import InputError
from radit_jax.evaluation import evaluate, metrics, report
from radit_jax.logbook import say
from radit_jax.paths import last_part
from radit_jax.pipeline import Pipeline

System = tuple[bool, bool | None]  # LM tuned?, query encoder tuned? None: no retrieval
ROWS = {
    "no retrieval": (False, None),
    "neither tuned": (False, False),
    "R-ft only": (False, True),
    "LM-ft only": (True, False),
    "both": (True, True),
}
# What the table claims: (after, before, metric).
CLAIMS = (
    ("R-ft only", "neither tuned", "recall@1"),
    ("R-ft only", "neither tuned", "em"),
    ("LM-ft only", "neither tuned", "em"),
    ("both", "LM-ft only", "em"),
    ("both", "neither tuned", "em"),
)


def make(pipeline: Pipeline, names: Sequence[str] = tuple(ROWS)) -> dict[str, Any]:
    """Makes (or opens) the rows and returns the table as data; it is also written to `workdir/table.json`, if none with more rows is there.

    With all rows of ROWS there is a page about the run as well: `workdir/report.html`.
    """
    made = {name: row(pipeline, name) for name in names}
    folders = {name: artifact.path for name, artifact in made.items()}
    rows = [json.loads((folder / "row.json").read_text()) for folder in folders.values()]
    per_question = {name: json.loads((folder / "per_question.json").read_text()) for name, folder in folders.items()}
    differences: dict[str, dict[str, Any]] = {}
    for after, before, metric in CLAIMS:
        if after in folders and before in folders:
            difference = metrics.paired_difference(per_question[after][metric], per_question[before][metric])
            differences.setdefault(f"{after} − {before}", {})[metric] = difference
    value = {"rows": rows, "differences": differences, "seconds": pipeline.seconds, "config": pipeline.config.to_dict()}
    if distributed.leads():
        path = pipeline.workdir / "table.json"
        if not path.exists() or len(json.loads(path.read_text())["rows"]) <= len(rows):
            artifacts.write_json(path, value)
        if set(ROWS) <= set(made):
            say(f"report: {dossier.write(pipeline, value, made)}")
    return value


def row(pipeline: Pipeline, name: str, system: System | None = None, asked: ConfigDict | None = None) -> Artifact:
    """One row of the table: `row.json`, `per_question.json`, `answers.json`. By default a system of ROWS, asked as config.evaluate says."""
    lm_tuned, retriever_tuned = system or ROWS[name]
    c, examples = pipeline.config, pipeline.test_examples
    asked = asked or c.evaluate
    found = None if retriever_tuned is None else pipeline.retrieved("test", examples, pipeline.depth(asked.k), tuned=retriever_tuned)
    made_from = {
        "name": name,
        "lm": pipeline.tuned_lm.fingerprint if lm_tuned else pipeline.inputs["lm.checkpoint"],
        "dtype": c.lm.dtype,
        "retrieved": found[0].fingerprint if found else None,
        "score_scale": c.retriever.score_scale,
        "questions": artifacts.digest([evaluate.read_of(example) for example in examples]),
        "options": {key: value for key, value in asked.to_dict().items() if key != "batch_tokens"},  # which changes no answer
        "max_tokens": c.lm.max_tokens,
    }

    def write(folder: Path) -> dict[str, Any]:
        options = evaluate.EvaluateOptions(k=asked.k, level=asked.level, score_scale=c.retriever.score_scale)
        retrieved = None if found is None else list(found[1])
        answers, facts = evaluate.answer_all(name, pipeline.ensemble(lm_tuned), examples, retrieved, options)
        evaluate.write_row(folder, name, examples, answers, retrieved)
        return facts

    return pipeline.stage(f"row-{name.replace(' ', '_')}", made_from, write)


def chosen(pipeline: Pipeline, names: Sequence[str] | None) -> list[str]:
    """The rows asked for, else those whose models the workdir holds."""
    if names is not None:
        if unknown := [name for name in names if name not in ROWS]:
            raise InputError(f"--rows names {unknown[0]!r}, expected some of {', '.join(ROWS)}")
        return list(names)
    has_lm, has_retriever = pipeline.has("lm_ft"), pipeline.has("lsr_ft")
    return [name for name, (lm, retriever) in ROWS.items() if (has_lm or not lm) and (has_retriever or not retriever)]


def text(value: dict[str, Any]) -> str:
    """The table as people read it."""
    title = f"RA-DIT on {last_part(value['config']['corpus']['source'])} (means in percent, 95 % bootstrap intervals)"
    parts = [report.table(value["rows"], title=title)]
    if value["differences"]:
        parts.append(report.differences(value["differences"]))
    return "\n".join([*parts, report.stages(value["seconds"])])
