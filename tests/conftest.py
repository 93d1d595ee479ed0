"""Eight CPU devices, strict rank promotion, and the fixtures that more than one test file needs."""

from __future__ import annotations

import os
from pathlib import Path

# Machine code as it comes: these programs are tiny, and compiling them is most of what the tests take.
XLA_FLAGS = "--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
# Before JAX starts its backend: the mesh tests need more than one device.
os.environ.setdefault("XLA_FLAGS", XLA_FLAGS.format(devices=8))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: RADIT_DATA, else the sibling shared/data of the checkout."""
    folder = Path(os.environ.get("RADIT_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "nq_wiki").is_dir():
        pytest.skip(f"no data at {folder} (set RADIT_DATA)")
    return folder
