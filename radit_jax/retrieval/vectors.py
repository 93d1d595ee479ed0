"""The vectors of a corpus on disk: shards of rows in float32, float16 or bfloat16, memory-mapped, in the order of the passages.

``vectors-00000.npy`` … hold the numbers and ``vectors-00000.json`` … what each shard is (its dtype, its rows, what it cost). The .npy
format has no name for bfloat16: its bits are stored as uint16, and the json says what they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from radit_jax import artifacts
from radit_jax.errors import InputError

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BITS = np.dtype(np.uint16)  # what bfloat16 is in an .npy file


class Vectors:
    """The vectors of a corpus, row by row, over memory-mapped shards: nothing is read before it is asked for."""

    def __init__(self, shards: Sequence[np.ndarray]):
        self.shards = tuple(shards)
        self._starts = np.concatenate([[0], np.cumsum([len(shard) for shard in self.shards])])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        return self.shards[0].shape[1]

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return self.shards[0].dtype

    def __getitem__(self, rows_N: np.ndarray | slice) -> np.ndarray:
        """float32 vectors_NxE of these rows, in their order."""
        if isinstance(rows_N, slice):
            start, stop, step = rows_N.indices(len(self))
            if step == 1:
                return self.span(start, stop, np.dtype(np.float32))
            rows_N = np.arange(start, stop, step)
        rows_N = np.asarray(rows_N, np.int64)
        if rows_N.size and not 0 <= rows_N.min() <= rows_N.max() < len(self):
            raise IndexError(f"rows {rows_N.min()}…{rows_N.max()} of {len(self)} vectors")
        if len(self.shards) == 1:  # nothing to put back in order: half the time
            return np.take(self.shards[0], rows_N, axis=0).astype(np.float32, copy=False)
        vectors_NxE = np.empty((len(rows_N), self.dim), np.float32)
        order_N = np.argsort(rows_N)
        edges = np.searchsorted(rows_N[order_N], self._starts)
        for i in np.flatnonzero(np.diff(edges)):
            at = order_N[edges[i] : edges[i + 1]]
            vectors_NxE[at] = np.take(self.shards[i], rows_N[at] - self._starts[i], axis=0)
        return vectors_NxE

    def span(self, start: int, stop: int, dtype: np.dtype | None = None, pad_to: int = 0) -> np.ndarray:
        """Rows start … stop as they are stored (or in `dtype`), then rows of zeros up to `pad_to`; one shard is read after the other."""
        stop = min(stop, len(self))
        count = max(stop - start, 0)
        vectors_NxE = np.empty((max(count, pad_to), self.dim), dtype or self.dtype)
        vectors_NxE[count:] = 0
        first = max(int(np.searchsorted(self._starts, start, side="right")) - 1, 0)
        for shard, begins in zip(self.shards[first:], self._starts[first:]):
            if begins >= stop:
                break
            low, high = max(start, begins), min(stop, begins + len(shard))
            vectors_NxE[low - start : high - start] = shard[low - begins : high - begins]
        return vectors_NxE


def open_vectors(folder: Path, count: int | None = None) -> Vectors:
    """Opens what `write_shard` wrote. Raises InputError on missing or differing shards, or when there are not `count` vectors."""
    paths = sorted(Path(folder).glob("vectors-*.npy"))
    if not paths or [path.name for path in paths] != [shard_path(Path(folder), i).name for i in range(len(paths))]:
        raise InputError(f"{folder}: found {len(paths)} vector shards, expected vectors-00000.npy and on without a gap")
    vectors = Vectors([read_shard(path) for path in paths])
    for path, shard in zip(paths, vectors.shards):
        if shard.shape[1:] != (vectors.dim,):
            raise InputError(f"{path}: vectors of dimension {shard.shape[1:]}, the first shard has {vectors.dim}")
        if shard.dtype != vectors.dtype:
            raise InputError(f"{path}: vectors in {shard.dtype}, the first shard has {vectors.dtype}")
    if count is not None and len(vectors) != count:
        raise InputError(f"{folder}: {len(vectors):,} vectors, expected {count:,} (one per passage)")
    return vectors


def shard_path(folder: Path, i: int) -> Path:
    return folder / f"vectors-{i:05d}.npy"


def about_shard(path: Path) -> dict[str, Any]:
    """What `write_shard` was told about it."""
    return json.loads(path.with_suffix(".json").read_text())


def read_shard(path: Path) -> np.ndarray:
    """The memory-mapped rows of one shard."""
    shard_NxE = np.load(path, mmap_mode="r", allow_pickle=False)
    if shard_NxE.dtype != BITS:
        return shard_NxE
    try:
        dtype = about_shard(path)["dtype"]
    except (OSError, KeyError, ValueError):
        dtype = None
    if dtype != "bfloat16":
        raise InputError(f"{path}: {BITS.name} numbers, and {path.with_suffix('.json').name} does not say that they are bfloat16")
    return shard_NxE.view(DTYPES["bfloat16"])


def write_shard(path: Path, vectors_NxE: np.ndarray, about: Mapping[str, Any]) -> None:
    """Writes one shard in the dtype that it has; it is whole or absent."""
    # The json first: the array is what says that the shard is whole.
    artifacts.write_json(path.with_suffix(".json"), {**about, "dtype": vectors_NxE.dtype.name})
    artifacts.save_array(path, vectors_NxE.view(BITS) if vectors_NxE.dtype == DTYPES["bfloat16"] else vectors_NxE)
