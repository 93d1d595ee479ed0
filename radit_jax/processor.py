"""What this machine computes fast: the compute dtype, the CPU's matrix library, large pages, and where compiled programs are kept.

XLA's CPU code has two libraries for matrix products. Its newer one (YNNPACK) is the only one that sums bfloat16 products in float32, which
AVX512-BF16 and AMX do two to three times as fast as float32. Without such instructions bfloat16 takes twice the time of float32, and
Eigen, the older one, is faster: a forward pass of SmolLM2-135M in float32 takes 0.78 of the time on AVX2 (Zen 3).

Every run of a program takes its buffers from the system and gives them back, and Linux hands them out, zeroed, in pages of 4 KiB: a tenth
of a training step. In pages of 2 MiB that is nearly nothing, but most systems give those only to who asks (transparent_hugepage: madvise),
and glibc asks only if an environment variable says so when the process starts.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

from radit_jax.errors import InputError

AUTO = "auto"
DTYPES = ("bfloat16", "float32")
CPUINFO = Path("/proc/cpuinfo")
BFLOAT16_FLAGS = frozenset(("avx512_bf16", "amx_bf16"))  # as Linux names them
LIBRARY_FLAG = "xla_cpu_experimental_ynn_fusion_type"
CACHE = Path("~/.cache/radit_jax/compiled")
CACHED_FROM_S = "0.2"  # seconds of compiling: what takes less is not kept
TUNABLES, LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never": the one in brackets holds


def prepare(environment: MutableMapping[str, str] = os.environ) -> None:
    """Settings that JAX reads when it starts; what the user has set already stands."""
    if not has_bfloat16() and LIBRARY_FLAG not in environment.get("XLA_FLAGS", ""):
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --{LIBRARY_FLAG}=".strip()
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE.expanduser()))
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", CACHED_FROM_S)


def ask_for_large_pages(environment: MutableMapping[str, str] = os.environ, setting: Path = PAGES) -> None:
    """Starts this program anew, as the same process, with the variable that makes glibc ask; at once and once, and only where it helps."""
    if LARGE_PAGES in environment.get(TUNABLES, "") or not setting.exists() or "[madvise]" not in setting.read_text():
        return
    environment[TUNABLES] = ":".join(filter(None, (environment.get(TUNABLES), f"{LARGE_PAGES}=1")))
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def dtype(setting: str, platform: str, field: str) -> str:
    """The compute dtype of a setting on a platform ("cpu", "tpu", "gpu"): "auto" is what is fast there. InputError names `field`."""
    if setting not in (AUTO, *DTYPES):
        raise InputError(f"{field} is {setting!r}, expected {AUTO}, {' or '.join(DTYPES)}")
    if setting != AUTO:
        return setting
    return "bfloat16" if platform != "cpu" or has_bfloat16() else "float32"


def has_bfloat16(cpuinfo: Path = CPUINFO) -> bool:
    """Whether this CPU multiplies bfloat16. Where no Linux tells, it is taken not to."""
    return not BFLOAT16_FLAGS.isdisjoint(features(cpuinfo))


@functools.cache
def features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The instructions of this CPU (x86) as Linux names them; none where no Linux tells."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.split()[2:])
