"""Several real processes on this machine: what the tests of distributed runs start and wait for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def xla_flags(devices: int) -> str:
    """So many CPU devices; machine code as it comes and by the older emitters of fusions, in a third of the time.

    These programs are tiny, and compiling them is most of what the tests take.
    """
    return f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def environment(devices: int, **more: str) -> dict[str, str]:
    """Of a process with this many CPU devices that imports from the checkout and its tests."""
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **more}


def membership(port: int, count: int) -> list[list[str]]:
    """The flags that make each of `count` processes one of them; none where there is one alone."""
    if count == 1:
        return [[]]
    return [[f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"] for index in range(count)]


def start(arguments: Sequence[str], count: int, *, devices: int = 1, cwd: Path = ROOT, **more: str) -> list[subprocess.Popen]:
    """`count` processes of the Python program `arguments`, which know each other."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": cwd}
    members = membership(free_port(), count)
    return [subprocess.Popen([sys.executable, *arguments, *flags], env=environment(devices, **more), **pipes) for flags in members]


def finish(processes: Sequence[subprocess.Popen], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each; none outlives this call."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs)]
