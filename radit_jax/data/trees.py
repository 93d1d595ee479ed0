"""Token sequences laid into rows, several to a row, each stretch of tokens that some of them begin with once.

A row holds trees side by side, each in depth-first order: a token comes after the one it follows, and what follows it ends where
`ends` says. So a token sees those before it whose end it has not passed, and a sequence without a neighbour that begins alike is a
segment. Of ten passages that a question was given, some were given to other questions too: c∘x∘y and c∘x'∘y' share c.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

WORTH_SHARING = 16  # tokens in common for which sequences are bound to one row


@dataclasses.dataclass(frozen=True)
class Forest:
    """Rows of T tokens (int32), 0 on padding. Token t of sequence n stands at `paths[n][t]` of row `row_N[n]`."""

    tokens_RxT: np.ndarray
    positions_RxT: np.ndarray  # in its sequence, from 0
    segment_ids_RxT: np.ndarray  # the tree, from 1
    ends_RxT: np.ndarray  # one past the last token that sees this one
    row_N: np.ndarray
    paths: list[np.ndarray]

    def parents_RxT(self) -> np.ndarray:
        """Where the token before each stands; -1 for the first of a sequence, and on padding."""
        parents_RxT = np.full(self.tokens_RxT.shape, -1, np.int32)
        for row, path in zip(self.row_N, self.paths):
            parents_RxT[row, path[1:]] = path[:-1]
        return parents_RxT

    @property
    def nodes(self) -> int:
        """Tokens that are there once or more."""
        return int((self.ends_RxT > 0).sum())


@dataclasses.dataclass
class Tree:
    """Sequences (their numbers, in lexicographic order), and how many tokens each shares with the one before it."""

    members: list[int]
    shared: list[int]
    size: int  # tokens


def grow(sequences: Sequence[np.ndarray], *, share: bool = True, worth: int = WORTH_SHARING, most: int | None = None) -> list[Tree]:
    """Trees of the sequences, an empty one of which is an empty tree. Without `share` every sequence is a tree of its own.

    `worth` tokens in common, or a whole sequence, bind two to one tree, of at most `most` tokens (None: however many).
    """
    keys = [np.asarray(sequence).astype(">u4").tobytes() for sequence in sequences]  # bytes sort as the numbers do
    found: list[Tree] = []
    before = -1
    for n in sorted(range(len(sequences)), key=keys.__getitem__):
        length = len(sequences[n])
        common = _common(sequences[before], sequences[n]) if share and found else 0
        more = length - common
        if found and common >= min(worth, length) and (most is None or found[-1].size + more <= most):
            tree = found[-1]
            tree.members.append(n)
            tree.shared.append(common)
            tree.size += more
        else:
            found.append(Tree([n], [0], length))
        before = n
    return found


def total(row: Sequence[Tree]) -> int:
    """Tokens of all these trees."""
    return sum(tree.size for tree in row)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens that both begin with."""
    length = min(len(a), len(b))
    apart = np.flatnonzero(np.asarray(a)[:length] != np.asarray(b)[:length])
    return int(apart[0]) if len(apart) else length


def pack(trees: Sequence[Tree], row_length: int) -> list[list[Tree]]:
    """The trees in rows: the largest first, each where it leaves the least room."""
    return [[trees[n] for n in row] for row in _best_fit([tree.size for tree in trees], row_length)]


def _best_fit(sizes: Sequence[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, row), ascending
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        at = bisect.bisect_left(rooms, (sizes[n], -1))
        if at < len(rooms):
            room, row = rooms.pop(at)
        else:
            room, row = row_length, len(rows)
            rows.append([])
        rows[row].append(n)
        bisect.insort(rooms, (room - sizes[n], row))
    return rows


def plant(sequences: Sequence[np.ndarray], rows: Sequence[Sequence[Tree]], row_length: int) -> Forest:
    """The trees of each row, side by side. Sequences that are in none of them have row 0 and an empty path."""
    tokens, positions, segments, ends = (np.zeros((len(rows), row_length), np.int32) for _ in range(4))
    row_N, paths = np.zeros(len(sequences), np.int32), [np.zeros(0, np.int32)] * len(sequences)
    for r, trees in enumerate(rows):
        at = 0
        for segment, tree in enumerate(trees, 1):
            path = np.zeros(0, np.int32)
            for n, shared in zip(tree.members, tree.shared):
                ends[r, path[shared:]] = at
                new = np.arange(at, at + len(sequences[n]) - shared, dtype=np.int32)
                tokens[r, new], positions[r, new] = sequences[n][shared:], shared + np.arange(len(new))
                path = np.concatenate([path[:shared], new])
                row_N[n], paths[n] = r, path
                at += len(new)
            ends[r, path] = at
            segments[r, at - tree.size : at] = segment
    return Forest(tokens, positions, segments, ends, row_N, paths)
