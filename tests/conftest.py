"""Eight CPU devices, strict rank promotion, and the fixtures that more than one test file needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from processes import ROOT, xla_flags

# Before JAX starts its backend: the mesh tests need more than one device.
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from radit_jax.models import layers

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: RADIT_DATA, else the sibling shared/data of the checkout."""
    folder = Path(os.environ.get("RADIT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "nq_wiki").is_dir():
        pytest.skip(f"no data at {folder} (set RADIT_DATA)")
    return folder


@pytest.fixture
def traced_as_for_a_gpu(monkeypatch) -> Iterator[None]:
    """Programs are traced as accelerators get them: a CPU turns positions by products, for one, which no task asks for."""
    monkeypatch.setattr(layers, "platform", lambda: "gpu")
    jax.clear_caches()  # what was traced for the CPU
    yield
    jax.clear_caches()
