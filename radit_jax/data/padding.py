"""Rows of different lengths in arrays of few shapes, for each shape is a compile: padded lengths, and how many rows a call takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

ALIKE = 0.75  # share of a call's length that its rows should have, and share of its rows that should have it
LEAST_TOKENS = 256  # of a call on a CPU: products of smaller matrices are slow
LINE = 2048  # of a call in one line (models/unpad.py): products of larger matrices are no faster


def pad_rows(rows: Sequence[Iterable[int]], length: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads id lists to (len(rows), length): returns (tokens int32, lengths int32)."""
    tokens_BxT = np.full((len(rows), length), fill, np.int32)
    lengths_B = np.zeros(len(rows), np.int32)
    for i, row in enumerate(rows):
        row = np.asarray(row, np.int32)
        tokens_BxT[i, : len(row)] = row
        lengths_B[i] = len(row)
    return tokens_BxT, lengths_B


def longer(length: int, parts: int = 4) -> int:
    """The padded length after this one: by eights, and from 8 · `parts` on in `parts` of an octave. 4 pad a tenth, 8 a twentieth."""
    return length + max(8, (1 << length.bit_length() - 1) // parts)


def bucket(length: int, smallest: int = 16, parts: int = 4) -> int:
    """The padded length of a row: 16, 24, … 64, 80, 96, 112, 128, 160 …, or with 8 parts to the octave 16, 24, … 128, 144 …"""
    size = smallest
    while size < length:
        size = longer(size, parts)
    return size


def whole_line(tokens: int) -> int:
    """The longest line of no more than so many tokens (64 at least) that is full when it is: `bucket` makes it no longer."""
    size = 64
    while longer(size) <= tokens:
        size = longer(size)
    return size


def real_indices(real: np.ndarray, length: int = 0, parts: int = 4) -> np.ndarray | None:
    """Where the real tokens of (…, B, T) rows stand among their B·T places, ascending: (…, N) int32, filled up with B·T.

    For rows that are read in one line (models/unpad.py) of `length` places; 0: of the bucket's. None where N would be no less than B·T.
    """
    *groups, B, T = real.shape
    found = [np.flatnonzero(real_M) for real_M in real.reshape(-1, B * T)]
    length = length or bucket(max(map(len, found)), smallest=64, parts=parts)
    return pad_rows(found, length, fill=B * T)[0].reshape(*groups, length) if length < B * T else None


def computed(tokens: np.ndarray, indices: np.ndarray | None) -> int:
    """Tokens that a call computes: all of its rows', or with `real_indices` the places of the line."""
    return tokens.size if indices is None else indices.size


def line_rows(shortest: int, tokens: int = LINE) -> int:
    """Rows for a line of `tokens` tokens to be full before they are, where none has less than `shortest` tokens."""
    return -(-tokens // max(shortest, 1))


def line_of_call(sizes: Sequence[int], rows: int, tokens: int = LINE) -> tuple[int, int, int]:
    """A call in one line, of the rows that wait, longest first: how many it takes, rows of its array, places of its line.

    Rows or line are halved where too few are left to fill them.
    """
    totals = np.cumsum(sizes[:rows])
    taken = max(int(np.searchsorted(totals, tokens, side="right")), 1)
    while rows >= 2 * taken:
        rows //= 2
    return taken, rows, bucket(int(totals[taken - 1]), smallest=64)


def rows_of_call(sizes: Sequence[int], length: int, most: int, platform: str) -> int:
    """How many of the rows that wait, longest first, a call of this length takes: `most`, or on a CPU a half, a quarter … of it.

    It is halved where too few of them are about as long, for shorter ones cost as much there, or where too few are left. An accelerator
    reads some padding sooner than its compiler makes a program for another number of rows: seconds each.
    """
    if platform != "cpu":
        return most
    alike = sum(size > ALIKE * length for size in sizes[:most])
    while alike < ALIKE * most and most // 2 * length >= LEAST_TOKENS:
        most //= 2
    return most
