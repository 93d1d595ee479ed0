"""The benchmark: the peer's result is checked before a ratio is printed; with a torch environment, all four kinds compute the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

from radit_jax import bench, peer
from radit_jax.errors import InputError
from radit_jax.weights.export import export_lm

TORCH = os.environ.get("RADIT_PEER_PYTHON")
# A peer without torch that answers what its job says.
ECHO = """
import json, sys
job = json.load(open(sys.argv[1]))
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 3.0, "cpu_seconds": 6.0, "peak_mib": 1, "outputs": job["says"]}), flush=True)
"""


@pytest.fixture
def echo(tmp_path, monkeypatch):
    script = tmp_path / "echo.py"
    script.write_text(ECHO)
    monkeypatch.setattr(peer, "SCRIPT", script)


def summing(says: int) -> bench.Work:
    """Work whose result is 7, and a peer that says something."""
    return bench.Work(
        "things", 12, lambda: 7, {"says": says}, lambda ours, theirs: {"apart": abs(ours - theirs)}, lambda found: found["apart"] < 0.5
    )


def test_a_ratio_is_printed_only_when_both_computed_the_same(echo):
    same = bench.compare("sum", summing(7), repetitions=2, peer_python=sys.executable)
    assert same["same"] and same["agreement"] == {"apart": 0.0}
    # The peer says that it took 3 s for 12 things; we took next to nothing.
    assert same["peer"]["median"] == 4.0 and same["ratio"] > 1000

    other = bench.compare("sum", summing(8), repetitions=2, peer_python=sys.executable)
    assert not other["same"] and other["ratio"] is None and "did not compute the same" in bench.text([other])


def test_ratio_is_the_medians_and_leaves_the_first_run_out(echo):
    ours = iter([50.0, 3.0, 1.0, 1.5])

    def timed(work):
        return work(), {"seconds": next(ours), "cpu_seconds": 2.0, "peak_mib": 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "timed", timed)
        result = bench.compare("sum", summing(7), repetitions=3, peer_python=sys.executable)
    assert result["ours"] | {"peak_mib": 0} == {"median": 8.0, "least": 4.0, "most": 12.0, "cpu_seconds": 2.0, "peak_mib": 0}
    assert result["ratio"] == 3.0 / 1.5 and result["cpu_ratio"] == 6.0 / 2.0


def test_without_a_peer_ours_alone_is_printed():
    result = bench.compare("sum", summing(7), repetitions=1, peer_python=None)
    assert result["ratio"] is None and result["ours"]["median"] > 0 and "RADIT_PEER_PYTHON" in bench.text([result])


@pytest.mark.parametrize("python", ["/nowhere/python", sys.executable])
def test_a_peer_that_does_not_come_up_is_named(python, monkeypatch, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("import torch_that_is_not_there")
    monkeypatch.setattr(peer, "SCRIPT", script)
    with pytest.raises(InputError, match="peer"):
        bench.compare("sum", summing(7), repetitions=1, peer_python=python)


def run(tmp_path, kind: str, *extra: str) -> subprocess.CompletedProcess:
    export_lm(tiny.lm(), tiny.tokenizer(), tmp_path / "lm")
    fields = {
        "lm.checkpoint": tmp_path / "lm",
        "lm.dtype": "float32",
        "lm.max_tokens": 512,
        "retriever.dtype": "float32",
        "retriever.max_passage_tokens": 32,
        "corpus.source": "invented:passages=68,seed=1",
        "train.limit": 24,
        "test.limit": 6,
        "evaluate.max_new_tokens": 4,
        "lm_ft.row_length": 512,
        "lm_ft.rows": 2,
    }
    flags = [f"--config.{field}={value}" for field, value in fields.items()]
    command = [sys.executable, str(ROOT / "launch" / "bench.py"), kind, f"--workdir={tmp_path}/work", "--repetitions=1", "--json", *flags]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *extra], capture_output=True, text=True, cwd=ROOT, env=environment)


def test_a_wrong_kind_is_one_line_and_exit_2(tmp_path):
    done = run(tmp_path, "train")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "lm_ft" in done.stderr


@pytest.mark.skipif(not TORCH, reason="RADIT_PEER_PYTHON names no Python with torch and transformers")
def test_ours_and_torch_compute_the_same(tmp_path):
    done = run(tmp_path, "all", "--records=4")
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["kind"] for result in results] == list(bench.KINDS)
    for result in results:
        assert result["same"] and result["ratio"] > 0, result
