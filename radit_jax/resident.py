"""The memory that this process holds, in MiB, mapped files included: now, and the most of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

PROCESS = Path("/proc/self")  # Linux alone has it
ARENA_MAX = -8  # glibc's M_ARENA_MAX
COMPILED, LONG_S = "/jax/core/compile/backend_compile_duration", 0.1  # JAX says so of every program, read from a cache or not
THEIR_OWN = {"MALLOC_ARENA_MAX": "", "GLIBC_TUNABLES": "glibc.malloc.arena_max"}  # variables by which people say it


def now_mib() -> int:
    """What is held now. OSError where no Linux tells."""
    return int((PROCESS / "statm").read_text().split()[1]) * resource.getpagesize() >> 20


def peak_mib() -> int:
    """The most that was held since `forget_peak`, or since the process began."""
    with contextlib.suppress(OSError):
        # getrusage would count what the process that started this one held.
        lines = (PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def forget_peak() -> None:
    """Lets `peak_mib` count from here on, where the system can."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")


def share_arenas(environment: Mapping[str, str] = os.environ) -> None:
    """At most one arena of malloc a core from here on, where the C library has arenas and nobody has said how many.

    glibc makes up to eight a core, and what is freed in one is no room for the threads of another: generation holds 220 MiB more on two.
    """
    if any(name in environment and part in environment[name] for name, part in THEIR_OWN.items()):
        return
    _tell_malloc("mallopt", ARENA_MAX, os.cpu_count() or 1)


def give_back() -> None:
    """Gives the system what is held no longer: reading a model leaves as much as it is large.

    JAX lets go of a host array that it has copied only when garbage is collected: after reading SmolLM2-135M, of its embedding.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Gives the system what was freed between what is held, where the C library can."""
    _tell_malloc("malloc_trim", 0)


def give_back_after_compiling() -> None:
    """Gives back what a compiler leaves, from here on: of the programs of scoring 230 MiB, half of that where they come from a cache."""
    import jax  # for those who ask for this

    def heard(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds >= LONG_S:
            trim()

    jax.monitoring.register_event_duration_secs_listener(heard)


def _tell_malloc(function: str, *arguments: int) -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # glibc alone has it; there is no library of the process on Windows
        getattr(ctypes.CDLL(None), function)(*arguments)
