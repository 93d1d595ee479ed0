"""The header of a GGUF file, walked before the `gguf` package reads it: every length in it must fit into the file.

The package believes what a header says. A list of 2^60 numbers in a cut file it would read number by number, past the end, for ever.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from radit_jax.errors import InputError

MAGIC, VERSIONS = b"GGUF", (2, 3)
MOST_DIMS = 4  # of a tensor, as ggml has it
STRING, LIST = 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by its type
LEAST_PAIR, LEAST_TENSOR = 13, 24  # bytes of a key with its value, and of what is said of a tensor


def check(path: Path) -> None:
    """InputError, with the place in bytes, for a header whose counts, lengths or shapes do not fit into its file."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{path}: truncated or not a GGUF file (it does not begin with {MAGIC.decode()})")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(_Cursor(path, data))


def _walk(at: _Cursor) -> None:
    version = at.number("I")
    if not version & 0xFFFF:  # the file is of the other byte order
        at.order, version = ">", version >> 24
    if version not in VERSIONS:
        raise InputError(f"{at.path}: GGUF version {version}, expected {' or '.join(map(str, VERSIONS))}")
    tensors, pairs = at.number("Q"), at.number("Q")
    at.fits(tensors * LEAST_TENSOR + pairs * LEAST_PAIR, f"{tensors:,} tensors and {pairs:,} fields")
    for _ in range(pairs):
        at.text()
        _value(at, at.number("I"))
    for _ in range(tensors):
        _tensor(at)


def _value(at: _Cursor, kind: int) -> None:
    if kind == STRING:
        at.text()
    elif kind == LIST:
        kind, count = at.number("I"), at.number("Q")
        if kind == STRING:
            at.fits(8 * count, f"a list of {count:,} texts")
            for _ in range(count):
                at.text()
        else:
            at.skip(_size(at, kind) * count, f"a list of {count:,} values")
    else:
        at.skip(_size(at, kind), "a value")


def _size(at: _Cursor, kind: int) -> int:
    if kind not in SIZES:
        raise InputError(f"{at.path}: byte {at.place:,} of the header has a value of type {kind}, which GGUF has not")
    return SIZES[kind]


def _tensor(at: _Cursor) -> None:
    at.text()
    dims = at.number("I")
    if dims > MOST_DIMS:
        raise InputError(f"{at.path}: byte {at.place:,} of the header has a tensor of {dims:,} dimensions, expected at most {MOST_DIMS}")
    shape = [at.number("Q") for _ in range(dims)]
    at.number("I")  # its type
    offset = at.number("Q")
    # No type has less than a bit for an element.
    at.fits(max(math.prod(shape) // 8, offset), f"a tensor of shape {tuple(shape)} at {offset:,}")


class _Cursor:
    """Where the walk is."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.place, self.order = path, data, len(MAGIC), "<"

    def fits(self, size: int, what: str) -> None:
        if size > len(self.data) - self.place:
            rest = len(self.data) - self.place
            raise InputError(f"{self.path}: truncated or not a GGUF file: {what} at byte {self.place:,}, {rest:,} bytes before its end")

    def skip(self, size: int, what: str) -> None:
        self.fits(size, what)
        self.place += size

    def number(self, kind: str) -> int:
        began, size = self.place, struct.calcsize(f"={kind}")
        self.skip(size, "a number")
        return struct.unpack(f"{self.order}{kind}", self.data[began : began + size])[0]

    def text(self) -> None:
        length = self.number("Q")
        self.skip(length, f"a text of {length:,} bytes")
