"""The most memory held is that since it was last forgotten."""

from __future__ import annotations

import numpy as np
import pytest

from radit_jax import resident

MIB = 400


@pytest.mark.skipif(not resident.PROCESS.is_dir(), reason="no /proc: the peak is that of the whole process")
def test_a_peak_is_seen_and_forgotten():
    resident.forget_peak()
    before = resident.peak_mib()
    np.ones(MIB << 20, np.uint8)  # is given back at once
    assert resident.peak_mib() >= before + MIB - 20
    resident.forget_peak()
    assert resident.now_mib() <= resident.peak_mib() < before + MIB // 2


def test_a_system_that_does_not_say_gives_the_peak_of_the_process(tmp_path, monkeypatch):
    monkeypatch.setattr(resident, "PROCESS", tmp_path / "absent")
    resident.forget_peak()
    np.ones(MIB << 20, np.uint8)
    assert resident.peak_mib() >= MIB
