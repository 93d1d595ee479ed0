"""Examples → examples with their k passages, made once and stored (SPEC section 4: the searcher never runs inside training).

What is stored stands next to the ids it belongs to, and every reading compares them: rows alone would silently point to other
passages after a new split of the corpus.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from radit_jax import artifacts, distributed, progress
from radit_jax.data.corpus import PassageStore
from radit_jax.errors import InputError
from radit_jax.retrieval.search import Searcher
from radit_jax.types import Example, Retrieved

SEARCH = 1024  # questions searched between two steps of the progress bar
NO_ROW = -1  # in rows_NxK where the example takes no passages


@dataclasses.dataclass(frozen=True)
class Found:
    """What was retrieved for N examples, as it lies on disk (one .npy a field). Ids are UTF-8 bytes of fixed width."""

    example_ids: np.ndarray  # N
    passage_ids: np.ndarray  # NxK, empty where the example takes no passages
    rows: np.ndarray  # NxK int64 into the passage store
    scores: np.ndarray  # NxK float32, s(x, c)

    @property
    def k(self) -> int:
        return self.rows.shape[1]


class Retrieval:
    """Examples with their passages, best first: `len()`, `[i] -> Retrieved`; passages are read from the store when asked for."""

    def __init__(self, source: Path | Found, examples: Sequence[Example], store: PassageStore):
        """`source` is a folder of `write_retrieval` or what was found just now. The examples may be fewer than those stored, in any order.

        Raises InputError when an example is not among those stored, or a row is not in the passage store.
        """
        self.found = source if isinstance(source, Found) else _read(source)
        self.examples, self.store = examples, store
        self._name = "retrieval" if isinstance(source, Found) else str(source)
        self._at = self._places()
        if self.found.rows.size and self.found.rows.max() >= len(store):
            raise InputError(f"{self._name}: refers to passage row {self.found.rows.max()}, the corpus has {len(store):,} passages")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Retrieved:
        """Raises InputError when a stored passage id is not the id at its row of the store."""
        example, at = self.examples[i], self._at[i]
        if not example.retrieve:
            return Retrieved(example, (), np.zeros(0, np.int64), np.zeros(0, np.float32))
        rows_K = np.asarray(self.found.rows[at])
        if (rows_K == NO_ROW).any():
            raise InputError(f"{self._name}: example {example.id!r} was stored without passages, but asks for retrieval")
        passages = tuple(self.store.read(rows_K))
        for row, passage, stored in zip(rows_K, passages, self.found.passage_ids[at]):
            if passage.id.encode() != stored:
                raise InputError(f"{self._name}: row {row} was passage {stored.decode()!r}, the corpus has {passage.id!r} there")
        return Retrieved(example, passages, rows_K, np.asarray(self.found.scores[at]))

    def __iter__(self) -> Iterator[Retrieved]:
        return (self[i] for i in range(len(self)))

    @property
    def rows_NxK(self) -> np.ndarray:
        """The rows of all examples in the passage store; NO_ROW where one takes no passages."""
        return self.found.rows[self._at]

    def of(self, examples: Sequence[Example]) -> Retrieval:
        """The same for these examples alone."""
        return Retrieval(self.found, examples, self.store)

    def _places(self) -> list[int]:
        """Where each example is stored: by its id, not by its position."""
        place = {id: at for at, id in enumerate(self.found.example_ids.tolist())}
        missing = [example.id for example in self.examples if example.id.encode() not in place]
        if missing:
            raise InputError(f"{self._name}: nothing stored for {len(missing)} of {len(self.examples)} examples, first {missing[0]!r}")
        return [place[example.id.encode()] for example in self.examples]


def retrieve(
    examples: Sequence[Example],
    embed: Callable[[list[str]], np.ndarray],
    searcher: Searcher,
    store: PassageStore,
    k: int,
) -> Retrieval:
    """Searches k passages for every example that takes them. `embed` gives the query vectors_NxE of texts (the query encoder).

    Passages that an example excludes are left out, so that it still gets k. Raises InputError on ids used twice, on a k that the
    corpus cannot fill, on unknown excluded ids, and on vectors of another dimension than the index. Several processes call this together
    with the same examples, and all get what was found.
    """
    _check(examples, searcher, store)
    asking = [i for i, example in enumerate(examples) if example.retrieve]
    rows_NxK = np.full((len(examples), k), NO_ROW, np.int64)
    scores_NxK = np.full((len(examples), k), -np.inf, np.float32)
    if asking:
        query_NxE = embed([examples[i].query for i in asking])
        rows_NxK[asking], scores_NxK[asking] = _search([examples[i] for i in asking], query_NxE, searcher, store, k)
    ids = np.array([example.id.encode() for example in examples], np.bytes_)
    return Retrieval(Found(ids, _passage_ids(rows_NxK, store), rows_NxK, scores_NxK), examples, store)


def write_retrieval(folder: Path, retrieval: Retrieval) -> dict[str, int]:
    """Writes what `Retrieval(folder, examples, store)` opens; returns the facts. All processes have found the same: the leader writes."""
    for field in dataclasses.fields(Found) if distributed.leads() else ():
        artifacts.save_array(_path(folder, field.name), getattr(retrieval.found, field.name))
    return {"examples": len(retrieval.found.example_ids), "k": retrieval.found.k}


def _search(
    examples: list[Example], query_NxE: np.ndarray, searcher: Searcher, store: PassageStore, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """rows_NxK and scores_NxK without the excluded rows: as many more are searched as the example with most exclusions has."""
    excluded = [np.array([store.row_of(id) for id in example.exclude], np.int64) for example in examples]
    fetched = k + max(len(rows) for rows in excluded)
    if k <= len(store) < fetched:
        raise InputError(f"k = {k} passages and {fetched - k} excluded ones make {fetched}, the corpus has {len(store):,} passages")
    rows_NxK, scores_NxK = np.empty((len(examples), k), np.int64), np.empty((len(examples), k), np.float32)
    with progress.bar("retrieve", len(examples), unit="questions") as advance:
        for start in range(0, len(examples), SEARCH):
            rows_BxF, scores_BxF = searcher.search(query_NxE[start : start + SEARCH], fetched)
            for b, (rows_F, scores_F) in enumerate(zip(rows_BxF, scores_BxF)):
                kept = np.flatnonzero(~np.isin(rows_F, excluded[start + b]))[:k]
                rows_NxK[start + b], scores_NxK[start + b] = rows_F[kept], scores_F[kept]
            advance(len(rows_BxF))
    return rows_NxK, scores_NxK


def _passage_ids(rows_NxK: np.ndarray, store: PassageStore) -> np.ndarray:
    """The ids at these rows, each row read once."""
    rows, inverse = np.unique(rows_NxK, return_inverse=True)
    ids = [b"" if row == NO_ROW else store[int(row)].id.encode() for row in rows]
    return np.array(ids, np.bytes_)[inverse].reshape(rows_NxK.shape)


def _check(examples: Sequence[Example], searcher: Searcher, store: PassageStore) -> None:
    if len(searcher.vectors) != len(store):
        raise InputError(f"the index has {len(searcher.vectors):,} vectors, the corpus {len(store):,} passages")
    seen: set[str] = set()
    for example in examples:
        if example.id in seen:
            raise InputError(f"two examples have the id {example.id!r}")
        seen.add(example.id)


def _read(folder: Path) -> Found:
    try:
        arrays = [np.load(_path(Path(folder), field.name), mmap_mode="r", allow_pickle=False) for field in dataclasses.fields(Found)]
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: not a whole retrieval ({error})") from error
    found = Found(*arrays)
    if len(found.example_ids) != len(found.rows) or not found.rows.shape == found.scores.shape == found.passage_ids.shape:
        shapes = ", ".join(f"{field.name} {array.shape}" for field, array in zip(dataclasses.fields(Found), arrays))
        raise InputError(f"{folder}: arrays of different lengths ({shapes})")
    return found


def _path(folder: Path, name: str) -> Path:
    return Path(folder) / f"{name}.npy"
