"""Texts → vectors: the one place where an encoder runs over many texts (passages once per corpus, questions once per set).

Padding is what a naive loop pays most for: passages of one corpus differ in length by ten times. Texts therefore wait in buckets of
similar length, and a bucket goes to the encoder when it holds a whole batch; the shapes are few, so the compilations are few.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from radit_jax import artifacts, progress
from radit_jax.data.corpus import PassageStore
from radit_jax.errors import InputError

Encode = Callable[[np.ndarray, np.ndarray], jax.Array]  # (tokens_BxT, mask_BxT) -> vectors_BxE
Batch = tuple[list[int], np.ndarray, np.ndarray]  # rows, tokens_BxT, mask_BxT
DTYPES = ("float32", "float16")
READ = 1024  # passages tokenized at a time
IN_FLIGHT = 2  # batches dispatched before the oldest result is fetched: the host tokenizes while the device computes
SHORTEST = 16  # tokens of the smallest bucket


class EncoderTokenizer(Protocol):
    """What embedding needs of a tokenizer: bare ids for lengths, and [CLS] … [SEP], truncated, right-padded to the longest."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_with_specials(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes (B, T) that the encoder is compiled for; B is a power of two with B·T ≤ batch_tokens.

    T goes by eights from 16 to 64 and then in quarters of an octave: 10 % of padding on Wikipedia passages of 32 words, where steps
    of a half octave had 16 %, for two compilations more. `most_rows` bounds B for small jobs, `min_rows` is the least B that the
    mesh can split (its data axis).
    """

    batch_tokens: int
    max_tokens: int
    most_rows: int
    min_rows: int = 1

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        lengths = [SHORTEST]
        while lengths[-1] < self.max_tokens:
            lengths.append(lengths[-1] + max(8, 1 << lengths[-1].bit_length() - 3))
        return (*lengths[:-1], self.max_tokens)

    def length(self, tokens: int) -> int:
        """T of the bucket that a text of so many tokens goes to."""
        return self.lengths[bisect.bisect_left(self.lengths, tokens)]

    def rows(self, length: int) -> int:
        """B of the bucket with this T."""
        fitting = 1 << max(self.batch_tokens // length, 1).bit_length() - 1
        enough = 1 << (self.most_rows - 1).bit_length()
        return max(min(fitting, enough), self.min_rows)


@dataclasses.dataclass
class Tally:
    """What one pass over texts cost."""

    texts: int = 0
    tokens: int = 0
    computed: int = 0  # tokens with padding
    truncated: int = 0  # texts longer than max_tokens
    shapes: set[tuple[int, int]] = dataclasses.field(default_factory=set)
    seconds: float = 0.0


def embed_passages(
    encode: Encode,
    tokenizer: EncoderTokenizer,
    store: PassageStore,
    folder: Path,
    *,
    shard_size: int,
    batch_tokens: int,
    max_tokens: int,
    dtype: str = "float32",
    min_rows: int = 1,
) -> dict[str, Any]:
    """Writes the vectors of every passage of `store`, row by row, to `folder`/vectors-00000.npy … and returns the facts.

    Shards of `shard_size` rows are whole or absent, so a killed run goes on from its last whole shard. `encode` is a jitted
    function (tokens_BxT, mask_BxT) → vectors_BxE. Raises InputError on an unknown dtype, an empty store, vectors that are not
    finite, or shards in `folder` of another shape.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype of the vectors is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not len(store):
        raise InputError("no passages to embed: the store is empty")
    ranges = [range(start, min(start + shard_size, len(store))) for start in range(0, len(store), shard_size)]
    present = [_present(folder, i, rows, dtype) for i, rows in enumerate(ranges)]
    buckets = Buckets(batch_tokens, max_tokens, most_rows=min(shard_size, len(store)), min_rows=min_rows)
    start = sum(len(rows) for rows, there in zip(ranges, present) if there)
    with progress.bar("embed", len(store), unit="passages", start=start) as advance:
        for i, rows in enumerate(ranges):
            if not present[i]:
                texts = (passage.content for at in _chunks(rows) for passage in store.read(at))
                _write_shard(folder, i, *_embed(encode, tokenizer, texts, len(rows), buckets, advance), dtype)
    return _facts(folder, shard_size, dtype)


def embed_queries(
    encode: Encode, tokenizer: EncoderTokenizer, texts: Sequence[str], *, batch_tokens: int, max_tokens: int, min_rows: int = 1
) -> np.ndarray:
    """Returns vectors_NxE (float32) of `texts`, in their order. Raises InputError when there are none."""
    if not texts:
        raise InputError("no queries to embed")
    buckets = Buckets(batch_tokens, max_tokens, most_rows=len(texts), min_rows=min_rows)
    return _embed(encode, tokenizer, iter(texts), len(texts), buckets, lambda count: None)[0]


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

    def __getitem__(self, rows_N: np.ndarray | slice) -> np.ndarray:
        """float32 vectors_NxE of these rows, in their order."""
        if isinstance(rows_N, slice):
            rows_N = np.arange(len(self))[rows_N] if rows_N.step not in (None, 1) else rows_N
        if isinstance(rows_N, slice):
            return self._span(*rows_N.indices(len(self))[:2])
        rows_N = np.asarray(rows_N)
        if rows_N.size and not 0 <= rows_N.min() <= rows_N.max() < len(self):
            raise IndexError(f"rows {rows_N.min()}…{rows_N.max()} of {len(self)} vectors")
        vectors_NxE = np.empty((len(rows_N), self.dim), np.float32)
        shard_N = np.searchsorted(self._starts, rows_N, side="right") - 1
        for i in np.unique(shard_N):
            here = shard_N == i
            vectors_NxE[here] = self.shards[i][rows_N[here] - self._starts[i]]
        return vectors_NxE

    def _span(self, start: int, stop: int) -> np.ndarray:
        parts = [
            shard[max(start - first, 0) : max(stop - first, 0)]
            for shard, first in zip(self.shards, self._starts)
            if first < stop and start < first + len(shard)
        ]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts], dtype=np.float32)


def open_vectors(folder: Path, count: int | None = None) -> Vectors:
    """Opens what `embed_passages` wrote. Raises InputError on missing or differing shards, or when there are not `count` vectors."""
    paths = sorted(Path(folder).glob("vectors-*.npy"))
    if not paths or [path.name for path in paths] != [_shard_path(Path(folder), i).name for i in range(len(paths))]:
        raise InputError(f"{folder}: found {len(paths)} vector shards, expected vectors-00000.npy and on without a gap")
    vectors = Vectors([np.load(path, mmap_mode="r", allow_pickle=False) for path in paths])
    for path, shard in zip(paths, vectors.shards):
        if shard.shape[1:] != (vectors.dim,):
            raise InputError(f"{path}: vectors of dimension {shard.shape[1:]}, the first shard has {vectors.dim}")
    if count is not None and len(vectors) != count:
        raise InputError(f"{folder}: {len(vectors):,} vectors, expected {count:,} (one per passage)")
    return vectors


def _embed(
    encode: Encode, tokenizer: EncoderTokenizer, texts: Iterator[str], count: int, buckets: Buckets, advance: Callable[[int], Any]
) -> tuple[np.ndarray, Tally]:
    tally, vectors_NxE = Tally(texts=count), None
    began = time.monotonic()
    batches = _batches(_tokenized(tokenizer, texts, buckets.max_tokens, tally), buckets)
    for rows, result_BxE in _encoded(encode, batches, tally):
        if vectors_NxE is None:
            vectors_NxE = np.empty((count, result_BxE.shape[1]), np.float32)
        vectors_NxE[rows] = result_BxE
        advance(len(rows))
    tally.seconds = time.monotonic() - began
    if not np.isfinite(vectors_NxE).all():
        bad = int(np.flatnonzero(~np.isfinite(vectors_NxE).all(axis=1))[0])
        raise InputError(f"the encoder's vector of text {bad} (of {count}) is not finite")
    return vectors_NxE, tally


def _tokenized(tokenizer: EncoderTokenizer, texts: Iterator[str], max_tokens: int, tally: Tally) -> Iterator[np.ndarray]:
    """The tokens of every text without padding; what had to be cut is counted."""
    specials = tokenizer.encode_with_specials([""], max_tokens)[1].sum()
    while chunk := list(itertools.islice(texts, READ)):
        tokens_BxT, mask_BxT = tokenizer.encode_with_specials(chunk, max_tokens)
        lengths_B = mask_BxT.sum(axis=1)
        # The tokenizer may have a lower limit of its own; whatever was cut is among the longest, and shows when it is not cut.
        longest = [text for text, length in zip(chunk, lengths_B) if length == lengths_B.max()]
        tally.truncated += sum(len(tokens) + specials > lengths_B.max() for tokens in tokenizer.encode_batch(longest))
        yield from (tokens_T[:length] for tokens_T, length in zip(tokens_BxT, lengths_B))


def _batches(texts: Iterable[np.ndarray], buckets: Buckets) -> Iterator[Batch]:
    """Yields (rows, tokens_BxT, mask_BxT): whole batches of one bucket, and at the end what is left, longest first."""
    waiting: dict[int, list[tuple[int, np.ndarray]]] = {length: [] for length in buckets.lengths}
    for row, tokens_T in enumerate(texts):
        length = buckets.length(len(tokens_T))
        waiting[length].append((row, tokens_T))
        if len(waiting[length]) == buckets.rows(length):
            yield _batch(waiting.pop(length), length, buckets.rows(length))
            waiting[length] = []
    # What is left shares batches across buckets: one part-filled batch instead of one per bucket.
    left = sorted((item for items in waiting.values() for item in items), key=lambda item: -len(item[1]))
    while left:
        length = buckets.length(len(left[0][1]))
        batch, left = left[: buckets.rows(length)], left[buckets.rows(length) :]
        yield _batch(batch, length, buckets.rows(length))


def _batch(items: list[tuple[int, np.ndarray]], length: int, rows: int) -> Batch:
    tokens_BxT, mask_BxT = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for b, (_, tokens_T) in enumerate(items):
        tokens_BxT[b, : len(tokens_T)] = tokens_T
        mask_BxT[b, : len(tokens_T)] = True
    mask_BxT[len(items) :, 0] = True  # an empty row has no softmax
    return [row for row, _ in items], tokens_BxT, mask_BxT


def _encoded(encode: Encode, batches: Iterable[Batch], tally: Tally) -> Iterator[tuple[list[int], np.ndarray]]:
    flying: collections.deque[tuple[list[int], jax.Array]] = collections.deque()
    for rows, tokens_BxT, mask_BxT in batches:
        tally.tokens += int(mask_BxT[: len(rows)].sum())
        tally.computed += tokens_BxT.size
        tally.shapes.add(tokens_BxT.shape)
        flying.append((rows, encode(tokens_BxT, mask_BxT)))
        if len(flying) > IN_FLIGHT:
            yield _fetched(*flying.popleft())
    while flying:
        yield _fetched(*flying.popleft())


def _fetched(rows: list[int], vectors_BxE: jax.Array) -> tuple[list[int], np.ndarray]:
    return rows, np.asarray(vectors_BxE, np.float32)[: len(rows)]


def _chunks(rows: range) -> Iterator[list[int]]:
    for start in range(0, len(rows), READ):
        yield list(rows[start : start + READ])


def _shard_path(folder: Path, i: int) -> Path:
    return folder / f"vectors-{i:05d}.npy"


def _present(folder: Path, i: int, rows: range, dtype: str) -> bool:
    """Whether an earlier run has written this shard; it must then be of this shape."""
    path = _shard_path(folder, i)
    if not path.exists():
        return False
    shard = np.load(path, mmap_mode="r", allow_pickle=False)
    if len(shard) != len(rows) or shard.dtype != dtype:
        raise InputError(f"{path}: {len(shard)} rows of {shard.dtype}, expected {len(rows)} of {dtype} (another run's)")
    return True


def _write_shard(folder: Path, i: int, vectors_NxE: np.ndarray, tally: Tally, dtype: str) -> None:
    first = _shard_path(folder, 0)
    if i and (dim := np.load(first, mmap_mode="r", allow_pickle=False).shape[1]) != vectors_NxE.shape[1]:
        raise InputError(f"the encoder gives vectors of dimension {vectors_NxE.shape[1]}, {first} has {dim}")
    with np.errstate(over="ignore"):  # what overflows is reported below
        narrowed = vectors_NxE.astype(dtype)
    if not np.isfinite(narrowed).all():
        raise InputError(f"the vectors do not fit {dtype} (largest absolute value {np.abs(vectors_NxE).max():.3g}); use float32")
    # The tally first: the array is what says that the shard is whole.
    artifacts.write_json(_shard_path(folder, i).with_suffix(".json"), dataclasses.asdict(tally) | {"shapes": sorted(tally.shapes)})
    artifacts.save_array(_shard_path(folder, i), narrowed)


def _facts(folder: Path, shard_size: int, dtype: str) -> dict[str, Any]:
    """Sums over the tallies of all shards, so that an interrupted run reports what an uninterrupted one does."""
    tallies = [json.loads(path.with_suffix(".json").read_text()) for path in sorted(folder.glob("vectors-*.npy"))]
    total = {key: sum(tally[key] for tally in tallies) for key in ("texts", "tokens", "computed", "truncated", "seconds")}
    return {
        "passages": total["texts"],
        "dim": open_vectors(folder).dim,
        "dtype": dtype,
        "shards": len(tallies),
        "shard_size": shard_size,
        "truncated": total["truncated"],
        "padding_share": round(1 - total["tokens"] / total["computed"], 4),
        "compiles": len({tuple(shape) for tally in tallies for shape in tally["shapes"]}),
        "passages_per_s": round(total["texts"] / total["seconds"], 1),
        "seconds": round(total["seconds"], 1),
    }
