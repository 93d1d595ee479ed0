"""What the machine computes fast: read from the CPU's flags, and never against what the user has set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import ROOT

from radit_jax import processor
from radit_jax.errors import InputError

FLAG = f"--{processor.LIBRARY_FLAG}="


@pytest.mark.parametrize(
    ("flags", "has"), [("fpu avx2 fma", False), ("fpu avx512f avx512_bf16", True), ("fpu amx_bf16 amx_tile", True), ("avx512_bf16x", False)]
)
def test_a_cpu_that_multiplies_bfloat16_says_so(tmp_path, flags, has):
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\nmodel name\t: avx512_bf16\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
    assert processor.has_bfloat16(path) == has
    assert processor.features(path) == set(flags.split())
    assert not processor.has_bfloat16(tmp_path / "absent") and not processor.features(tmp_path / "absent")


@pytest.mark.parametrize(
    ("has", "platform", "expected"), [(True, "cpu", "bfloat16"), (False, "cpu", "float32"), (False, "tpu", "bfloat16")]
)
def test_auto_is_what_is_fast_there(monkeypatch, has, platform, expected):
    monkeypatch.setattr(processor, "has_bfloat16", lambda: has)
    assert processor.dtype("auto", platform, "lm.dtype") == expected
    assert [processor.dtype(setting, platform, "lm.dtype") for setting in processor.DTYPES] == list(processor.DTYPES)
    with pytest.raises(InputError, match="lm.dtype is 'float16'"):
        processor.dtype("float16", platform, "lm.dtype")


@pytest.mark.parametrize("has", [True, False])
def test_settings_of_the_user_stand(monkeypatch, has):
    monkeypatch.setattr(processor, "has_bfloat16", lambda: has)
    empty: dict[str, str] = {}
    processor.prepare(empty)
    assert (FLAG in empty.get("XLA_FLAGS", "")) == (not has) and empty["JAX_COMPILATION_CACHE_DIR"]
    own = {"XLA_FLAGS": f"--xla_dump_to=x {FLAG}LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "JAX_COMPILATION_CACHE_DIR": "elsewhere"}
    before = dict(own)
    processor.prepare(own)
    assert {key: own[key] for key in before} == before


def test_a_second_start_compiles_nothing(tmp_path):
    """Two processes of the same program: the first fills the cache, the second finds all in it."""
    program = """
from radit_jax import processor
processor.prepare()
import jax, jax.numpy as jnp
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((64, 64))).block_until_ready()
print(*(found.count(f"/jax/compilation_cache/cache_{what}") for what in ("misses", "hits")))
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def counts() -> tuple[int, int]:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
        return tuple(map(int, done.stdout.split()))

    misses, hits = counts()
    assert misses > 0 == hits
    assert counts() == (0, misses)


@pytest.mark.parametrize(
    ("setting", "tunables", "expected"),
    [
        ("always [madvise] never", None, "glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("always [madvise] never", "glibc.malloc.hugetlb=0", None),
        ("[always] madvise never", None, None),
        ("always madvise [never]", None, None),
        (None, None, None),
    ],
)
def test_a_program_starts_anew_once_where_large_pages_must_be_asked_for(monkeypatch, tmp_path, setting, tunables, expected):
    path = tmp_path / "enabled"
    if setting:
        path.write_text(setting + "\n")
    environment = {"GLIBC_TUNABLES": tunables} if tunables else {}
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    for _ in range(2):
        processor.ask_for_large_pages(environment, path)
    assert [(call[1][1:], call[2]["GLIBC_TUNABLES"]) for call in started] == ([(sys.orig_argv[1:], expected)] if expected else [])


@pytest.mark.skipif("[madvise]" not in (processor.PAGES.read_text() if processor.PAGES.exists() else ""), reason="needs no asking here")
def test_what_was_started_anew_is_the_same_process_with_the_same_arguments():
    program = "import os, sys; from radit_jax import processor; processor.ask_for_large_pages(); print(os.getpid(), *sys.argv[1:])"
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"} | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, "a b", "--c"], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.communicate()[0].split("\n")[0] == f"{process.pid} a b --c"
