"""Eight CPU devices, strict rank promotion, and the fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

from processes import ROOT, xla_flags

# Before JAX starts its backend: the mesh tests need more than one device.
os.environ.setdefault("XLA_FLAGS", xla_flags(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: RADIT_DATA, else the sibling shared/data of the checkout."""
    folder = Path(os.environ.get("RADIT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "nq_wiki").is_dir():
        pytest.skip(f"no data at {folder} (set RADIT_DATA)")
    return folder
