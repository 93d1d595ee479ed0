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
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from radit_jax import distributed, progress, sharding, streams
from radit_jax.data.corpus import PassageStore
from radit_jax.data.padding import LINE, computed, line_of_call, line_rows, longer, real_indices, rows_of_call
from radit_jax.errors import InputError
from radit_jax.retrieval.distinct import Distinct
from radit_jax.retrieval.vectors import DTYPES, about_shard, open_vectors, read_shard, shard_path, write_shard

Encode = Callable[[np.ndarray, np.ndarray, np.ndarray | None], jax.Array]  # (tokens_BxT, mask_BxT, indices_N or None) -> vectors_BxE
Batch = tuple[list[int], np.ndarray, np.ndarray, np.ndarray | None]  # rows; tokens_BxT, mask_BxT, indices_N
SHARD = 8_192  # passages between two writes …
MOST_SHARDS = 4_096  # … or more in a corpus so large: every shard is a mapping of each process that reads them
READ = 1024  # passages tokenized at a time
IN_FLIGHT = 2  # batches that a stream has dispatched before it fetches the oldest result: the host tokenizes while the device computes
SHORTEST = 16  # tokens of the smallest bucket


class EncoderTokenizer(Protocol):
    """What embedding needs of a tokenizer: bare ids for lengths, and [CLS] … [SEP], truncated, right-padded to the longest."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...

    def encode_with_specials(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Buckets:
    """The shapes (B, T) that the encoder is compiled for, B a power of two with B·T ≤ batch_tokens, and how many calls run at once.

    T goes as `padding.longer` says: 10 % of padding on Wikipedia passages of 32 words, where steps of a half octave had 16 %, for two
    compilations more. `most_rows` bounds B for small jobs, `min_rows` is the least B that the mesh can split (its data axis).

    In one line (`line`, see sharding.in_line) it is LINE real tokens that make a batch whole, and B is what holds them.
    """

    batch_tokens: int
    max_tokens: int
    most_rows: int
    min_rows: int = 1
    line: bool = False
    streams: int = 1

    @classmethod
    def on(cls, mesh: Mesh | None, batch_tokens: int, max_tokens: int, most_rows: int) -> Buckets:
        """Those of an encoder on this mesh (None: one device)."""
        mesh = sharding.mesh_or_one(mesh)
        line, at_once = sharding.in_line(mesh), streams.count(mesh)
        return cls(batch_tokens, max_tokens, most_rows, min_rows=mesh.shape[sharding.DATA], line=line, streams=at_once)

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        lengths = [SHORTEST]
        while lengths[-1] < self.max_tokens:
            lengths.append(longer(lengths[-1]))
        return (*lengths[:-1], self.max_tokens)

    def length(self, tokens: int) -> int:
        """T of the bucket that a text of so many tokens goes to."""
        return self.lengths[bisect.bisect_left(self.lengths, tokens)]

    def rows(self, length: int) -> int:
        """B of the bucket with this T."""
        if self.line:
            shorter = self.lengths[max(self.lengths.index(length) - 1, 0)]
            return min(line_rows(min(shorter + 1, length)), self.most_rows)
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
    copies: int = 0  # texts that were there before, whose vectors are copied
    shapes: set[tuple[int, int, int]] = dataclasses.field(default_factory=set)
    seconds: float = 0.0


def embed_passages(
    encode: Encode,
    tokenizer: EncoderTokenizer,
    store: PassageStore,
    folder: Path,
    *,
    batch_tokens: int,
    max_tokens: int,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    shard_size: int | None = None,
) -> dict[str, Any]:
    """Writes the vectors of every passage of `store`, row by row, to `folder`/vectors-00000.npy … and returns the facts.

    Shards are whole or absent: a run that was killed goes on from those that are there, with any number of processes, which call this
    together. Process i of n embeds shards i, i + n, … on its own devices and hears of the others only at the end; the facts are the
    leader's. `encode` is a jitted function (tokens_BxT, mask_BxT, indices_N) → vectors_BxE (encode.encoding) on `mesh` (default: one
    device), `dtype` is what is stored, `shard_size` the most rows of a shard (default: `shard_rows`). Raises InputError on an unknown
    dtype, an empty store, more processes than passages, vectors that are not finite, or shards in `folder` of another shape.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype of the vectors is {dtype!r}, expected one of {', '.join(DTYPES)}")
    if not len(store):
        raise InputError("no passages to embed: the store is empty")
    rows = distributed.from_leader(_begun(folder) or shard_rows(len(store), distributed.count(), shard_size))
    ranges = [range(start, min(start + rows, len(store))) for start in range(0, len(store), rows)]
    own = {i: ranges[i] for i in range(distributed.index(), len(ranges), distributed.count())}
    buckets = Buckets.on(mesh, batch_tokens, max_tokens, most_rows=min(rows, len(store)))
    embed_shards(encode, tokenizer, store, folder, own, buckets, dtype, shard_size=rows)
    distributed.meet("all passages are embedded")
    return _facts(folder, rows, dtype) if distributed.leads() else {}


def shard_rows(count: int, processes: int, most: int | None = None) -> int:
    """Passages between two writes: what a kill can lose. Every process gets a shard; InputError where there are too few passages."""
    if count < processes:
        raise InputError(f"{processes} processes are more than the {count} passages to embed: expected at most one process a passage")
    return min(most or max(SHARD, math.ceil(count / MOST_SHARDS)), count // processes)


def embed_shards(
    encode: Encode,
    tokenizer: EncoderTokenizer,
    store: PassageStore,
    folder: Path,
    shards: Mapping[int, range],
    buckets: Buckets,
    dtype: str,
    shard_size: int,
) -> None:
    """Embeds these shards (number → rows of the store) one by one, without those that are there already.

    A text that is in an earlier one of these shards is copied from there.
    """
    missing = {i: rows for i, rows in shards.items() if not _present(folder, i, rows, dtype)}
    total = sum(map(len, shards.values()))
    last = max(missing, default=-1)  # of those after it no text is asked for
    distinct = Distinct()

    @functools.cache
    def shard(i: int) -> np.ndarray:
        return read_shard(shard_path(folder, i))

    def stored(row: int) -> np.ndarray:
        return shard(row // shard_size)[row % shard_size]

    with progress.bar("embed", total, unit="passages", start=total - sum(map(len, missing.values()))) as advance:
        for i in sorted(i for i in shards if i <= last):
            texts = (passage.content for at in _chunks(shards[i]) for passage in store.read(at))
            if i in missing:
                vectors_NxE, tally = _embed(encode, tokenizer, texts, shards[i], buckets, advance, DTYPES[dtype], distinct, stored)
                _check_dim(folder, vectors_NxE.shape[1])
                about = dataclasses.asdict(tally) | {"shapes": sorted(tally.shapes), "shard_size": shard_size}
                write_shard(shard_path(folder, i), vectors_NxE, about)
                del vectors_NxE  # before the next shard's are there
            else:
                collections.deque(map(distinct.first, shards[i], texts), maxlen=0)
            distinct.settle()


def embed_queries(
    encode: Encode, tokenizer: EncoderTokenizer, texts: Sequence[str], *, batch_tokens: int, max_tokens: int, mesh: Mesh | None = None
) -> np.ndarray:
    """Returns vectors_NxE (float32) of `texts`, in their order, as `embed_passages` makes them. InputError when there are none."""
    if not texts:
        raise InputError("no queries to embed")
    buckets, rows = Buckets.on(mesh, batch_tokens, max_tokens, most_rows=len(texts)), range(len(texts))
    return _embed(encode, tokenizer, iter(texts), rows, buckets, lambda count: None, DTYPES["float32"], Distinct())[0]


def _embed(
    encode: Encode,
    tokenizer: EncoderTokenizer,
    texts: Iterator[str],
    rows: range,
    buckets: Buckets,
    advance: Callable[[int], Any],
    dtype: np.dtype,
    distinct: Distinct,
    stored: Callable[[int], np.ndarray] | None = None,
) -> tuple[np.ndarray, Tally]:
    """The vectors of these rows of a corpus, whose texts are given; `stored` reads that of a row before them, the first of its kind."""
    tally, vectors_NxE = Tally(texts=len(rows)), None
    began = time.monotonic()
    copies: list[tuple[int, int]] = []
    batches = _batches(_tokenized(tokenizer, _new(texts, rows, distinct, copies), buckets.max_tokens, tally), buckets)
    shared = streams.Shared(_counted(batches, tally))
    for at, result_BxE in streams.merged([_encoded(encode, shared) for _ in range(buckets.streams)]):
        if vectors_NxE is None:
            vectors_NxE = np.empty((len(rows), result_BxE.shape[1]), dtype)
        vectors_NxE[at] = _narrowed(at, result_BxE, dtype)
        advance(len(at))
    for at, first in copies:
        vector_E = vectors_NxE[first - rows.start] if first in rows else stored(first)
        if vectors_NxE is None:  # nothing here is new
            vectors_NxE = np.empty((len(rows), len(vector_E)), dtype)
        vectors_NxE[at] = vector_E
    advance(len(copies))
    tally.copies, tally.seconds = len(copies), time.monotonic() - began
    return vectors_NxE, tally


def _narrowed(rows: list[int], vectors_BxE: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if not np.isfinite(vectors_BxE).all():
        bad = rows[int(np.flatnonzero(~np.isfinite(vectors_BxE).all(axis=1))[0])]
        raise InputError(f"the encoder's vector of text {bad} is not finite")
    with np.errstate(over="ignore"):  # what overflows is reported below
        narrowed_BxE = vectors_BxE.astype(dtype)
    if not np.isfinite(narrowed_BxE).all():
        raise InputError(f"the vectors do not fit {dtype.name} (largest absolute value {np.abs(vectors_BxE).max():.3g}); use float32")
    return narrowed_BxE


def _new(texts: Iterator[str], rows: range, distinct: Distinct, copies: list[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """(place in `rows`, text) of every text that was not there before; `copies` get (place, row of the same text) of the others."""
    for at, (row, text) in enumerate(zip(rows, texts)):
        first = distinct.first(row, text)
        if first == row:
            yield at, text
        else:
            copies.append((at, first))


def _tokenized(
    tokenizer: EncoderTokenizer, texts: Iterator[tuple[int, str]], max_tokens: int, tally: Tally
) -> Iterator[tuple[int, np.ndarray]]:
    """(row, tokens without padding) of every text; what had to be cut is counted."""
    specials = tokenizer.encode_with_specials([""], max_tokens)[1].sum()
    while items := list(itertools.islice(texts, READ)):
        rows, chunk = zip(*items)
        tokens_BxT, mask_BxT = tokenizer.encode_with_specials(list(chunk), max_tokens)
        lengths_B = mask_BxT.sum(axis=1)
        # The tokenizer may have a lower limit of its own; whatever was cut is among the longest, and shows when it is not cut.
        longest = [text for text, length in zip(chunk, lengths_B) if length == lengths_B.max()]
        tally.truncated += sum(len(tokens) + specials > lengths_B.max() for tokens in tokenizer.encode_batch(longest))
        yield from ((row, tokens_T[:length]) for row, tokens_T, length in zip(rows, tokens_BxT, lengths_B))


def _batches(texts: Iterable[tuple[int, np.ndarray]], buckets: Buckets) -> Iterator[Batch]:
    """Whole batches of one bucket, and at the end what is left, longest first."""
    waiting: dict[int, list[tuple[int, np.ndarray]]] = {length: [] for length in buckets.lengths}
    tokens = dict.fromkeys(buckets.lengths, 0)
    for row, tokens_T in texts:
        length = buckets.length(len(tokens_T))
        full = buckets.line and tokens[length] + len(tokens_T) > LINE
        if full or len(waiting[length]) == buckets.rows(length):
            yield _batch(waiting[length], length, buckets.rows(length), LINE if full else 0, buckets)
            waiting[length], tokens[length] = [], 0
        waiting[length].append((row, tokens_T))
        tokens[length] += len(tokens_T)
    # What is left shares batches across buckets: one part-filled batch instead of one per bucket.
    left = sorted((item for items in waiting.values() for item in items), key=lambda item: -len(item[1]))
    while left:
        length = buckets.length(len(left[0][1]))
        rows, places = buckets.rows(length), 0
        sizes = [len(tokens_T) for _, tokens_T in left[:rows]]
        if buckets.line:
            taken, rows, places = line_of_call(sizes, rows)
        else:
            taken = rows = max(rows_of_call(sizes, length, rows, jax.default_backend()), buckets.min_rows)
        batch, left = left[:taken], left[taken:]
        yield _batch(batch, length, rows, places, buckets)


def _batch(items: list[tuple[int, np.ndarray]], length: int, rows: int, places: int, buckets: Buckets) -> Batch:
    tokens_BxT, mask_BxT = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for b, (_, tokens_T) in enumerate(items):
        tokens_BxT[b, : len(tokens_T)] = tokens_T
        mask_BxT[b, : len(tokens_T)] = True
    return [row for row, _ in items], tokens_BxT, mask_BxT, real_indices(mask_BxT, places) if buckets.line else None


def _counted(batches: Iterable[Batch], tally: Tally) -> Iterator[Batch]:
    for batch in batches:
        rows, tokens_BxT, mask_BxT, indices_N = batch
        tally.tokens += int(mask_BxT[: len(rows)].sum())
        places = computed(tokens_BxT, indices_N)
        tally.computed += places
        tally.shapes.add((*tokens_BxT.shape, places))
        yield batch


def _encoded(encode: Encode, batches: Iterable[Batch]) -> Iterator[tuple[list[int], np.ndarray]]:
    flying: collections.deque[tuple[list[int], jax.Array]] = collections.deque()
    for rows, tokens_BxT, mask_BxT, indices_N in batches:
        flying.append((rows, encode(tokens_BxT, mask_BxT, indices_N)))
        if len(flying) > IN_FLIGHT:
            yield _fetched(*flying.popleft())
    while flying:
        yield _fetched(*flying.popleft())


def _fetched(rows: list[int], vectors_BxE: jax.Array) -> tuple[list[int], np.ndarray]:
    return rows, np.asarray(vectors_BxE, np.float32)[: len(rows)]


def _chunks(rows: range) -> Iterator[list[int]]:
    for start in range(0, len(rows), READ):
        yield list(rows[start : start + READ])


def _present(folder: Path, i: int, rows: range, dtype: str) -> bool:
    """Whether an earlier run has written this shard; it must then be of this shape."""
    path = shard_path(folder, i)
    if not path.exists():
        return False
    shard = read_shard(path)
    if len(shard) != len(rows) or shard.dtype != DTYPES[dtype]:
        raise InputError(f"{path}: {len(shard)} rows of {shard.dtype}, expected {len(rows)} of {dtype} (another run's)")
    return True


def _check_dim(folder: Path, dim: int) -> None:
    other = next(folder.glob("vectors-*.npy"), None)
    if other and (found := read_shard(other).shape[1]) != dim:
        raise InputError(f"the encoder gives vectors of dimension {dim}, {other} has {found}")


def _begun(folder: Path) -> int:
    """The rows of the shards that an earlier run began here, perhaps with another number of processes; 0 where there are none."""
    present = next(folder.glob("vectors-*.npy"), None)
    return about_shard(present).get("shard_size", 0) if present else 0


def _facts(folder: Path, shard_size: int, dtype: str) -> dict[str, Any]:
    """Sums over the tallies of all shards, so that an interrupted run reports what an uninterrupted one does."""
    tallies = [about_shard(path) for path in sorted(folder.glob("vectors-*.npy"))]
    total = {key: sum(tally.get(key, 0) for tally in tallies) for key in ("texts", "tokens", "computed", "truncated", "copies", "seconds")}
    return {
        "passages": total["texts"],
        "dim": open_vectors(folder).dim,
        "dtype": dtype,
        "shards": len(tallies),
        "shard_size": shard_size,
        "truncated": total["truncated"],
        "copies": total["copies"],  # of a text that one process had before: not computed again
        "padding_share": round(1 - total["tokens"] / total["computed"], 4),
        "compiles": len({tuple(shape) for tally in tallies for shape in tally["shapes"]}),
        "passages_per_s": round(total["texts"] / total["seconds"], 1),  # of one process
        "seconds": round(total["seconds"], 1),
    }
