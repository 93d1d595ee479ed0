"""The table RA-DIT ends with: rows of systems, paired differences between them, wall time of every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from radit_jax import artifacts, distributed
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics, report
from radit_jax.pipeline import ROWS, Pipeline

# What the table claims: (after, before, metric).
CLAIMS = (
    ("R-ft only", "neither tuned", "recall@1"),
    ("R-ft only", "neither tuned", "em"),
    ("LM-ft only", "neither tuned", "em"),
    ("both", "LM-ft only", "em"),
    ("both", "neither tuned", "em"),
)


def make(pipeline: Pipeline, names: Sequence[str] = tuple(ROWS)) -> dict[str, Any]:
    """Makes (or opens) the rows and returns the table as data; it is also written to `workdir/table.json`."""
    folders = {name: pipeline.row(name).path for name in names}
    rows = [json.loads((folder / "row.json").read_text()) for folder in folders.values()]
    per_question = {name: json.loads((folder / "per_question.json").read_text()) for name, folder in folders.items()}
    differences: dict[str, dict[str, Any]] = {}
    for after, before, metric in CLAIMS:
        if after in folders and before in folders:
            difference = metrics.paired_difference(per_question[after][metric], per_question[before][metric])
            differences.setdefault(f"{after} − {before}", {})[metric] = difference
    value = {"rows": rows, "differences": differences, "seconds": pipeline.seconds, "config": pipeline.config.to_dict()}
    if distributed.leads():
        artifacts.write_json(pipeline.workdir / "table.json", value)
    return value


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
    title = f"RA-DIT on {value['config']['corpus']['source'].split('/')[-1]} (means in percent, 95 % bootstrap intervals)"
    parts = [report.table(value["rows"], title=title)]
    if value["differences"]:
        parts.append(report.differences(value["differences"]))
    return "\n".join([*parts, report.stages(value["seconds"])])
