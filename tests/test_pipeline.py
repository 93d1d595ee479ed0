"""All stages on tiny checkpoints, as a person runs them: end to end, skipped when done, killed in every stage, exported and asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

from radit_jax.weights.export import export_encoder, export_lm

ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# Where each stage is killed: as soon as this is there.
KILLS = (
    "passages-*.partial",
    "vectors-*.partial",
    "retrieved-train-*.partial",
    "lm_scores-train-*.partial",
    "lsr_ft-*.partial/checkpoints/2",
    "lm_ft-*.partial/checkpoints/4",
    "row-both-*.partial",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    ENV["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))  # each program is compiled once for all the runs here
    folder = tmp_path_factory.mktemp("models")
    export_lm(tiny.lm(), tiny.tokenizer(), folder / "lm")
    export_encoder(tiny.encoder(), tiny.tokenizer(), folder / "encoder")
    return folder


def command(models: Path, workdir: Path, script: str = "train", *extra: str) -> list[str]:
    fields = {
        "lm.checkpoint": models / "lm",
        "lm.dtype": "float32",
        "lm.max_tokens": 512,
        "retriever.query_encoder": models / "encoder",
        "retriever.document_encoder": models / "encoder",
        "retriever.dtype": "float32",
        "retriever.max_passage_tokens": 32,
        "retriever.max_query_tokens": 32,
        "corpus.source": "invented:passages=68,seed=1",
        "train.limit": 24,
        "test.limit": 6,
        "retrieval.k": 4,
        "evaluate.k": 2,
        "evaluate.max_new_tokens": 4,
        "lm_ft.row_length": 512,
        "lm_ft.rows": 2,
        "lm_ft.steps": 6,
        "lm_ft.checkpoint_every": 2,
        "lsr_ft.batch": 6,
        "lsr_ft.epochs": 2,
        "lsr_ft.checkpoint_every": 2,
        "lsr_ft.validate_every": 2,
        "lsr_ft.completion_share": 0.25,
        "lsr_ft.completion_examples": 8,
        "lsr_ft.completion_tokens": 40,
        "lsr_ft.completion_min_tokens": 60,
    }
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    return [sys.executable, str(ROOT / "launch" / f"{script}.py"), f"--workdir={workdir}", *flags, *extra]


def finish(arguments: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    done = finish(command(models, workdir))
    for name in ("no retrieval", "neither tuned", "R-ft only", "LM-ft only", "both"):
        assert name in done.stdout
    return workdir


def results(workdir: Path) -> dict[str, object]:
    """Everything that must be the same: losses of every step, scores, answers."""
    found: dict[str, object] = {}
    for path in sorted(workdir.glob("*/answers.json")):
        found[str(path.relative_to(workdir))] = json.loads(path.read_text())
    for path in sorted(workdir.glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(workdir))] = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    for path in sorted(workdir.glob("lm_scores-*/*.npy")):
        found[str(path.relative_to(workdir))] = path.read_bytes()
    return found


def test_a_second_run_makes_nothing(models, undisturbed):
    done = finish(command(models, undisturbed))
    assert ": making" not in done.stderr and "both: already there" in done.stderr


def test_killed_in_every_stage_it_ends_where_the_undisturbed_run_ends(models, undisturbed, tmp_path):
    for pattern in KILLS:
        process = subprocess.Popen(command(models, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=ENV)
        while process.poll() is None and not any(tmp_path.glob(pattern)):
            try:
                process.wait(timeout=0.002)
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode is None, f"the run ended before {pattern} was seen"
        process.kill()
        process.wait()
    finish(command(models, tmp_path))
    assert not list(tmp_path.glob("*.partial"))
    assert results(tmp_path) == results(undisturbed)


def test_a_workdir_is_asked_evaluated_and_exported_with_the_config_that_made_it(undisturbed, tmp_path):
    def short(script: str, *extra: str) -> subprocess.CompletedProcess:
        return finish([sys.executable, str(ROOT / "launch" / f"{script}.py"), f"--workdir={undisturbed}", *extra])

    assert len(json.loads(short("ask", "who?", "--json").stdout)["passages"]) == 2
    short("evaluate", f"--output={tmp_path / 'eval.json'}")
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["no retrieval", "neither tuned", "R-ft only", "LM-ft only", "both"]
    assert all(set(row) == {"name", "n", "metrics"} and row["n"] == 6 for row in rows)
    assert set(rows[1]["metrics"]) >= {"em", "f1", "recall@1", "recall@5", "recall@10"}
    assert set(rows[1]["metrics"]["em"]) == {"mean", "ci95"}
    short("export", f"--output={tmp_path / 'out'}")
    for folder in ("lm", "query_encoder", "document_encoder"):
        assert (tmp_path / "out" / folder / "model.safetensors").exists()


def test_a_diverged_loss_stops_with_the_step_and_the_examples(models, tmp_path):
    flags = ["--config.goal=lm_ft", "--config.lm_ft.optimizer.peak_lr=1e30", "--config.lm_ft.optimizer.warmup_steps=0"]
    done = subprocess.run(command(models, tmp_path, "train", *flags), capture_output=True, text=True, cwd=ROOT, env=ENV, timeout=500)
    assert done.returncode == 1
    line = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(line) == 1 and "step" in line[0] and "invented1-" in line[0] and "last good checkpoint" in line[0]
