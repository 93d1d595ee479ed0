"""The peer of a benchmark: a process of another Python environment that does the same work when told to (a script of tests/peers)."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from radit_jax.errors import InputError
from radit_jax.logbook import say

SCRIPTS = Path(__file__).resolve().parents[2] / "tests" / "peers"
NEEDS = {
    "torch_peer.py": "torch and transformers",
    "faiss_peer.py": "faiss-cpu",
    "sentence_transformers_peer.py": "sentence-transformers",
    "fed_rag_peer.py": "fed-rag",
}
Run = dict[str, Any]  # of one repetition: seconds, cpu_seconds, peak_mib


class Peer:
    """One line "run" in, one JSON line out; its imports and model are loaded once. InputError when it does not come up or ends.

    `about` is what it says when it is ready: versions, settings.
    """

    def __init__(self, python: str, script: str, job: dict[str, Any]):
        self.python, self.script, self.job = python, script, {"threads": len(os.sched_getaffinity(0)), **job}

    def __enter__(self) -> Peer:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(self.job, file)
            file.flush()
            try:
                arguments = [self.python, str(SCRIPTS / self.script), file.name]
                self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            except OSError as error:
                raise InputError(f"the peer's Python {self.python}: {error.strerror}") from error
            self.about = self._read()  # it is ready, and has read the file
        return self

    def __call__(self) -> tuple[Any, Run]:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        run = self._read()
        return run.pop("outputs"), run

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise InputError(f"the peer ({self.script}) ended with status {self.process.wait()}: its Python needs {NEEDS[self.script]}")


def take_turns(
    work: Callable[[], Any], peers: Mapping[str, Peer], repetitions: int
) -> tuple[list[Run], dict[str, list[Run]], dict[str, Any]]:
    """(our runs, the runs of each peer, the outputs of all first runs by name and "ours").

    The first run of each compiles and warms up; it is not counted.
    """
    ours: list[Run] = []
    theirs: dict[str, list[Run]] = {name: [] for name in peers}
    first: dict[str, Any] = {}
    for i in range(repetitions + 1):
        outputs, run = timed(work)
        found = {name: peer() for name, peer in peers.items()}
        what = "warm-up" if i == 0 else f"run {i}"
        shown = [f"ours {run['seconds']:.2f} s", *(f"{name} {peer_run['seconds']:.2f} s" for name, (_, peer_run) in found.items())]
        say(f"bench: {what}: {', '.join(shown)}")
        if i == 0:
            first = {"ours": outputs, **{name: peer_outputs for name, (peer_outputs, _) in found.items()}}
            continue
        ours.append(run)
        for name, (_, peer_run) in found.items():
            theirs[name].append(peer_run)
    return ours, theirs, first


def timed(work: Callable[[], Any]) -> tuple[Any, Run]:
    """What `work` returns, its wall and CPU seconds, and the most memory that this process has held so far."""
    began, cpu = time.perf_counter(), time.process_time()
    outputs = jax.block_until_ready(work())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return outputs, {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}
