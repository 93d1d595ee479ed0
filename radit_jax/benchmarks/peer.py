"""The peer of a benchmark: a process of another Python environment that does the same work when told to (a script of tests/peers)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from radit_jax import resident
from radit_jax.errors import InputError
from radit_jax.logbook import say

SCRIPTS = Path(__file__).resolve().parents[2] / "tests" / "peers"
NEEDS = {
    "torch_peer.py": "torch and transformers",
    "faiss_peer.py": "faiss-cpu",
    "sentence_transformers_peer.py": "sentence-transformers",
    "fed_rag_peer.py": "fed-rag",
    "transformers_generate_peer.py": "torch and transformers",
}
OURS, MAIN = "ours", "peer"  # names: our side; the peer that ratios are made against, without which there is no run
Run = dict[str, Any]  # of one repetition: seconds, cpu_seconds, peak_mib


class PeerFailed(InputError):
    """A peer that did not come up or ended. `why` is {"missing": the module its Python lacks} or {"failed": what it said last}."""

    def __init__(self, script: str, status: int, stderr: str):
        said = _last_said(stderr) or f"status {status}"
        missing = re.fullmatch(r"ModuleNotFoundError: No module named '(\w+)'", said)  # one with a dot is missing from what is installed
        self.why = {"missing": missing[1]} if missing else {"failed": said}
        super().__init__(f"the peer ({script}) ended: {said}; its Python needs {NEEDS[script]}")


class Peer:
    """One line "run" in, one JSON line out; its imports and model are loaded once. PeerFailed when it does not come up or ends.

    `about` is what it says when it is ready: versions, settings. What it says on stderr is shown when it fails.
    """

    def __init__(self, python: str, script: str, job: dict[str, Any]):
        self.python, self.script, self.job = python, script, {"threads": len(os.sched_getaffinity(0)), **job}

    def __enter__(self) -> Peer:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(self.job, file)
            file.flush()
            arguments = [self.python, str(SCRIPTS / self.script), file.name]
            self._stderr = tempfile.TemporaryFile("w+", errors="replace")
            try:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
                self.process = subprocess.Popen(arguments, text=True, **pipes)
            except OSError as error:
                raise InputError(f"the peer's Python {self.python}: {error.strerror}") from error
            self.about = self._read()  # it is ready, and has read the file
        return self

    def __call__(self) -> tuple[Any, Run]:
        with contextlib.suppress(BrokenPipeError):  # it has ended: why is found where its answer is not
            self.process.stdin.write("run\n")
            self.process.stdin.flush()
        run = self._read()
        return run.pop("outputs"), run

    def __exit__(self, *_) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)
        self._stderr.close()

    def _read(self) -> dict[str, Any]:
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        status = self.process.wait()
        self._stderr.seek(0)
        failure = PeerFailed(self.script, status, told := self._stderr.read())
        if "failed" in failure.why:
            print(told, file=sys.stderr, end="")
        raise failure


def _last_said(stderr: str) -> str:
    """The first line of the exception that ends a traceback; without a traceback the last line."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    begins = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    raised = [line for line in lines[begins[-1] + 1 :] if not line.startswith(" ")] if begins else lines[-1:]
    return raised[0] if raised else ""


def take_turns(
    work: Callable[[], Any], peers: Mapping[str, Peer], repetitions: int
) -> tuple[dict[str, list[Run]], dict[str, Any], dict[str, dict[str, str]]]:
    """(runs, outputs of the first run), both by name with ours under OURS, and why those peers failed that did. MAIN may not.

    The first run of each compiles and warms up; it is not counted.
    """
    runs: dict[str, list[Run]] = {name: [] for name in (OURS, *peers)}
    first: dict[str, Any] = {}
    failed: dict[str, dict[str, str]] = {}
    with contextlib.ExitStack() as stack:
        for name, peer in peers.items():
            with _noted(name, failed):
                stack.enter_context(peer)
        for i in range(repetitions + 1):
            found = {OURS: timed(work)}
            for name in [name for name in peers if name not in failed]:
                with _noted(name, failed):
                    found[name] = peers[name]()
            shown = ", ".join(f"{name} {run['seconds']:.2f} s" for name, (_, run) in found.items())
            say(f"bench: {f'run {i}' if i else 'warm-up'}: {shown}")
            for name, (outputs, run) in found.items():
                if i == 0:
                    first[name] = outputs
                else:
                    runs[name].append(run)
    return runs, first, failed


@contextlib.contextmanager
def _noted(name: str, failed: dict[str, dict[str, str]]) -> Iterator[None]:
    """Notes why this peer failed; the failure of MAIN ends the run."""
    try:
        yield
    except PeerFailed as failure:
        if name == MAIN:
            raise
        failed[name] = failure.why


def timed(work: Callable[[], Any]) -> tuple[Any, Run]:
    """What `work` returns, its wall and CPU seconds, and the most memory that this process held while it ran.

    What was freed before, in reading the peers' results for one, is given back first: it is none of the work's.
    """
    resident.give_back()
    resident.forget_peak()
    began, cpu = time.perf_counter(), time.process_time()
    outputs = jax.block_until_ready(work())
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return outputs, {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": resident.peak_mib()}
