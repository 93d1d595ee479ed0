"""The index from ids to rows: 64-bit hashes of ids, sorted, with the row of each; it is made in memory that does not grow with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

BUCKET = 1 << 21  # hashes sorted or compared at a time

Part = Callable[[str, int], np.ndarray]  # (column, number of the part) -> the memory-mapped column


def sorted_part(hashes: list[int], rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 hashes in order, int64 rows); equal hashes keep their order."""
    hashes_N = np.array(hashes, np.uint64)
    order_N = np.argsort(hashes_N, kind="stable")
    return hashes_N[order_N], np.array(rows, np.int64)[order_N]


def merge(part: Part, parts: int, folder: Path) -> None:
    """Writes `folder`/hashes.npy and rows.npy from the columns "hashes" and "rows" of sorted parts; equal hashes stay in their order."""
    count = sum(len(part("hashes", i)) for i in range(parts))
    # Hashes are uniform: cut by their high bits, all buckets are of about one size.
    bits = max(math.ceil(math.log2(count / BUCKET)), 0) if count else 0
    edges = np.arange(1, 1 << bits, dtype=np.uint64) << np.uint64(64 - bits) if bits else np.zeros(0, np.uint64)
    cuts = [np.concatenate([[0], np.searchsorted(hashes, edges), [len(hashes)]]) for hashes in (part("hashes", i) for i in range(parts))]

    def bucket(name: str, number: int) -> np.ndarray:
        return np.concatenate([part(name, i)[cut[number] : cut[number + 1]] for i, cut in enumerate(cuts)])

    def ordered(name: str) -> Iterator[np.ndarray]:
        for number in range(len(edges) + 1):
            yield bucket(name, number)[np.argsort(bucket("hashes", number), kind="stable")]

    for name, dtype in (("hashes", np.uint64), ("rows", np.int64)):
        save_chunks(folder / f"{name}.npy", dtype, count, ordered(name))


def save_chunks(path: Path, dtype: type, count: int, chunks: Iterable[np.ndarray]) -> None:
    """Writes an .npy file of `count` numbers a chunk at a time; it is whole or absent."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).data)
    os.replace(temporary, path)


def equal_neighbours(hashes: np.ndarray) -> Iterator[int]:
    """Positions i with hashes[i] == hashes[i + 1] of a sorted array."""
    for start in range(0, len(hashes) - 1, BUCKET):
        chunk = np.array(hashes[start : start + BUCKET + 1])
        yield from (start + np.flatnonzero(chunk[1:] == chunk[:-1])).tolist()
