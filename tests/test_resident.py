"""The most memory held is that since it was last forgotten."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

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


def test_what_was_freed_between_what_is_held_is_given_back():
    pieces = [np.ones(64 << 10, np.uint8) for _ in range(MIB << 4)]
    held = pieces[::64]
    del pieces
    before = resident.now_mib()
    resident.give_back()
    if not hasattr(ctypes.CDLL(None), "malloc_trim"):
        pytest.skip("this C library gives nothing back on request")
    assert resident.now_mib() < before - MIB // 2 and len(held)
