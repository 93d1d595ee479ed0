"""Kills the whole pipeline at random moments, again and again, and shows that it ends bit for bit where an undisturbed run ends.

    python tests/torture.py --kills=25 --processes=1
    python tests/torture.py --kills=25 --processes=2

Tiny models, every stage, real processes. Each kill is SIGKILL to one process, chosen at random, after a random part of the time that the
undisturbed run takes; the others end by themselves or are killed after a while, as a scheduler would do it. A last run finishes.
Prints one line a kill and a summary; exit 0 only if every result is the same.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import processes
import tiny
from processes import ROOT

from radit_jax.weights.export import export_encoder, export_lm

OTHERS_S = 30  # for the processes that were not killed to end by themselves
FIELDS = {
    "lm.dtype": "float32",
    "lm.max_tokens": 512,
    "retriever.dtype": "float32",
    "retriever.max_passage_tokens": 32,
    "retriever.max_query_tokens": 32,
    "corpus.source": "invented:passages=68,seed=1",
    "train.limit": 24,
    "test.limit": 6,
    "retrieval.k": 4,
    "evaluate.k": 2,
    "evaluate.max_new_tokens": 4,
    "lm_ft.lora.rank": 0,
    "lm_ft.optimizer.peak_lr": 1e-4,
    "lm_ft.row_length": 512,
    "lm_ft.rows": 2,
    "lm_ft.steps": 6,
    "lm_ft.checkpoint_every": 2,
    "lsr_ft.encoders": "query",
    "lsr_ft.batch": 6,
    "lsr_ft.epochs": 2,
    "lsr_ft.checkpoint_every": 2,
    "lsr_ft.validate_every": 2,
    "lsr_ft.completion_share": 0.25,
    "lsr_ft.completion_examples": 8,
    "lsr_ft.completion_tokens": 40,
    "lsr_ft.completion_min_tokens": 60,
}


def export_models(folder: Path) -> Path:
    """Tiny checkpoints for `command`."""
    export_lm(tiny.lm(), tiny.tokenizer(), folder / "lm")
    export_encoder(tiny.encoder(), tiny.tokenizer(), folder / "encoder")
    return folder


def fields(models: Path) -> dict[str, object]:
    """What of the config makes a small run on the checkpoints of `export_models`."""
    encoders = {f"retriever.{side}_encoder": str(models / "encoder") for side in ("query", "document")}
    return {"lm.checkpoint": str(models / "lm"), **encoders, **FIELDS}


def command(models: Path, workdir: Path, script: str = "train", *extra: str) -> list[str]:
    """The arguments of a Python that runs the whole pipeline on tiny models; `extra` comes last and wins."""
    flags = [f"--config.{field}={value}" for field, value in fields(models).items()]
    return [str(ROOT / "launch" / f"{script}.py"), f"--workdir={workdir}", *flags, *extra]


def results(workdir: Path) -> dict[str, object]:
    """Everything that must be the same: vectors, retrieved passages, scores, losses of every step, answers, rows of the table."""
    found: dict[str, object] = {}
    for pattern in ("*/answers.json", "*/row.json"):
        found |= {str(path.relative_to(workdir)): json.loads(path.read_text()) for path in workdir.glob(pattern)}
    for path in workdir.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[str(path.relative_to(workdir))] = [{k: v for k, v in line.items() if k != "time"} for line in lines]
    found |= {str(path.relative_to(workdir)): path.read_bytes() for path in workdir.glob("*/*.npy")}
    return found


def differences(found: dict[str, object], expected: dict[str, object]) -> list[str]:
    """The files that are not as expected."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def stage(workdir: Path) -> str:
    """What was in the making when a run was killed."""
    making = sorted(path.name.rsplit("-", 1)[0] for path in workdir.glob("*.partial"))
    return making[-1] if making else "between stages"


def run(arguments: list[str], count: int, cache: Path, kill_after: float | None = None) -> list[int]:
    """Exit codes of one run of `count` processes; one of them is killed after so many seconds."""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    mesh = ["--config.mesh.data=-1"] if count > 1 else []
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "cwd": ROOT, "env": processes.environment(1, **settings)}
    members = processes.membership(processes.free_port(), count)
    started = [subprocess.Popen([sys.executable, *arguments, *mesh, *flags], **quiet) for flags in members]
    if kill_after is None:
        outputs = [process.communicate()[1].decode() for process in started]
        if any(process.returncode for process in started):
            sys.exit("".join(outputs)[-3000:])
        return [0] * count
    try:
        started[0].wait(kill_after)
    except subprocess.TimeoutExpired:
        random.choice(started).send_signal(signal.SIGKILL)
    for process in started:
        try:
            process.communicate(timeout=OTHERS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    return [process.returncode for process in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    random.seed(given.seed)
    with tempfile.TemporaryDirectory(prefix="torture") as folder:
        print(f"{given.kills} kills of {given.processes} process(es), seed {given.seed}")
        sys.exit(torture(Path(folder), given.kills, given.processes))


def torture(folder: Path, kills: int, count: int, within_s: float = 0.0) -> int:
    """The number of files that differ in the end. Kills fall into the first `within_s` seconds of a run (0: into all of a compiled run)."""
    models, cache, workdir = export_models(folder / "models"), folder / "cache", folder / "killed"
    began = time.monotonic()
    run(command(models, folder / "undisturbed"), count, cache)
    first = time.monotonic() - began
    expected, wrong, seconds = results(folder / "undisturbed"), [], within_s
    if not within_s:
        began = time.monotonic()
        run(command(models, folder / "again"), count, cache)  # everything is compiled now
        seconds, wrong = time.monotonic() - began, differences(results(folder / "again"), expected)
    print(f"undisturbed: {first:.0f} s, compiled {seconds:.0f} s, {len(expected)} files to compare", flush=True)
    stages: collections.Counter[str] = collections.Counter()
    finished = 1
    while stages.total() < kills and not wrong:
        after = random.uniform(0.1, 1.0) * seconds
        codes = run(command(models, workdir), count, cache, kill_after=after)
        if any(codes):
            stages[stage(workdir)] += 1
            print(f"kill {stages.total():2} after {after:4.1f} s: {stage(workdir)}, exit codes {codes}", flush=True)
            continue
        # The run was quicker than the kill: it is compared, and begun anew, so that every kill meets work.
        finished, wrong = finished + 1, differences(results(workdir), expected)
        workdir = workdir.with_name(f"killed-{finished}")
    run(command(models, workdir), count, cache)
    wrong = wrong or differences(results(workdir), expected)
    print(f"killed in: {', '.join(f'{name} {times}' for name, times in stages.most_common())}; {finished} killed runs went on to their end")
    print(f"{len(expected) - len(wrong)} of {len(expected)} files are bit for bit those of the undisturbed run")
    print("".join(f"  not {name}\n" for name in wrong), end="")
    return len(wrong)


if __name__ == "__main__":
    main()
