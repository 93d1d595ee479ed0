"""What a TPU chip can do: memory, arithmetic, bandwidths, and the slices it comes in.

Peak figures are those of Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (docs.cloud.google.com/tpu/docs/v5p …).
"""

from __future__ import annotations

import dataclasses

GiB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip as one JAX device. Rates are peaks: what a plan divides by them is the least time, not the time."""

    name: str
    hbm: int  # bytes that a program may use: what libtpu's compiler refuses to exceed, a little below the capacity on the page
    flops: float  # bfloat16 operations a second
    hbm_rate: float  # bytes a second
    ici_rate: float  # bytes a second into a chip over all its links (half of the page's bidirectional figure)
    dimensions: int  # of the torus
    cores: int  # TensorCores: the number in Google's names of v4 and v5p slices ("v5p-64") counts these
    slices: tuple[str, ...]  # topologies, ascending


_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", int(30.75 * GiB), 275e12, 1.2e12, 300e9, 3, 2, _CUBE),
        Chip("v5e", int(15.75 * GiB), 197e12, 819e9, 200e9, 2, 1, _PLANE),
        Chip("v5p", int(95.73 * GiB), 459e12, 2765e9, 600e9, 3, 2, (*_CUBE, "16x16x24")),
        Chip("v6e", int(31.24 * GiB), 918e12, 1640e9, 400e9, 2, 1, _PLANE),
    )
}
