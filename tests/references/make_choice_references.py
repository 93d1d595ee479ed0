"""Writes choice_references.json: log-likelihoods of the choices of choice_records.py by lm-evaluation-harness, for SmolLM2-135M-Instruct.

After launch/export.py (or weights.export.export_lm) has written a folder that transformers reads, in an environment with lm-eval:

    python tests/references/make_choice_references.py LM_FOLDER

The tasks are lm-eval's own definitions; only their data is replaced, since it would come from a hub.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import choice_records
import lm_eval
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

THEIRS = {"siqa": "social_iqa", "obqa": "openbookqa"}  # where their name is another


def main(folder: str) -> None:
    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=8)
    found = {}
    for name, records in choice_records.records().items():
        task = task_on(name, [as_theirs(name, record) for record in records])
        task.build_all_requests(limit=None, rank=0, world_size=1)
        requests = task.instances
        likelihoods = [logp for logp, _ in model.loglikelihood(requests)]
        by_record: dict[int, list[float]] = {}
        for request, logp in zip(requests, likelihoods):
            by_record.setdefault(request.doc_id, []).append(float(logp))
        found[name] = [by_record[n] for n in range(len(records))]
        print(name, sum(map(len, found[name])), "log-likelihoods", flush=True)
    about = {"lm_eval": lm_eval.__version__, "torch": torch.__version__}
    path = Path(__file__).with_name("choice_references.json")
    path.write_text(json.dumps({"about": about, "logprobs": {k: [[round(x, 5) for x in row] for row in v] for k, v in found.items()}}))


def as_theirs(name: str, record: dict) -> dict:
    """BoolQ is read in SuperGLUE's schema there."""
    return {**record, "label": int(record["answer"])} if name == "boolq" else record


def task_on(name: str, records: list[dict]) -> ConfigurableTask:
    """lm-eval's task of this name on these records."""
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    data = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"validation": file.name}}}
    splits = {"training_split": None, "fewshot_split": None, "test_split": None, "validation_split": "validation"}
    definition = load_yaml(TaskManager().task_index[THEIRS.get(name, name)].yaml_path, resolve_func=True)
    definition.pop("tag", None)
    return ConfigurableTask(config={**definition, **data, **splits, "num_fewshot": 0})


if __name__ == "__main__":
    main(sys.argv[1])
