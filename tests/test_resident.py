"""The most memory held is that since it was last forgotten."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from processes import ROOT

from radit_jax import resident

MIB = 400


def test_a_peak_is_seen_and_forgotten():
    try:
        (resident.PROCESS / "clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system forgets no peak: {error}")
    before = resident.peak_mib()
    np.ones(MIB << 20, np.uint8)  # is given back at once
    assert resident.peak_mib() >= before + MIB - 20
    resident.forget_peak()
    assert resident.now_mib() - 20 <= resident.peak_mib() < before + MIB // 2


def test_a_system_that_does_not_say_gives_the_peak_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "PROCESS", tmp_path / "absent")
    resident.forget_peak()
    np.ones(MIB << 20, np.uint8)
    assert resident.peak_mib() >= MIB


@pytest.mark.parametrize("environment", [{}, {"MALLOC_ARENA_MAX": "64"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=64"}])
def test_threads_share_one_arena_a_core_unless_somebody_said_how_many(environment):
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        pytest.skip("this C library has no arenas")
    cores = os.cpu_count()
    program = f"""
import ctypes, threading
from radit_jax import resident
resident.share_arenas()
libc, together = ctypes.CDLL(None), threading.Barrier({3 * cores})
libc.fdopen.restype = ctypes.c_void_p
def take():
    together.wait()
    libc.malloc(1000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range({3 * cores})]
[thread.start() for thread in threads], [thread.join() for thread in threads]
out = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, out), libc.fflush(out)
"""
    inherited = {name: value for name, value in os.environ.items() if name not in resident.THEIR_OWN} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=inherited | environment, check=True)
    assert (done.stdout.count("<heap nr=") <= cores) == (not environment), done.stdout[:500]


def test_what_was_freed_between_what_is_held_is_given_back():
    pieces = [np.ones(64 << 10, np.uint8) for _ in range(MIB << 4)]
    held = pieces[::64]
    del pieces
    before = resident.now_mib()
    resident.give_back()
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library gives nothing back on request")
    assert resident.now_mib() < before - MIB // 2 and len(held)


def test_a_host_array_that_was_copied_to_a_device_is_given_back():
    gc.disable()  # as where nothing else happens
    try:
        held = jax.device_put(np.ones((MIB << 20) + 1, np.uint8)[1:]).block_until_ready()  # no address that JAX would share
        before = resident.now_mib()
        resident.give_back()
        assert resident.now_mib() < before - MIB // 2 and held.nbytes == MIB << 20
    finally:
        gc.enable()


def test_what_compiling_leaves_is_given_back():
    program = """
import jax, jax.numpy as jnp
from radit_jax import resident
given = []
resident.trim = lambda: given.append(1)
resident.give_back_after_compiling()
for resident.LONG_S in (1e9, 0.0):
    jax.jit(lambda x: jnp.sin(x) + resident.LONG_S)(1.0)
    print(len(given))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    short, long = map(int, done.stdout.split())
    assert short == 0 < long
