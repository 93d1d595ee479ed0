"""The corpus: documents from files, split into passages of at most W words, kept on disk with random access (SPEC section 2).

Millions of passages, never all in memory: documents stream in, passages stream out to ArrayRecord shards, and what stays outside the
shards is 16 bytes a passage (a hash of its id and its row) plus 8 bytes a document (its first row), sorted a part at a time when written
and memory-mapped when read.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from radit_jax import artifacts
from radit_jax.data import files, id_index, sources
from radit_jax.data.records import BadRecord, BadRecords, id_field, json_lines, text_field
from radit_jax.data.sentences import sentences
from radit_jax.errors import InputError
from radit_jax.paths import named
from radit_jax.types import Passage

SHARD_SIZE = 65_536  # passages; a shard ends with a document, so it may hold a few more
MOST_OPEN = 256  # shards: each is an open file and its table of chunks
STORE = "store.json"  # written last: a store with it is whole
BEIR_CORPUS = "corpus.jsonl"  # what makes a folder a BEIR folder
# Four passages a chunk: a third smaller on disk than one each, and as fast to read at random (measured, 5-11 microseconds).
_WRITER = "group_size:4,zstd:3"
_READER = "readahead_buffer_size:0,max_parallelism:0"  # what ArrayRecord documents for random access


# --- documents ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Documents:
    """The documents of one source, in order; every iteration reads the source anew."""

    source: Path
    max_bad_records: int = 0

    def __iter__(self) -> Iterator[Passage]:
        empty = True
        for _, document in self._placed(BadRecords(self.max_bad_records)):
            empty = False
            yield document
        if empty:
            raise InputError(f"{self.source}: the corpus is empty, expected jsonl documents or {' / '.join(files.SUFFIXES)} files")

    def where(self, number: int) -> str:
        """The place (file:line, or file) of document `number`, from 0; reads the source again, so for messages only."""
        placed = self._placed(BadRecords(self.max_bad_records, quiet=True))
        return next(itertools.islice(placed, number, None))[0]

    def _placed(self, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
        beir = self.source / BEIR_CORPUS
        if self.source.is_dir() and not beir.is_file():
            yield from _text_files(self.source, bad)
        elif self.source.name.removesuffix(".gz").endswith(".tsv"):
            yield from _rows(self.source, bad)
        else:
            path = beir if self.source.is_dir() else self.source
            for line, document in json_lines(path, _parse_document, bad):
                yield f"{path}:{line}", document


def documents(source: str | Path, max_bad_records: int = 0) -> Documents:
    """Documents of a jsonl(.gz) file {"id", "title", "text"[, "section"]} (Atlas's Wikipedia is one), of DPR's psgs_w100.tsv(.gz),
    of a BEIR folder, or of a folder of .txt, .md, .html and .pdf files (data/files.py), whose ids are their paths inside the folder.

    Raises InputError (file:line) past `max_bad_records`, and for an empty corpus.
    """
    path = named(source)
    if not path.exists():
        raise InputError(f"{path}: no such corpus, expected a jsonl(.gz) or tsv(.gz) file, a BEIR folder or a folder of text files")
    return Documents(path, max_bad_records)


def _parse_document(record: Mapping[str, Any]) -> Passage:
    """BEIR says "_id"; Atlas has the section beside the title."""
    id = id_field(record, "_id" if "id" not in record and "_id" in record else "id")
    title = text_field(record, "title", empty_ok=True).strip()
    section = text_field(record, "section", empty_ok=True).strip() if record.get("section") else ""
    return Passage(id, f"{title}: {section}" if title and section else title or section, text_field(record, "text"))


def _rows(path: Path, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
    """DPR's table: id, text, title."""
    for where, record in sources.table_rows(path, "\t", quoted=True):
        try:
            yield where, _parse_document(record)
        except BadRecord as problem:
            bad.add(where, problem)


def _text_files(folder: Path, bad: BadRecords) -> Iterator[tuple[str, Passage]]:
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in files.SUFFIXES and path.is_file())
    for path in sorted(paths, key=lambda path: path.relative_to(folder).as_posix()):
        try:
            id = text_field({"file name": path.relative_to(folder).as_posix()}, "file name")
            yield str(path), Passage(id, *files.read(path))
        except (BadRecord, OSError, UnicodeError) as problem:
            bad.add(str(path), problem)


# --- splitting ---------------------------------------------------------------------------------------------------------------------


def split(document: Passage, max_words: int) -> list[Passage]:
    """Passages of at most `max_words` words (between white space; the title is not counted), cut at sentence ends and filled greedily.

    A sentence longer than that is cut at `max_words` words. A document in one piece keeps its id, else piece n is `<id>#<n>`, from 0.
    The words of the pieces, in order, are the words of the document; runs of white space become one space.
    """
    if max_words < 1:
        raise InputError(f"max_words is {max_words}, expected at least 1")
    texts = [" ".join(words) for words in _fill(sentences(document.text), max_words)]
    if len(texts) == 1:
        return [Passage(document.id, document.title, texts[0])]
    return [Passage(f"{document.id}#{n}", document.title, text) for n, text in enumerate(texts)]


def _fill(sentence_texts: Iterable[str], max_words: int) -> Iterator[list[str]]:
    piece: list[str] = []
    for sentence in sentence_texts:
        words = sentence.split()
        for start in range(0, len(words), max_words):
            part = words[start : start + max_words]
            if len(piece) + len(part) > max_words:
                yield piece
                piece = []
            piece = piece + part
    if piece:
        yield piece


# --- writing -----------------------------------------------------------------------------------------------------------------------


def build_store(documents: Iterable[Passage], folder: Path, *, max_words: int, shard_size: int = SHARD_SIZE) -> dict[str, Any]:
    """Writes the passages of `documents` into `folder` for PassageStore and returns its facts (counts).

    In a folder that an interrupted call with the same arguments left, whole shards are kept, and a torn one is written again.
    Raises InputError for an empty corpus and for an id that is used twice (both places, where `documents` is a Documents).
    """
    folder = Path(folder)
    if (folder / STORE).exists():
        return json.loads((folder / STORE).read_text())
    shards = _whole_shards(folder)
    stream = iter(documents)
    collections.deque(itertools.islice(stream, sum(shard.documents for shard in shards)), maxlen=0)  # passed over: they are written
    while shard := _write_shard(folder, len(shards), stream, sum(shard.passages for shard in shards), max_words, shard_size):
        shards.append(shard)
    if not shards:
        raise InputError(f"{folder.name}: the corpus is empty, expected at least one document")
    _merge_index(folder, shards)
    facts = {
        "passages": sum(shard.passages for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "max_words": max_words,
        "shards": [shard.passages for shard in shards],
    }
    _check_ids(folder, facts, documents)
    artifacts.write_json(folder / STORE, facts)
    for part in folder.glob("part-*.npy"):
        part.unlink()
    return facts


@dataclasses.dataclass(frozen=True)
class _Shard:
    passages: int
    documents: int


def _records_path(folder: Path, shard: int) -> Path:
    return folder / f"passages-{shard:05d}.array_record"


def _part_path(folder: Path, name: str, shard: int) -> Path:
    return folder / f"part-{name}-{shard:05d}.npy"


def _whole_shards(folder: Path) -> list[_Shard]:
    """Shards up to the first one without its `starts`, which are written last."""
    shards: list[_Shard] = []
    while (path := _part_path(folder, "starts", len(shards))).exists():
        starts = np.load(path)  # the first row of every document, then the row after the last
        shards.append(_Shard(int(starts[-1] - starts[0]), len(starts) - 1))
    return shards


def _write_shard(folder: Path, number: int, stream: Iterator[Passage], first_row: int, max_words: int, shard_size: int) -> _Shard | None:
    """Writes documents from the stream until the shard is full; None if there were no more."""
    hashes: list[int] = []
    rows: list[int] = []
    starts = [first_row]
    path = _records_path(folder, number)
    writer = array_record_module.ArrayRecordWriter(str(path), _WRITER)
    for document in stream:
        pieces = split(document, max_words)
        if not pieces:
            raise InputError(f"document {document.id!r} has no words")
        names = [piece.id for piece in pieces] + ([document.id] if len(pieces) > 1 else [])
        hashes.extend(_hash(name) for name in names)
        rows.extend(starts[-1] + n % len(pieces) for n in range(len(names)))  # a split document is found at its first piece
        with artifacts.writing(path):
            for piece in pieces:
                writer.write(_to_bytes(piece))
        starts.append(starts[-1] + len(pieces))
        if starts[-1] - first_row >= shard_size:
            break
    with artifacts.writing(path):
        writer.close()
    if len(starts) == 1:
        path.unlink()
        return None
    for name, column in zip(("hashes", "rows"), id_index.sorted_part(hashes, rows)):
        artifacts.save_array(_part_path(folder, name, number), column)
    artifacts.save_array(_part_path(folder, "starts", number), np.array(starts, np.int64))
    return _Shard(starts[-1] - first_row, len(starts) - 1)


def _merge_index(folder: Path, shards: Sequence[_Shard]) -> None:
    def part(name: str, shard: int) -> np.ndarray:
        return np.load(_part_path(folder, name, shard), mmap_mode="r")

    id_index.merge(part, len(shards), folder)
    end = np.array([sum(shard.passages for shard in shards)])
    starts = itertools.chain((part("starts", i)[:-1] for i in range(len(shards))), [end])
    id_index.save_chunks(folder / "starts.npy", np.int64, sum(shard.documents for shard in shards) + 1, starts)


def _check_ids(folder: Path, facts: dict[str, Any], documents: Iterable[Passage]) -> None:
    """Equal hashes are looked up: two different ids may share one, an id may not be used twice."""
    store = PassageStore(folder, facts)
    for at in id_index.equal_neighbours(store.hashes):
        first, second = int(store.rows[at]), int(store.rows[at + 1])
        if first != second and (same := store.names(first) & store.names(second)):
            numbers = [store.document_number(row) for row in (first, second)]
            placed = isinstance(documents, Documents)
            places = [documents.where(number) if placed else f"document {number}" for number in numbers]
            raise InputError(f"id {min(same)!r} is used twice: {places[0]} and {places[1]}")


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _to_bytes(passage: Passage) -> bytes:
    return json.dumps([passage.id, passage.title, passage.text], ensure_ascii=False, separators=(",", ":")).encode()


# --- reading -----------------------------------------------------------------------------------------------------------------------


class PassageStore:
    """Passages on disk by row: `len(store)`, `store[row]`, `store.read(rows)`; only the index is mapped into memory."""

    def __init__(self, folder: str | Path, facts: dict[str, Any] | None = None):
        """Opens what build_store wrote; `facts` are read from the folder unless given. Raises InputError if it is not whole."""
        self.folder = Path(folder)
        try:
            self.facts = facts or json.loads((self.folder / STORE).read_text())
            self.hashes = np.load(self.folder / "hashes.npy", mmap_mode="r")  # uint64, sorted: of passage and document ids
            self.rows = np.load(self.folder / "rows.npy", mmap_mode="r")  # the row of each hash
            self.starts = np.load(self.folder / "starts.npy", mmap_mode="r")  # the first row of each document, then len(self)
        except (OSError, ValueError) as error:
            raise InputError(f"{self.folder}: not a whole passage store ({error})") from error
        self._shard_starts = np.cumsum([0, *self.facts["shards"]])
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

    def __len__(self) -> int:
        return int(self._shard_starts[-1])

    def __getitem__(self, row: int) -> Passage:
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"passage row {row} of {len(self)}")
        shard = int(np.searchsorted(self._shard_starts, row, side="right")) - 1
        at = row - int(self._shard_starts[shard])
        return Passage(*json.loads(self._reader(shard).read(at, at + 1)[0]))

    def __iter__(self) -> Iterator[Passage]:
        return (self[row] for row in range(len(self)))

    def read(self, rows: Sequence[int] | np.ndarray) -> list[Passage]:
        """The passages of these rows, in this order."""
        return [self[row] for row in rows]

    def row_of(self, id: str) -> int:
        """The row of the passage with this id. Raises InputError if there is none."""
        for row in self._candidates(id):
            if self[row].id == id:
                return row
        raise InputError(f"{self.folder}: no passage has the id {id!r}")

    def rows_of_document(self, id: str) -> np.ndarray:
        """Rows of all passages that were split from the document with this id. Raises InputError if there is none."""
        for row in self._candidates(id):
            if id in self.names(row) and row == self.siblings(row)[0]:
                return self.siblings(row)
        raise InputError(f"{self.folder}: no document has the id {id!r}")

    def siblings(self, row: int) -> np.ndarray:
        """Rows of all passages that were split from the same document as this one, itself included."""
        number = self.document_number(row)
        return np.arange(self.starts[number], self.starts[number + 1])

    def document_id(self, row: int, passage: Passage) -> str:
        """The id of the document that the passage in this row was split from; nothing is read."""
        return passage.id.rpartition("#")[0] if len(self.siblings(row)) > 1 else passage.id

    def document_number(self, row: int) -> int:
        """Which document of the corpus, from 0, this row was split from."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def names(self, row: int) -> set[str]:
        """The ids that lead to this row: the passage's own and, for the first piece of a document, the document's."""
        id, siblings = self[row].id, self.siblings(row)
        return {id, id.removesuffix("#0")} if len(siblings) > 1 and row == siblings[0] else {id}

    def _candidates(self, id: str) -> list[int]:
        """Rows whose id may be this one: those with its hash, nearly always one or none."""
        key = np.uint64(_hash(id))
        first, last = (np.searchsorted(self.hashes, key, side=side) for side in ("left", "right"))
        return [int(row) for row in self.rows[first:last]]

    def _reader(self, shard: int) -> array_record_module.ArrayRecordReader:
        if shard in self._readers:
            self._readers[shard] = self._readers.pop(shard)  # the last to be closed
        else:
            path = _records_path(self.folder, shard)
            reader = array_record_module.ArrayRecordReader(str(path), _READER, file_reader_buffer_size=4096)
            found, expected = reader.num_records(), self.facts["shards"][shard]
            if found != expected:
                raise InputError(f"{path}: {found} passages, expected {expected} (the file is missing or damaged)")
            self._readers[shard] = reader
            if len(self._readers) > MOST_OPEN:
                self._readers.pop(next(iter(self._readers))).close()
        return self._readers[shard]
