"""Writes retrieval_references.json: measures of random_runs.py by ir-measures (trec_eval), in an environment with it.

python tests/references/make_retrieval_references.py
"""

from __future__ import annotations

import json
from pathlib import Path

import ir_measures
import random_runs
from ir_measures import RR, R, nDCG

MEASURES = {"recall@5": R @ 5, "recall@10": R @ 10, "mrr": RR, "ndcg@10": nDCG @ 10}


def main() -> None:
    relevant, ranked = random_runs.runs()
    scored = {question: {name: 1000.0 - rank for rank, name in enumerate(names)} for question, names in ranked.items()}
    found: dict[str, dict[str, float]] = {question: {} for question in relevant}
    named = {str(measure): name for name, measure in MEASURES.items()}
    for metric in ir_measures.iter_calc(list(MEASURES.values()), relevant, scored):
        found[metric.query_id][named[str(metric.measure)]] = metric.value
    value = {"about": {"ir_measures": ir_measures.__version__}, "measures": found}
    Path(__file__).with_name("retrieval_references.json").write_text(json.dumps(value))


if __name__ == "__main__":
    main()
