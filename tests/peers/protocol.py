"""What the peers of `launch/bench.py` say and hear: a JSON line when ready, then one for every line "run" on stdin. Needs Python alone."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any


def answer_runs(run: Callable[[], Any]) -> None:
    """Does the work whenever stdin says "run": seconds, CPU seconds, the most memory meanwhile, and the outputs, lists or arrays."""
    for line in sys.stdin:
        if line.strip() != "run":
            break
        forget_peak()
        began, cpu = time.perf_counter(), time.process_time()
        outputs = run()
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        say({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mib": peak_mib(), "outputs": outputs})


def forget_peak() -> None:
    """Lets peak_mib count from here on: the work's memory is asked for, not that of loading a model."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_mib() -> int:
    """Of this program alone: getrusage would count what the process that started it held."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) // 1024 for line in file if line.startswith("VmHWM:"))


def say(value: dict) -> None:
    print(json.dumps(value, default=lambda array: array.tolist()), flush=True)
