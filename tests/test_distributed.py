"""Several real processes on loopback: they find each other or say who is missing, and train what one process trains."""

from __future__ import annotations

import json

import numpy as np
import processes
import pytest
from processes import ROOT

from radit_jax import logbook
from radit_jax.distributed import Cluster, from_environment
from radit_jax.errors import InputError

WORKER = str(ROOT / "tests" / "train_worker.py")
STEPS = 20

# -- who and where ------------------------------------------------------------------------------------------------------------------------

SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "41007"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[003-005,009],login", "gpu003"),
        ("gpu[7,9]", "gpu7"),
        ("gpu12", "gpu12"),
        ("a1,b[2-3]", "a1"),
        ("rack-2-node[01-04]", "rack-2-node01"),
    ],
)
def test_slurm_describes_the_cluster(nodes, first):
    assert from_environment({**SLURM, "SLURM_STEP_NODELIST": nodes}) == Cluster(f"{first}:21007", 8, 3)


def test_gke_describes_the_cluster_and_a_single_host_does_not():
    workers = {"TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc", "TPU_WORKER_ID": "1"}
    assert from_environment(workers) == Cluster("t-0.svc:8476", 2, 1)
    assert from_environment({**workers, "TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert from_environment({}) is None
    # A batch script is one process, whatever the job has: its srun starts the others.
    assert from_environment({**SLURM, "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}) is None


@pytest.mark.parametrize(("given", "says"), [(("h:1", 2, 2), "process 2 of 2"), (("h", 2, 0), "host:port"), (("h:1", 0, 0), "0 of 0")])
def test_a_cluster_that_cannot_be_is_named(given, says):
    with pytest.raises(InputError, match=says):
        Cluster(*given)


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error:")]


def test_a_process_that_never_joins_is_named_in_one_line(tmp_path):
    script, port = str(ROOT / "launch" / "prepare.py"), processes.free_port()
    members = processes.membership(port, 4)
    calls = [[script, f"--workdir={tmp_path}", "--join_timeout=8", *members[index]] for index in (0, 1, 3)]
    for code, _, stderr in processes.finish([process for call in calls for process in processes.start(call, 1)]):
        assert code == 2 and len(errors(stderr)) == 1 and "Traceback" not in stderr
        assert "process 2 of 4 did not join within 8 s" in errors(stderr)[0]


def test_half_a_description_and_a_mesh_without_all_processes_are_named(tmp_path):
    script = str(ROOT / "launch" / "prepare.py")
    (half,) = processes.finish(processes.start([script, f"--workdir={tmp_path}", "--processes=2"], 1))
    assert half[0] == 2 and "--coordinator is missing" in errors(half[2])[0]
    for code, _, stderr in processes.finish(processes.start([script, f"--workdir={tmp_path}"], 2)):  # the default mesh is 1×1
        assert code == 2 and "has no device of process 1" in errors(stderr)[0] and "config.mesh.data=-1" in errors(stderr)[0]


def test_a_mesh_that_does_not_divide_the_batch_is_named_before_any_stage(tmp_path):
    script, mesh = str(ROOT / "launch" / "train.py"), ["--config.mesh.data=8", "--config.lm_ft.rows=12"]
    ((code, _, stderr),) = processes.finish(processes.start([script, f"--workdir={tmp_path}", *mesh], 1, devices=8))
    assert code == 2 and len(errors(stderr)) == 1
    assert "lm_ft.rows: a batch of 12 rows does not divide over the 8 devices of the mesh's data axis" in errors(stderr)[0]


# -- training -----------------------------------------------------------------------------------------------------------------------------


def train(folder, mesh: str, count: int, devices: int, stop_at: int = STEPS) -> list[tuple[int, str, str]]:
    folder.mkdir(exist_ok=True)
    done = processes.finish(processes.start([WORKER, str(folder), mesh, str(stop_at)], count, devices=devices))
    assert [code for code, _, _ in done] == [0] * count, done[0][2][-3000:]
    return done


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(folder, "1x1", 1, 1)
    return folder


def check(folder, alone) -> None:
    """Losses of all steps and parameters as one process has them, to 1e-4 relative."""
    for kind in ("lm", "lsr"):
        losses, expected = ([line["loss"] for line in logbook.read(each / kind / "metrics.jsonl")] for each in (folder, alone))
        assert len(losses) == STEPS
        np.testing.assert_allclose(losses, expected, rtol=1e-4, err_msg=kind)
        params, expected = (dict(np.load(each / f"{kind}.npz")) for each in (folder, alone))
        assert params.keys() == expected.keys()
        for path, array in expected.items():
            np.testing.assert_allclose(params[path], array, rtol=1e-4, atol=1e-4 * np.abs(array).max() + 1e-7, err_msg=path)


def rows(done) -> list[list[int]]:
    """Which rows of every batch each process has read."""
    return [json.loads(line) for _, stdout, _ in done for line in stdout.splitlines() if line.startswith("[") and "Gloo" not in line]


def test_two_processes_train_what_one_trains(alone, tmp_path):
    done = train(tmp_path, "2x2", 2, 2)
    check(tmp_path, alone)
    assert rows(done) == [[0, 1], [2, 3]]  # all rows of a batch, none twice
    assert "lm: step 20/20" in done[0][2] and "step" not in done[1][2]  # one process logs
    (last,) = (tmp_path / "lm" / "checkpoints").glob("20")
    for index in (0, 1):  # each has written its part, and summed its share
        assert list(last.glob(f"*/ocdbt.process_{index}/d/*")) and (last / f"sums-{index}-of-2.json").exists()


def test_four_processes_are_stopped_and_one_goes_on_with_another_mesh(alone, tmp_path):
    done = train(tmp_path, "4x1", 4, 1, stop_at=10)
    assert rows(done) == [[0], [1], [2], [3]]
    (done,) = train(tmp_path, "1x2", 1, 2)
    assert "lm: going on from step 10 of 20" in done[2]
    check(tmp_path, alone)
