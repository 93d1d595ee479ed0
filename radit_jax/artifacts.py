"""Artifacts: what a stage makes is a folder, whole or not there at all (DESIGN: the stages can be killed anywhere).

A stage writes into ``NAME-FINGERPRINT.partial`` and the folder is renamed when it is whole, with a ``manifest.json`` that says
what it was made from. The fingerprint is a hash of that, so the same inputs find the finished folder and other inputs get another one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax import distributed
from radit_jax.errors import InputError

MANIFEST = "manifest.json"
EDGE = 1 << 20  # bytes read at each end of a file to know it again
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EIO)  # what goes wrong with one
FORMAT = 1  # raised when the layout of any artifact changes


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A whole folder: `path`, and the `manifest` with `made_from` (its inputs) and `facts` (counts, rates)."""

    path: Path
    manifest: dict[str, Any]
    reused: bool = False

    @property
    def fingerprint(self) -> str:
        return self.manifest["fingerprint"]

    @property
    def facts(self) -> dict[str, Any]:
        return self.manifest["facts"]


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """Twelve hex digits that name these inputs."""
    text = json.dumps({"format": FORMAT, **made_from}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest(value: Any) -> str:
    """A short hash of plain data, for fingerprints."""
    return fingerprint({"value": value})


def there(workdir: Path, stage: str, made_from: Mapping[str, Any]) -> bool:
    """Whether the artifact of `stage` for these inputs is there, whole."""
    return (Path(workdir) / f"{stage}-{fingerprint(made_from)}" / MANIFEST).exists()


def make(workdir: Path, stage: str, made_from: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any] | None]) -> Artifact:
    """Returns the artifact of `stage` for these inputs, made by `write(folder)` unless it is there already.

    `write` may find in `folder` what an interrupted run left and go on from it; it returns the facts for the manifest.
    All processes call this together and write into one folder; the facts are the leader's. Of several runs in one workdir (the seeds of a
    sweep, side by side) one makes an artifact, and the others wait for it.
    """
    key = fingerprint(made_from)
    path = Path(workdir) / f"{stage}-{key}"
    if distributed.from_leader((path / MANIFEST).exists()):
        return dataclasses.replace(load(path), reused=True)
    partial = path.with_name(path.name + ".partial")
    with _alone(partial) if distributed.leads() else contextlib.nullcontext():
        if distributed.from_leader((path / MANIFEST).exists()):  # another run's, while this one waited
            return dataclasses.replace(load(path), reused=True)
        distributed.meet(f"{path.name} begins")
        facts = dict(write(partial) or {})
        distributed.meet(f"{path.name} is written")
        if distributed.leads():
            manifest = {"stage": stage, "fingerprint": key, "made_from": dict(made_from), "facts": facts}
            write_json(partial / MANIFEST, manifest)
            os.replace(partial, path)
    distributed.meet(f"{path.name} is whole")
    return load(path)


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Makes the folder and holds it against other runs: until it is whole, or this process ends in whatever way."""
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        held = os.open(partial, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks: as many runs as there may be, one by one
            fcntl.flock(held, fcntl.LOCK_EX)
        if partial.with_suffix("").exists() or (partial.exists() and os.path.samestat(os.fstat(held), os.stat(partial))):
            break
        os.close(held)  # of a folder that was taken away meanwhile
    try:
        yield
    finally:
        os.close(held)
        with contextlib.suppress(OSError):
            partial.rmdir()  # that another run made whole: an empty one, made anew a moment too late


def load(path: Path) -> Artifact:
    """Opens a whole artifact."""
    try:
        return Artifact(Path(path), json.loads((Path(path) / MANIFEST).read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a whole artifact ({MANIFEST} is missing or damaged)") from error


def identity(path: Path) -> str:
    """A name for the content of a file or folder: its name, and a hash over file names, sizes and the first and last MiB of each file.

    Checkpoints of a hundred gigabytes must not be read whole to know them again.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}\0{size}\0".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(EDGE))
            stream.seek(max(0, size - EDGE))
            digest.update(stream.read(EDGE))
    return f"{path.name}:{digest.hexdigest()[:12]}"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that the file is whole or absent."""
    write_whole(path, json.dumps(value, indent=1, sort_keys=True, default=_plain) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that it is whole or absent, also where several runs in one workdir write it."""
    _replace(path, lambda temporary: temporary.write_text(text), suffix=f".{os.getpid()}.tmp")


def save_array(path: Path, array: np.ndarray) -> None:
    """Writes an .npy file so that it is whole or absent."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, array, allow_pickle=False)

    _replace(path, write)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A write that fails in the block (a full disk, a lost permission) is an OSError that names the path.

    Native writers (TensorStore, ArrayRecord) report the disk's errors as RuntimeError or ValueError, in sentences of their own.
    """
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        code = error.errno if isinstance(error, OSError) else next((code for code in DISK if os.strerror(code) in str(error)), None)
        if code is None:
            raise
        raise OSError(code, f"cannot be written: {os.strerror(code)}", str(path)) from error


def _replace(path: Path, write: Callable[[Path], Any], suffix: str = ".tmp") -> None:
    temporary = Path(path).with_name(Path(path).name + suffix)
    try:
        with writing(path):
            write(temporary)
            os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
