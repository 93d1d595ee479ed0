"""ScaNN on the hosts: the corpus in parts, an index for each, what they find merged by float32 scores of the stored vectors.

A process builds and searches parts of its own. Parts on disk belong to the corpus and not to the processes that built them: whoever opens
them deals them out anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scann import scann_ops_pybind as scann

from radit_jax import artifacts, distributed, processor
from radit_jax.errors import InputError
from radit_jax.logbook import say
from radit_jax.retrieval.candidates import NO_ROW, Found, checked, in_groups, merged_over_processes, rescored
from radit_jax.retrieval.vectors import Vectors

SETTINGS_FILE = "scann.json"
BRUTE_FORCE_BELOW = 10_000  # vectors; there a scan of all is as fast as the tree, and exact
PART_ROWS = 4_000_000  # most vectors of a part: while it is built, twice their float32 bytes are in memory
HASWELL = frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma"))  # what ScaNN's code with AVX2 may be compiled for
AVX2_FLAG = "_ZN14research_scann14flags_internal15should_use_avx2E"  # ScaNN's: whether it is to use that code


@dataclasses.dataclass(frozen=True)
class ScannSettings:
    """How ScaNN is built and searched; `for_corpus` chooses by size, any field may be replaced.

    The anisotropic penalty stands for ScaNN's threshold T, whose effect depends on the dimension d: penalty = (d−1)·T² / (1−T²)
    for vectors of norm 1, to which all are scaled. Its customary T = 0.2 (d = 100) is a penalty of 4.
    """

    leaves: int  # leaves of the tree; 0: no tree and no codes, brute force
    leaves_searched: int
    reorder: int = 200  # best candidates by their codes that are scored in float32 …
    reorder_per_k: int = 10  # … or this many times k, if that is more
    dims_per_block: int = 2  # dimensions that share one 4-bit code
    anisotropic_penalty: float = 4.0  # an error along the vector costs so many times one across it
    soar: float = 1.5  # every vector is in a second leaf as well (ScaNN's SOAR λ); 0: in one leaf
    training_sample: int = 250_000  # vectors that leaves and codes are learned from

    @classmethod
    def for_corpus(cls, count: int, dim: int) -> ScannSettings:
        """The settings for so many vectors of this dimension: 2·√N leaves, of which 10·N^¼ are searched.

        On questions over real passages (MiniLM, N = 3,650 … 29,239) recall@10 of 0.99 needed 35, 41, 43, 46 of √N leaves and 0.995 needed
        41, 49, 56, 61: about N^0.19. Codes lost nothing there. Of more leaves the same share of the vectors is searched; what is near is
        then cut off less often: at 10^6 clustered vectors recall 0.99 takes 56 of 2,000 leaves and took 87 of 1,000, three times as long
        (`launch/bench.py search`); of 4,000 it takes 212. ScaNN's fast scan takes at most 256 blocks.
        """
        if count < BRUTE_FORCE_BELOW:
            return cls(leaves=0, leaves_searched=0)
        leaves = round(2 * math.sqrt(count))
        return cls(leaves, min(round(10 * count**0.25), leaves), dims_per_block=max(2, math.ceil(dim / 256)))


@dataclasses.dataclass(frozen=True)
class Part:
    """An index over some rows of the corpus."""

    rows: range
    settings: ScannSettings
    index: scann.ScannSearcher

    @classmethod
    def build(cls, vectors: Vectors, rows: range, settings: ScannSettings | None) -> Part:
        """Reads the rows from their memory-mapped shards, one after the other, and learns leaves and codes from them."""
        settings = settings or ScannSettings.for_corpus(len(rows), vectors.dim)
        return cls(rows, settings, _build(vectors[rows.start : rows.stop], settings))

    def candidates(self, query_BxE: np.ndarray, k: int) -> np.ndarray:
        """Rows of the corpus, (B, min(k, rows of this part))."""
        k, settings = min(k, len(self.rows)), self.settings
        reorder = min(max(settings.reorder, settings.reorder_per_k * k), len(self.rows))
        at_BxK, short_B = self._search(query_BxE, k, reorder, settings.leaves_searched)
        if short_B.any():  # the leaves searched hold fewer than k passages: search all of them
            at_BxK[short_B], _ = self._search(query_BxE[short_B], k, len(self.rows), settings.leaves)
        return self.rows.start + at_BxK

    def _search(self, query_BxE: np.ndarray, k: int, reorder: int, leaves: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in this part, and which queries found fewer than k (ScaNN fills those with a score of NaN)."""
        how: dict[str, int] = {} if not self.settings.leaves else {"pre_reorder_num_neighbors": reorder, "leaves_to_search": leaves}
        if self.settings.leaves:  # a thread takes a batch: ScaNN's own size of 256 would leave all but one idle
            how["batch_size"] = -(-len(query_BxE) // len(os.sched_getaffinity(0)))
        at_BxK, scores_BxK = self.index.search_batched_parallel(query_BxE, final_num_neighbors=k, **how)
        return at_BxK.astype(np.int64), ~np.isfinite(scores_BxK).all(axis=1)

    def save(self, folder: Path, vectors: Vectors) -> None:
        """Writes the part so that `folder` is whole or absent; it may be moved afterwards."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self.index.serialize(str(partial), relative_path=True)
        about = {"settings": dataclasses.asdict(self.settings), "rows": [self.rows.start, self.rows.stop]}
        artifacts.write_json(partial / SETTINGS_FILE, about | {"count": len(vectors), "dim": vectors.dim})
        os.replace(partial, folder)

    @classmethod
    def load(cls, folder: Path, vectors: Vectors) -> Part:
        """Opens what `save` wrote, over the vectors it was built from. Raises InputError when it was built from others."""
        about = _about(folder)
        if (about["count"], about["dim"]) != (len(vectors), vectors.dim):
            found, given = f"{about['count']:,} vectors of dimension {about['dim']}", f"{len(vectors):,} of dimension {vectors.dim}"
            raise InputError(f"{folder}: the index is of {found}, the vectors given are {given}")
        if any(folder.glob("*.pkl")):  # ScaNN would unpickle it; we never write one
            raise InputError(f"{folder}: holds a pickle file, expected only what ScannSearcher.save writes")
        _use_avx2()
        index = scann.load_searcher(str(folder), assets_backcompat_shim=False)
        return cls(range(*about["rows"]), ScannSettings(**about["settings"]), index)


class ScannSearcher:
    """A tree of leaves, product-quantized scores inside the best of them, float32 scores for the best of those; over the parts of a corpus.

    Of several processes each holds parts of its own, perhaps none, and all call `search` with the same queries.
    """

    def __init__(self, vectors: Vectors, settings: ScannSettings | None = None, parts: int = 0):
        """Builds the parts of this process in memory; `parts` as for `cut`, `settings` are chosen for the size of each unless given."""
        ranges = cut(len(vectors), parts)
        self.vectors, self.count = vectors, len(ranges)
        self.parts = {i: Part.build(vectors, ranges[i], settings) for i in _own(len(ranges))}

    @property
    def settings(self) -> ScannSettings:
        """Of the first part here."""
        return next(iter(self.parts.values())).settings

    def search(self, query_BxE: np.ndarray, k: int) -> Found:
        """Returns rows_BxK (int64) and scores_BxK (float32), best first. Raises InputError on a k or a dimension that does not fit."""
        return in_groups(self._search_some, checked(query_BxE, k, self.vectors), k)

    def _search_some(self, query_BxE: np.ndarray, k: int) -> Found:
        nothing_Bx0 = np.full((len(query_BxE), 0), NO_ROW, np.int64)
        rows_BxC = np.concatenate([nothing_Bx0, *(part.candidates(query_BxE, k) for part in self.parts.values())], axis=1)
        return merged_over_processes(rescored(query_BxE, rows_BxC, self.vectors), k)

    def save(self, folder: Path) -> None:
        """Writes the parts of this process to `folder`, which may be moved afterwards."""
        for i, part in self.parts.items():
            part.save(part_path(folder, i, self.count), self.vectors)

    @classmethod
    def load(cls, folder: Path, vectors: Vectors) -> ScannSearcher:
        """Opens what `save` or `build_index` wrote, dealt out to the processes there are now.

        Raises InputError when a part is missing or was built from other vectors.
        """
        searcher = cls.__new__(cls)
        searcher.vectors, searcher.count = vectors, stored_parts(folder)
        paths = {i: part_path(folder, i, searcher.count) for i in range(searcher.count)}
        if missing := [path.name for path in paths.values() if not path.is_dir()]:
            raise InputError(f"{folder}: {len(missing)} of {searcher.count} parts of the ScaNN index are missing, first {missing[0]}")
        searcher.parts = {i: Part.load(paths[i], vectors) for i in _own(searcher.count)}
        return searcher


def build_index(folder: Path, vectors: Vectors, settings: ScannSettings | None = None, parts: int = 0) -> dict[str, Any]:
    """Writes what `ScannSearcher.load` opens, one part in memory at a time; the parts that an earlier run wrote are kept.

    Several processes call this together, each builds parts of its own. Returns the facts. `parts` as for `cut`.
    """
    folder = Path(folder)
    begun = distributed.from_leader(stored_parts(folder, 0))  # by another number of processes, perhaps
    ranges = cut(len(vectors), begun or parts)
    for i in _own(len(ranges)):
        path = part_path(folder, i, len(ranges))
        if not path.is_dir():
            say(f"index: part {i + 1} of {len(ranges)}, {len(ranges[i]):,} vectors")
            Part.build(vectors, ranges[i], settings).save(path, vectors)
    distributed.meet("all parts are indexed")
    return {"vectors": len(vectors), "parts": len(ranges)}


def cut(count: int, parts: int = 0) -> Sequence[range]:
    """The rows of every part, as even as may be. 0: a part for every process, and no part above PART_ROWS."""
    if not 0 <= parts <= count:
        raise InputError(f"{parts} parts of an index of {count:,} vectors, expected 0 (as many as processes, or more) to {count:,}")
    parts = parts or min(max(distributed.count(), math.ceil(count / PART_ROWS)), count)
    return [range(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def part_path(folder: Path, i: int, count: int) -> Path:
    return Path(folder) / f"scann-{i:05d}-of-{count:05d}"


def stored_parts(folder: Path, default: int | None = None) -> int:
    """Of how many parts the index in `folder` is. InputError, or the default, where there is none."""
    names = [match for path in Path(folder).glob("scann-*") if (match := re.fullmatch(r"scann-\d{5}-of-(\d{5})", path.name))]
    if names:
        return int(names[0][1])
    if default is None:
        raise InputError(f"{folder}: no ScaNN index (expected folders scann-00000-of-…)")
    return default


def _own(count: int) -> range:
    """The parts of this process."""
    return range(distributed.index(), count, distributed.count())


def _about(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / SETTINGS_FILE).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: no ScaNN index ({SETTINGS_FILE} is missing or damaged)") from error


@functools.cache
def _use_avx2() -> None:
    """Tells ScaNN that there is AVX2 where there is: its wheels (1.3.5 to 1.4.2 at least) test for none and stay with SSE4.

    10^6 vectors are searched in two thirds of the time (`launch/bench.py search`). Where ScaNN knows by itself nothing changes.
    """
    if processor.features() >= HASWELL:
        with contextlib.suppress(ValueError, AttributeError, OSError):  # a ScaNN without such a flag
            _flag().value = True


def _flag() -> ctypes.c_bool:
    """ScaNN's own variable. ValueError, AttributeError or OSError where it has none."""
    return ctypes.c_bool.in_dll(ctypes.CDLL(scann.scann_pybind.__file__), AVX2_FLAG)


def _build(vectors_NxE: np.ndarray, settings: ScannSettings) -> scann.ScannSearcher:
    """Scales the vectors to a norm of 1 where they lie: their order stays, and of short ones ScaNN learns worse codes."""
    _use_avx2()
    norm = math.sqrt(np.einsum("ne,ne->n", vectors_NxE, vectors_NxE).mean(dtype=np.float64))
    vectors_NxE /= norm or 1
    builder = scann.builder(vectors_NxE, 10, "dot_product")  # 10: every search says its own k
    if not settings.leaves:
        return builder.score_brute_force().build()
    count, dim = vectors_NxE.shape
    sample = min(settings.training_sample, count)
    builder = builder.tree(settings.leaves, settings.leaves_searched, training_sample_size=sample, soar_lambda=settings.soar or None)
    threshold = math.sqrt(settings.anisotropic_penalty / (dim - 1 + settings.anisotropic_penalty))
    builder = builder.score_ah(settings.dims_per_block, anisotropic_quantization_threshold=threshold, training_sample_size=sample)
    return builder.reorder(settings.reorder).build()
