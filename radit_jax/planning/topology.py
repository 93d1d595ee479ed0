"""A slice of TPU chips that is not there: its devices can be compiled for, by libtpu, on any machine.

The names: `v5p:4x4x4` is a shape of chips. `v5p-64` is Google's name of an accelerator, whose number counts TensorCores on v4 and v5p
(v5p-64 is 32 chips, 2x4x4) and chips on v5e and v6e (v5e-64 is 8x8).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

from radit_jax.errors import InputError
from radit_jax.planning.chips import CHIPS, Chip

INSTALL = "pip install 'radit-jax[plan]' (the package libtpu)"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A shape of chips, say v5p:4x4x4."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{self.shape}"

    @property
    def chips(self) -> int:
        return chips_of(self.shape)

    @property
    def accelerator(self) -> str:
        """Google's name of the slice: v5p-128 for v5p:4x4x4."""
        return f"{self.chip.name}-{self.chips * self.chip.cores}"

    def listed(self) -> list[Topology]:
        """All slices of this kind of chip, ascending."""
        return [Topology(self.chip, shape) for shape in self.chip.slices]


def chips_of(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def parse(text: str) -> Topology:
    """The topology of `v5p:4x4x4` or `v5p-64`. InputError says what would do."""
    match = re.fullmatch(r"(\w+)([:-])([\dx]+)", text.strip())
    chip = CHIPS.get(match[1]) if match else None
    if chip is None:
        raise InputError(f"topology {text!r}: expected one of {', '.join(CHIPS)} with a shape or size, say v5p:4x4x4, v5e:8x8 or v6e-64")
    if match[2] == "-":
        return _of_accelerator(chip, match[3], text)
    sizes = match[3].split("x")
    if len(sizes) != chip.dimensions or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise InputError(f"topology {text!r}: a shape of {chip.name} has {chip.dimensions} numbers, say {chip.name}:{chip.slices[4]}")
    largest = Topology(chip, chip.slices[-1])
    if chips_of(match[3]) > largest.chips:
        raise InputError(f"topology {text!r} has {chips_of(match[3]):,} chips: the largest slice is {largest.name} with {largest.chips:,}")
    return Topology(chip, match[3])


def _of_accelerator(chip: Chip, size: str, text: str) -> Topology:
    named = {topology.accelerator: topology for topology in Topology(chip, chip.slices[0]).listed()}
    if f"{chip.name}-{size}" not in named:
        raise InputError(f"topology {text!r}: expected one of {', '.join(named)}, or a shape, say {chip.name}:{chip.slices[4]}")
    return named[f"{chip.name}-{size}"]


def require_compiler() -> None:
    """InputError where libtpu is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(f"libtpu is not installed, and nothing else compiles for TPUs: {INSTALL}")


def prepare_environment() -> None:
    """To be called before JAX is imported: libtpu compiles for chips that are not there, without looking for them, quietly."""
    quiet = {"TPU_LOG_DIR": "disabled", "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3"}
    absent = {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    os.environ.update({"JAX_PLATFORMS": "cpu", **absent, **quiet})


def devices(topology: Topology) -> list:
    """The devices of a topology, one a chip. InputError where the compiler refuses it."""
    from jax.experimental import topologies

    # By its own default, v4 is two devices a chip; on Google Cloud it is one.
    options = {"chip_config_name": "megacore"} if topology.chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(topology.name, "tpu", **options).devices
    except Exception as error:  # libtpu's own reasons, all as RuntimeError
        raise InputError(f"topology {topology.name}: {str(error).splitlines()[0].removeprefix('INVALID_ARGUMENT: ')}") from error
    assert len(found) == topology.chips, f"{topology.name} has {len(found)} devices"
    return list(found)


def mesh(topology: Topology, data: int, model: int) -> Any:
    """The ("data", "model") mesh over all chips of a topology.

    `data` of −1 or 1 (which the configs say by default) takes all that `model` leaves; otherwise both must make up the number of chips.
    """
    from radit_jax.sharding import make_mesh

    chips = topology.chips
    if model < 1 or chips % model:
        raise InputError(f"config.mesh.model = {model} does not divide the {chips:,} chips of {topology.name}")
    if data not in (-1, 1, chips // model):
        raise InputError(f"mesh {data}×{model} has {data * model:,} devices, {topology.name} {chips:,}: config.mesh.data=-1 takes the rest")
    return make_mesh(chips // model, model, devices(topology))
