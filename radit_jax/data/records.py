"""Records from jsonl files, with the one rule for bad ones: counted, the first few shown, the run stops past `max_bad_records`."""

from __future__ import annotations

import gzip
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from radit_jax.errors import InputError

T = TypeVar("T")
SHOWN = 5  # bad records that are logged one by one; the rest are only counted
_GZIP_MAGIC = b"\x1f\x8b"
_log = logging.getLogger(__name__)


class BadRecord(ValueError):
    """One record that cannot be used; the message says what was found and what was expected, without the place."""


class BadRecords:
    """Counts the bad records of one source."""

    def __init__(self, max_bad_records: int = 0, quiet: bool = False):
        """quiet: count only, for a second pass over a source whose bad records were shown already."""
        self.max_bad_records = max_bad_records
        self.count = 0
        self._quiet = quiet

    def add(self, where: str, problem: object) -> None:
        """Counts a record left out. Raises InputError with the place once there are more than `max_bad_records`."""
        self.count += 1
        if self.count > self.max_bad_records:
            total = f" (bad record {self.count}; max_bad_records is {self.max_bad_records})" if self.max_bad_records else ""
            raise InputError(f"{where}: {problem}{total}")
        if self.count <= SHOWN and not self._quiet:
            _log.warning("%s: %s (record left out)", where, problem)


def json_lines(path: Path, parse: Callable[[dict[str, Any]], T], bad: BadRecords) -> Iterator[tuple[int, T]]:
    """Yields (line number from 1, parsed record) of a jsonl file, plain or gzipped; blank lines are passed over.

    `parse` raises BadRecord for a record it cannot use.
    """
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            record = parse(_json_object(line))
        except BadRecord as problem:
            bad.add(f"{path}:{number}", problem)
        else:
            yield number, record


def field(record: Mapping[str, Any], *path: str) -> Any:
    """The value at a path of nested objects."""
    value: Any = record
    for depth, name in enumerate(path):
        if not isinstance(value, Mapping) or name not in value:
            found = _listed(value) if isinstance(value, Mapping) else _short(value)
            raise BadRecord(f'no field "{".".join(path[: depth + 1])}" (found {found})')
        value = value[name]
    return value


def text_field(record: Mapping[str, Any], *path: str, empty_ok: bool = False) -> str:
    """A field that must be a text."""
    value, name = field(record, *path), ".".join(path)
    if not isinstance(value, str):
        raise BadRecord(f'field "{name}" is {_short(value)}, expected a text')
    if not value.strip() and not empty_ok:
        raise BadRecord(f'field "{name}" is empty')
    _check_unicode(name, value)
    return value


def id_field(record: Mapping[str, Any], name: str) -> str:
    """A field that names something: a text, or a whole number, which is read as its text."""
    if isinstance(record.get(name), int) and not isinstance(record[name], bool):
        return str(record[name])
    return text_field(record, name)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines as bytes, so that one line in another encoding is one bad record and not the end of the file."""
    number = 0
    try:
        with open(path, "rb") as raw:
            zipped = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            with gzip.open(raw, "rb") if zipped else raw as file:
                for number, line in enumerate(file, start=1):
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"damaged after line {number} ({error})"
        raise InputError(f"{path}: {reason}, expected a readable jsonl or jsonl.gz file") from error


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON ({error}): {_short(line.decode().strip())}") from error
    if not isinstance(value, dict):
        raise BadRecord(f"{_short(value)} is not a JSON object")
    return value


def _check_unicode(name: str, value: str) -> None:
    """JSON can spell half a surrogate pair, which no UTF-8 file and no tokenizer can hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f'field "{name}" holds a lone surrogate at character {error.start}') from error


def _listed(names: Mapping[str, Any]) -> str:
    text = " ".join(", ".join(map(str, names)).split()) or "no fields"
    return text if len(text) <= 200 else text[:197] + "..."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
