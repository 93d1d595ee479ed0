"""Records from where sets are kept, in the order they are kept in: tensorflow-datasets, the Hub, files as their authors publish them.

tfds: sets are read through `data_source` (ArrayRecord, no TensorFlow). hub: sets are the Parquet files that the Hub makes of every set.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax.data.records import BadRecords, json_lines
from radit_jax.errors import InputError
from radit_jax.paths import named

TFDS, HUB = "tfds:", "hub:"
HUB_PARQUET = "refs/convert/parquet"  # the branch that the Hub keeps for every set, CONFIG/SPLIT/NNNN.parquet
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # text ones also with .gz
LISTS = ("data", "Questions")  # under which authors' JSON files keep their records (SQuAD, CoQA, NewsQA; FreebaseQA)
# tensorflow-datasets knows these by name only once they are imported.
_IMPORTED = {
    "web_questions": "question_answering.web_questions",
    "coqa": "question_answering.coqa",
    "drop": "text.drop",
    "gsm8k": "text.gsm8k",
    "hellaswag": "text.hellaswag",
    "winogrande": "text.winogrande",
    "cnn_dailymail": "summarization.cnn_dailymail",
}
Placed = Iterator[tuple[str, dict[str, Any]]]  # (where it stands, the record)


class NotFetched(InputError):
    """A set of a catalogue that is not here and cannot be brought here."""


def records(source: str, split: str | None, bad: BadRecords, data_dir: str | Path | None = None) -> Placed:
    """The records of `source` with their places, as plain values: texts, numbers, lists, mappings.

    source: `tfds:NAME[/CONFIG]`, `hub:OWNER/NAME[#CONFIG]`, or a file or folder of SUFFIXES.
    split: as tensorflow-datasets spells it ("train", "validation[:500]") for tfds; a name for the Hub and for a folder; None for a file.
    data_dir: where tfds sets are prepared; by default TFDS_DATA_DIR, else ~/tensorflow_datasets.
    Records that are no JSON objects go to `bad`. InputError for what is not there.
    """
    if source.startswith(TFDS):
        return _tfds(source, split, bad, data_dir)
    if source.startswith(HUB):
        return _hub(source, split, bad)
    path = named(source)
    if path.is_dir():
        return _folder(path, split, bad)
    if not path.is_file():
        raise InputError(f"{source}: no such file, expected one of {', '.join(SUFFIXES)} (or .gz of it)")
    if split is not None:
        raise InputError(f"{source}: a file has no split {split!r}; name the file that holds it")
    return _file(path, bad)


# --- files -------------------------------------------------------------------------------------------------------------------------


def _folder(folder: Path, split: str | None, bad: BadRecords) -> Placed:
    """All files of a folder, or those with the split's name in their path: train/…, train-00000-of-00002.parquet."""
    named = re.compile(rf"(^|[/_.\-]){re.escape(split)}([/_.\-]|$)" if split else "")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _suffix(path) in SUFFIXES)
    chosen = [path for path in files if named.search(path.relative_to(folder).as_posix())]
    if not chosen:
        where = f" with {split!r} in their path" if split else ""
        raise InputError(f"{folder}: {len(files)} files of {', '.join(SUFFIXES)}, none{where}")
    for path in chosen:
        yield from _file(path, bad)


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _file(path: Path, bad: BadRecords) -> Placed:
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: a {suffix or 'nameless'} file, expected one of {', '.join(SUFFIXES)} (or .gz of it)")
    try:
        if suffix == ".parquet":
            yield from _parquet(path)
        elif suffix in (".csv", ".tsv"):
            yield from table_rows(path, "\t" if suffix == ".tsv" else ",", quoted=suffix == ".csv")
        elif suffix == ".jsonl" or (whole := _json(path)) is None:
            yield from ((f"{path}:{line}", record) for line, record in json_lines(path, lambda record: record, bad))
        else:
            yield from whole
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {error}, expected a readable {suffix} file") from error


def _text(path: Path) -> io.TextIOBase:
    return io.TextIOWrapper(gzip.open(path) if path.name.endswith(".gz") else open(path, "rb"), "utf-8-sig", newline="")


def _json(path: Path) -> list[tuple[str, dict[str, Any]]] | None:
    """The records of one JSON value, or None where the file holds one a line, whatever its name says."""
    with _text(path) as file:
        try:
            value = json.load(file)
        except (ValueError, RecursionError) as error:
            if "Extra data" in str(error):
                return None
            raise InputError(f"{path}: not JSON ({error})") from error
    if isinstance(value, dict):
        listed = next((value[name] for name in LISTS if isinstance(value.get(name), list)), None)
        if listed is not None:
            value = listed
        elif value and all(isinstance(member, dict) for member in value.values()):
            value = [{"key": key, **member} for key, member in value.items()]  # a record under each key: PubMedQA, DROP
        else:
            value = [value]
    if not isinstance(value, list) or not all(isinstance(record, dict) for record in value):
        raise InputError(f"{path}: expected a list of JSON objects, or an object of them")
    return [(f"{path}, record {n}", record) for n, record in enumerate(value)]


def table_rows(path: Path, delimiter: str, *, quoted: bool) -> Placed:
    """(place, row) of a table whose first line names its columns; `quoted`: a field may stand in double quotes."""
    csv.field_size_limit(1 << 30)
    try:
        with _text(path) as file:
            reader = csv.DictReader(
                file, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE, restkey="more", restval=""
            )
            for row in reader:
                yield f"{path}:{reader.line_num}", row
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: {error}, expected a readable table") from error


def _parquet(path: Path) -> Placed:
    from pyarrow import ArrowInvalid
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(1024) for row in batch.to_pylist())
            yield from ((f"{path}, record {n}", row) for n, row in enumerate(rows))
    except ArrowInvalid as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}, expected a readable .parquet file") from error


# --- the Hub -----------------------------------------------------------------------------------------------------------------------


def _hub(source: str, split: str | None, bad: BadRecords) -> Placed:
    import huggingface_hub

    name, _, config = source.removeprefix(HUB).partition("#")
    if split is None:
        raise InputError(f"{source}: no split is named, expected one such as train")
    pattern = f"{config or '*'}/{split}/*.parquet"
    try:
        folder = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=HUB_PARQUET, allow_patterns=pattern)
    except Exception as error:  # no network, no such set, a set that wants an account: many kinds
        raise NotFetched(f"{source}: cannot be fetched ({str(error).strip().splitlines()[0][:120]})") from error
    files = sorted(Path(folder).glob(pattern))
    configs = sorted({path.parts[-3] for path in files})
    if len(configs) != 1:
        known = ", ".join(configs) or "none"
        raise InputError(f"{source}, split {split!r}: configurations with it are {known}, expected one (hub:{name}#CONFIG)")
    for path in files:
        yield from _file(path, bad)


# --- tensorflow-datasets -----------------------------------------------------------------------------------------------------------


def _tfds(source: str, split: str | None, bad: BadRecords, data_dir: str | Path | None) -> Placed:
    if split is None:
        raise InputError(f"{source}: no split is named, expected one such as train")
    for row, record in enumerate(_open_tfds(source.removeprefix(TFDS), split, data_dir)):
        where = f"{source} {split}, record {row}"
        try:
            plain = _plain(record)
        except UnicodeDecodeError as problem:
            bad.add(where, problem)
        else:
            yield where, plain


def _open_tfds(name: str, split: str, data_dir: str | Path | None) -> Sequence[Mapping[str, Any]]:
    """The prepared set, prepared now if it is not there yet (which needs a network)."""
    import tensorflow_datasets as tfds  # here: whoever brings files does not wait for it

    if module := _IMPORTED.get(name.partition("/")[0]):
        importlib.import_module(f"tensorflow_datasets.{module}")
    tfds.disable_progress_bar()
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # tfds reads it only when it is imported
    try:
        with contextlib.redirect_stdout(sys.stderr):  # it prints while it prepares; stdout is for answers
            return tfds.data_source(name, split=split, data_dir=data_dir)
    except Exception as error:  # it fails in many ways: unknown config or split, no network, a damaged file, a missing package
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        where = data_dir or "~/tensorflow_datasets (or TFDS_DATA_DIR)"
        raise NotFetched(
            f"{TFDS}{name}, split {split!r}: {reason}; expected the set prepared as array_record in {where}, or a network to prepare it"
        ) from error


def _plain(value: Any) -> Any:
    """Texts for bytes, lists for arrays, at any depth. UnicodeDecodeError for bytes that are no UTF-8."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.item() if isinstance(value, np.generic) else value
