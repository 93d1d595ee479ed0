"""All stages on tiny checkpoints, as a person runs them: end to end, skipped when done, stopped in every stage, exported and asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import processes
import pytest
from processes import ROOT
from test_page import Reader
from torture import command, differences, export_models, results, torture

from radit_jax import logbook

SETTINGS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# Where each stage is stopped and how: as soon as this is there.
STOPS = (
    ("passages-*.partial", signal.SIGKILL),
    ("vectors-*.partial", signal.SIGTERM),
    ("retrieved-train-*.partial", signal.SIGKILL),
    ("lm_scores-train-*.partial", signal.SIGTERM),
    ("lsr_ft-*.partial/checkpoints/2", signal.SIGKILL),
    ("lsr_ft-*.partial/checkpoints/4", signal.SIGTERM),
    ("lm_ft-*.partial/metrics.jsonl", signal.SIGTERM),
    ("lm_ft-*.partial/checkpoints/4", signal.SIGKILL),
    ("row-both-*.partial", signal.SIGTERM),
)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    SETTINGS["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))  # each program is compiled once for all the runs here
    return export_models(tmp_path_factory.mktemp("models"))


def start(arguments: list[str]) -> subprocess.Popen:
    return processes.start(arguments, 1, **SETTINGS)[0]


def finish(arguments: list[str]) -> tuple[str, str]:
    """stdout and stderr of a run that must succeed."""
    ((code, stdout, stderr),) = processes.finish([start(arguments)])
    assert code == 0, stderr[-3000:]
    return stdout, stderr


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    stdout, _ = finish(command(models, workdir))
    for name in ("no retrieval", "neither tuned", "R-ft only", "LM-ft only", "both"):
        assert name in stdout
    return workdir


def test_a_second_run_makes_nothing(models, undisturbed):
    _, stderr = finish(command(models, undisturbed))
    assert ": making" not in stderr and "both: already there" in stderr


def test_it_ends_with_a_report_of_all_it_made(undisturbed):
    read = Reader((undisturbed / "report.html").read_text())
    made = {"systems", "ranks", "calibration", "training", "entropy", "stages", "questions", "config"}
    assert made <= set(read.values("id")) and "the tuned LM is right from it" in read.text
    for stage in ("passages", "vectors", "lm_scores-completion", "lsr_ft", "lm_ft", "row-both"):
        assert stage in read.text
    assert "MiB" in read.text


def test_stopped_in_every_stage_it_ends_where_the_undisturbed_run_ends(models, undisturbed, tmp_path):
    for pattern, how in STOPS:
        process = start(command(models, tmp_path))
        while process.poll() is None and not any(tmp_path.glob(pattern)):
            try:
                process.wait(timeout=0.002)
            except subprocess.TimeoutExpired:
                continue
        assert process.returncode is None, f"the run ended before {pattern} was seen"
        process.send_signal(how)
        ((code, _, stderr),) = processes.finish([process])
        if how == signal.SIGTERM:
            assert code == 0 and "preempted" in stderr and "Traceback" not in stderr, (pattern, stderr[-2000:])
    finish(command(models, tmp_path))
    assert not list(tmp_path.glob("*.partial"))
    assert differences(results(tmp_path), results(undisturbed)) == []


def test_two_processes_are_killed_at_random_and_end_where_two_undisturbed_ones_end(tmp_path):
    assert torture(tmp_path, kills=2, count=2, within_s=15) == 0


def test_a_full_disk_is_named_and_nothing_is_lost(models, undisturbed, tmp_path):
    """In every stage that a small disk reaches; with room again, the same command ends where the undisturbed run ends."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk to fill needs the right to mount a tmpfs")
    try:
        for size in ("64k", "300k"):
            subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
            ((code, _, stderr),) = processes.finish([start(command(models, disk / "w"))])
            lines = [line for line in stderr.splitlines() if line.startswith("error:")]
            assert code == 1 and len(lines) == 1 and "Traceback" not in stderr, (size, stderr[-2000:])
            assert os.strerror(28) in lines[0] and str(disk) in lines[0], lines
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        finish(command(models, disk / "w"))
        assert differences(results(disk / "w"), results(undisturbed)) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_workdir_is_asked_evaluated_and_exported_with_the_config_that_made_it(undisturbed, tmp_path):
    def short(script: str, *extra: str) -> str:
        return finish([str(ROOT / "launch" / f"{script}.py"), f"--workdir={undisturbed}", *extra])[0]

    assert len(json.loads(short("ask", "who?", "--json"))["passages"]) == 2
    short("evaluate", f"--output={tmp_path / 'eval.json'}")
    rows = json.loads((tmp_path / "eval.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["no retrieval", "neither tuned", "R-ft only", "LM-ft only", "both"]
    assert all(set(row) == {"name", "n", "metrics"} and row["n"] == 6 for row in rows)
    assert set(rows[1]["metrics"]) >= {"em", "f1", "recall@1", "recall@5", "recall@10"}
    assert set(rows[1]["metrics"]["em"]) == {"mean", "ci95"}
    short("evaluate", f"--output={tmp_path / 'one.json'}", "--rows=both")
    one, whole = (json.loads(path.read_text()) for path in (tmp_path / "one.json", undisturbed / "table.json"))
    assert one["rows"] == rows[-1:] and whole["rows"] == rows  # a few rows do not take the place of the table
    short("export", f"--output={tmp_path / 'out'}")
    for folder in ("lm", "query_encoder", "document_encoder"):
        assert (tmp_path / "out" / folder / "model.safetensors").exists()


def test_tasks_and_retrieval_are_asked_of_a_workdir_and_not_twice(undisturbed, tmp_path):
    questions = [
        {"question": f"which {n}?", "answers": ["moss"], "choices": ["tern", "moss"][:: 1 - 2 * (n % 2)], "gold_id": f"invented1-{n}"}
        for n in range(7)
    ]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    open_ones = [{key: one[key] for key in ("question", "answers")} for one in questions]
    (tmp_path / "open.jsonl").write_text("".join(json.dumps(one) + "\n" for one in open_ones))

    def short(script: str, *extra: str) -> tuple[str, str]:
        return finish([str(ROOT / "launch" / f"{script}.py"), f"--workdir={undisturbed}", *extra])

    how = [f"--tasks={tmp_path / 'choices.jsonl'},{tmp_path / 'open.jsonl'}", f"--output={tmp_path / 'tasks.json'}"]
    shown, _ = short("evaluate", *how, "--rows=no retrieval,both", "--config.tasks.shots=2")
    found = json.loads((tmp_path / "tasks.json").read_text())
    assert set(found["rows"]) == {"no retrieval", "both"} and found["metrics"] == {"choices": "acc", "open": "em"}
    assert all(row[task]["n"] == 5 for row in found["rows"].values() for task in row)  # two of seven are the examples
    assert "choices (acc)" in shown and "paper" not in shown  # the paper has no 2-shot row
    _, said = short("evaluate", *how, "--rows=no retrieval,both", "--config.tasks.shots=2", "--config.evaluate.level=concat")
    assert said.count(": making task-") == 4
    _, said = short("evaluate", *how, "--rows=no retrieval,both", "--config.tasks.shots=2", "--config.evaluate.level=concat")
    assert ": making" not in said

    shown, _ = short("retrieval", f"--questions={tmp_path / 'open.jsonl'}", "--k=20", f"--folder={tmp_path / 'found'}")
    assert "answer mrr" in shown and "difference" in shown
    runs = {path.name: path.read_text().splitlines() for path in (tmp_path / "found").glob("*.run")}
    assert set(runs) == {"open.untuned.run", "open.R-ft.run"}
    for lines in runs.values():
        assert {tuple(line.split()[1::2])[0] for line in lines} == {"Q0"} and len({line.split()[0] for line in lines}) == 7
    moved = [json.loads(line) for line in (tmp_path / "found" / "open.moved.jsonl").read_text().splitlines()]
    assert all(set(row) == {"id", "question", "moved", "before", "after"} for row in moved)


def test_a_mixture_is_trained_on_and_the_best_checkpoint_is_that_of_the_development_tasks(models, tmp_path):
    answers = [("moss", "oak"), ("tern", "loch")]
    for name, (right, wrong) in zip(("one", "two"), answers):
        lines = [{"question": f"{name} {n}?", "answers": [right], "reasoning": wrong} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"question": f"{n} and {n}?", "answer": f"It is {2 * n}.\n#### {2 * n}"} for n in range(12)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = {
        "goal": "lm_ft",
        "train.source": f"{tmp_path / 'one.jsonl'},gsm8k:{tmp_path / 'sums.jsonl'}[:8]",
        "train.split": "",
        "lm_ft.mixture.text_share": 0.1,
        "lm_ft.dev_tasks": str(tmp_path / "two.jsonl"),
        "lm_ft.validate_every": 2,
    }
    how = command(models, tmp_path / "w", "train", *(f"--config.{field}={value}" for field, value in flags.items()))
    shown, said = finish(how)
    sets = ("one", "gsm8k", "text")
    table = [line.split() for line in said.splitlines() if line.startswith(tuple(f"lm_ft: {name} " for name in sets))]
    assert [row[1] for row in table] == list(sets) and [row[2] for row in table[:2]] == ["12", "8"]
    assert [float(row[-2]) for row in table] == [0.54, 0.36, 0.1]
    folder = Path(shown.strip())
    best, facts = json.loads((folder / "best.json").read_text()), json.loads((folder / "manifest.json").read_text())["facts"]
    assert set(best) == {"two", "mean", "step"} and best["step"] in (2, 4, 6) and facts["best_mean"] == best["mean"]
    written = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written if "dev_mean" in line] == [2, 4, 6]
    assert (folder / "params").is_dir() and not (folder / "best").exists()


def test_low_rank_maps_killed_and_cut_over_two_processes_end_where_an_undisturbed_run_ends(models, tmp_path):
    fields = {"goal": "lm_ft", "lm_ft.lora.rank": 2, "lm_ft.lora.targets": ".*", "lm_ft.lora.quantize": "int8"}

    def arguments(name: str, *extra: str) -> list[str]:
        return command(models, tmp_path / name, "train", *(f"--config.{field}={value}" for field, value in fields.items()), *extra)

    finish(arguments("undisturbed"))
    process = start(arguments("killed"))
    while process.poll() is None and not any((tmp_path / "killed").glob("lm_ft-*.partial/checkpoints/4")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.002)
    assert process.returncode is None
    process.kill()
    process.communicate()
    _, stderr = finish(arguments("killed"))
    assert "lm_ft: going on from step 4 of 6" in stderr
    assert not differences(results(tmp_path / "undisturbed"), results(tmp_path / "killed"))
    done = processes.finish(processes.start(arguments("two", "--config.mesh.data=-1"), 2, **SETTINGS))
    assert [code for code, _, _ in done] == [0, 0], done[0][2][-3000:]
    one, two = (
        [line["loss"] for line in logbook.read(next((tmp_path / name).glob("lm_ft-*/metrics.jsonl")))] for name in ("killed", "two")
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)


def test_a_diverged_loss_stops_with_the_step_and_the_examples(models, tmp_path):
    flags = ["--config.goal=lm_ft", "--config.lm_ft.optimizer.peak_lr=1e30", "--config.lm_ft.optimizer.warmup_steps=0"]
    ((code, _, stderr),) = processes.finish([start(command(models, tmp_path, "train", *flags))])
    assert code == 1
    line = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert len(line) == 1 and "step" in line[0] and "invented1-" in line[0] and "last good checkpoint" in line[0]
