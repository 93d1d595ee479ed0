"""Several processes that run one program (jax.distributed): how they find each other, who leads, and where they wait.

Every process runs the same stages in the same order. What is computed on the mesh is computed by all; what is written whole is written by
the leader, what is written in shards by all. The workdir is on a file system that all of them see.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import sys
import time
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from radit_jax.errors import InputError

JOIN_TIMEOUT_S = 300  # for all processes to be there
WAIT_TIMEOUT_S = 24 * 3600  # for each other inside a stage: one process may split a whole corpus meanwhile
HEARTBEAT_S = 60  # a process that is silent for so long is gone, and the others end
LEAVE_S, LEADER_LAST_S = 5, 1  # for the others to leave as well
PORT = 8476  # of the coordinator, where none is named (JAX's own choice on TPU pods)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Where process 0 listens, how many processes there are, and which one this is."""

    coordinator: str  # host:port
    count: int
    index: int

    def __post_init__(self):
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(f"process {self.index} of {self.count}: expected an index from 0 to {self.count - 1}")
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise InputError(f"coordinator {self.coordinator!r}, expected host:port")


def from_environment(environment: Mapping[str, str]) -> Cluster | None:
    """The cluster that SLURM (a task of srun) or GKE (a worker of a TPU slice) describes; None where neither does."""
    # Of the step, not of the job: in the batch script itself, which is one process, the job's tasks are counted as well.
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        port = 20_000 + int(environment.get("SLURM_JOB_ID", "0")) % 20_000  # two jobs on a node do not meet
        host = _first_node(environment.get("SLURM_STEP_NODELIST", "localhost"))
        return Cluster(f"{host}:{port}", int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_PROCID"]))
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if len(hosts) > 1 and "TPU_WORKER_ID" in environment:
        return Cluster(f"{hosts[0]}:{PORT}", len(hosts), int(environment["TPU_WORKER_ID"]))
    return None


def _first_node(nodes: str) -> str:
    """ "tpu[003-005,009],login" → "tpu003"."""
    name, bracket, ranges = nodes.partition("[")
    return name + re.split(r"[-,\]]", ranges)[0] if bracket and "," not in name else name.split(",")[0]


def join(cluster: Cluster | None, timeout_s: int = JOIN_TIMEOUT_S) -> None:
    """Connects this process with the others. None: JAX looks for its cluster by itself (a TPU pod of Compute Engine).

    InputError names the processes that did not come within `timeout_s`; JAX itself would end this process with a page of C++.
    """
    settings = {"initialization_timeout": timeout_s, "heartbeat_timeout_seconds": HEARTBEAT_S, "shutdown_timeout_seconds": HEARTBEAT_S}
    if cluster is None:
        jax.distributed.initialize(**settings)
    else:
        _assemble(cluster, timeout_s)
        jax.distributed.initialize(cluster.coordinator, cluster.count, cluster.index, **settings)
    meet("joined")
    multihost_utils.sync_global_devices("joined")  # the first collective connects the hosts; later ones may then come minutes apart


def _assemble(cluster: Cluster, timeout_s: float) -> None:
    """Returns once all processes have called the leader: on the coordinator's port, before JAX listens there."""
    deadline = time.monotonic() + timeout_s
    if cluster.count > 1:
        (_receive if cluster.index == 0 else _report)(cluster, deadline, timeout_s)


def _receive(cluster: Cluster, deadline: float, timeout_s: float) -> None:
    """The leader's part: collects the others, then tells each of them who is missing (nobody, if all goes well)."""
    port = int(cluster.coordinator.rpartition(":")[2])
    here: dict[int, socket.socket] = {}
    try:
        server = socket.create_server(("", port), reuse_port=True)
    except OSError as error:
        raise InputError(f"process 0 cannot listen on port {port} ({error.strerror}): another run's, or not allowed") from error
    with server:
        while len(here) < cluster.count - 1 and time.monotonic() < deadline:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                caller, _ = server.accept()
                caller.settimeout(10)
                hello = json.loads(caller.makefile().readline())
            except (OSError, ValueError):  # nobody came in time, or somebody else called
                continue
            if hello.get("count") != cluster.count:
                raise InputError(f"process {hello.get('index')} says there are {hello.get('count')} processes, process 0 {cluster.count}")
            here[hello["index"]] = caller
    missing = sorted(set(range(1, cluster.count)) - here.keys())
    for caller in here.values():
        caller.sendall(json.dumps({"missing": missing}).encode() + b"\n")
        caller.close()
    _all_there(missing, cluster, timeout_s)


def _report(cluster: Cluster, deadline: float, timeout_s: float) -> None:
    """Another process's part: calls the leader until it answers."""
    host, _, port = cluster.coordinator.rpartition(":")
    missing = None
    while missing is None and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port)), timeout=5) as leader:
                leader.sendall(json.dumps({"index": cluster.index, "count": cluster.count}).encode() + b"\n")
                leader.settimeout(max(deadline - time.monotonic(), 1) + 10)
                missing = json.loads(leader.makefile().readline())["missing"]
        except (OSError, ValueError):  # not up yet
            time.sleep(0.2)
    _all_there([0] if missing is None else missing, cluster, timeout_s)


def _all_there(missing: list[int], cluster: Cluster, timeout_s: float) -> None:
    if missing:
        names = ", ".join(map(str, missing))
        raise InputError(f"process {names} of {cluster.count} did not join within {timeout_s:g} s (coordinator {cluster.coordinator})")


def leave(code: int) -> None:
    """Ends a process of several with this exit code, without waiting for those that are still at work; a lone process goes on.

    JAX's own way out would wait for them, and then end this process with a code of its own.
    """
    if count() == 1:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        meet("leaving", LEAVE_S)  # most often all leave for the same reason: the leader, on whom JAX hangs, goes last
        time.sleep(LEADER_LAST_S * leads())
    except Exception:  # nobody else leaves
        pass
    os._exit(code)


# -- who am I ---------------------------------------------------------------------------------------------------------------------------


def index() -> int:
    """This process, from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0  # without waking the devices of a lone process


def count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def leads() -> bool:
    """Whether this process writes what is written once, and speaks to the person."""
    return index() == 0


# -- together ---------------------------------------------------------------------------------------------------------------------------


def meet(place: str, timeout_s: float = WAIT_TIMEOUT_S) -> None:
    """Waits until all processes are here. The coordinator counts them: no device takes part, so it may take hours."""
    if count() > 1:
        multihost.get_barrier_sync_fn()(key=f"radit_jax:{place}", timeout_ms=int(timeout_s * 1000))


def to_host(array: jax.Array) -> np.ndarray:
    """The whole of an array on the host of every process, however it is spread; all processes call this together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def gather(array: np.ndarray) -> np.ndarray:
    """Stacks the equal-shaped host arrays of all processes: (P, …), on every process."""
    if count() == 1:
        return np.asarray(array)[None]
    meet("gather")
    return np.asarray(multihost_utils.process_allgather(array))


def from_leader(number: int) -> int:
    """What the leader found, on every process: two looks at a shared file system may differ."""
    return int(gather(np.asarray(int(number)))[0])
