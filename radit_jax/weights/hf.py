"""Checkpoints as Hugging Face lays them out: find them by name, read their tensors one at a time, fill a module with them.

A checkpoint is named by a string: a local folder, a GGUF file, a Hub id, or ``package:MODULE/PATH`` (inside an installed package).
Every tensor is accounted for: a missing, unused or wrong-shaped one is an InputError that names it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from radit_jax.errors import InputError
from radit_jax.paths import named

Read = Callable[[tuple[slice, ...]], np.ndarray]  # a slice of a parameter → its values, read from the checkpoint
Place = Callable[[str, tuple[int, ...], Read], jax.Array]  # (parameter path, shape, read) → array on its devices

# What a checkpoint folder needs besides weights: configs, tokenizer, sentence-transformers modules.
HUB_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


# -- finding ------------------------------------------------------------------------------------------------------------------------


def resolve(name: str) -> Path:
    """Returns the local folder or GGUF file that `name` means, downloading a Hub id if it must. InputError if there is none."""
    if name.startswith("package:"):
        return _in_package(name)
    path = named(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise InputError(f"{name}: a checkpoint is a folder or a .gguf file, not this file")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or path.suffix == ".gguf":
        raise InputError(f"{name}: no such folder or file")
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # network, cache, id, permission: each has its own class and a page of text
        raise InputError(f"{name}: no such folder, and not to be had from the Hub ({first_line(error)})") from error


def _in_package(name: str) -> Path:
    module, _, inside = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a dotted name whose parent is not there, or an empty one
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"{name}: the package {module!r} is not installed here")
    path = Path(list(spec.submodule_search_locations)[0], inside)
    if not path.exists():
        raise InputError(f"{name}: the package {module!r} has no {inside!r}")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object of a checkpoint folder."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; a checkpoint folder has it") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({first_line(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


# -- reading ------------------------------------------------------------------------------------------------------------------------


class Tensors(Protocol):
    """Named tensors of a checkpoint, read on demand. Linear weights are (out, in), as PyTorch has them."""

    where: Path
    shapes: Mapping[str, tuple[int, ...]]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


class Safetensors:
    """The tensors of a folder with one .safetensors file or an index of shards; bfloat16 arrives as ml_dtypes.bfloat16."""

    def __init__(self, folder: Path):
        self.where = Path(folder)
        self._file_of: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in self._files():
            shard = _open(file)
            for name in shard.keys():
                self._file_of[name] = shard
                self.shapes[name] = tuple(shard.get_slice(name).get_shape())

    def _files(self) -> list[Path]:
        index = self.where / "model.safetensors.index.json"
        if index.exists():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise InputError(f"{index}: has no 'weight_map' of tensor names to files")
            if not all(isinstance(name, str) and name == Path(name).name for name in shards.values()):
                raise InputError(f"{index}: 'weight_map' has what is no name of a file in its folder")
            return [self.where / name for name in sorted(set(shards.values()))]
        files = sorted(self.where.glob("*.safetensors"))
        if len(files) == 1:
            return files
        raise InputError(f"{self.where}: expected model.safetensors or model.safetensors.index.json, found {_names(files) or 'neither'}")

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        try:
            return self._file_of[name].get_slice(name)[index or ...]
        except (SafetensorError, TypeError) as error:
            raise InputError(f"{self.where}: tensor {name} cannot be read ({first_line(error)})") from error


def _open(file: Path):
    if not file.is_file():
        raise InputError(f"{file}: no such file; the index beside it names it")
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: truncated or not a safetensors file ({first_line(error)})") from error


# -- filling ------------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Name:
    """One row of a names table: parameter `path` of the module, `tensor` of the checkpoint, and whether it is stored transposed.

    ``{layer}`` in `tensor` means one tensor for every layer, stacked on the leading axis of the parameter.
    Rows whose path the module does not have (a bias, an untied head) are passed over.
    """

    path: str
    tensor: str
    transpose: bool = False


def on_default_device(path: str, shape: tuple[int, ...], read: Read) -> jax.Array:
    """The ordinary `place`: the parameter goes where JAX puts things."""
    del path
    return jnp.asarray(read((slice(None),) * len(shape)))


def fill(
    module: nnx.Module,
    names: Sequence[Name],
    tensors: Tensors,
    *,
    param_dtype: Any = jnp.float32,
    ignore: str = "",
    place: Place = on_default_device,
) -> nnx.Module:
    """Returns `module` (abstract, from nnx.eval_shape) with every parameter read from `tensors`, stored as `param_dtype`.

    `place` asks for the slices that its devices hold: no host ever has a parameter of all layers, unless one device holds it whole.
    `ignore` is a regular expression for checkpoint tensors that carry no parameter of ours (buffers, an unused pooler).
    InputError for a tensor that is missing, has another shape than the parameter, or is left over.
    """
    graphdef, state = nnx.split(module)
    flat = [("/".join(map(str, path)), path, variable) for path, variable in nnx.to_flat_state(state)]
    table = {row.path: row for row in names}
    unnamed = [key for key, _, _ in flat if key not in table]
    assert not unnamed, f"no row in the names table for {unnamed}"
    if (layers := max((v.shape[0] for key, _, v in flat if "{layer}" in table[key].tensor), default=0)) > len(tensors.shapes):
        raise InputError(f"{tensors.where}: {len(tensors.shapes):,} tensors, expected those of {layers:,} layers")
    needed = {key: _tensors_of(table[key], variable.shape) for key, _, variable in flat}
    _account(tensors, needed, {key: (table[key], variable.shape) for key, _, variable in flat}, ignore)
    filled = []
    for key, path, variable in flat:
        read = functools.partial(_gather, tensors, table[key], needed[key], variable.shape, param_dtype)
        filled.append((path, variable.replace(place(key, tuple(variable.shape), read))))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _tensors_of(row: Name, shape: Sequence[int]) -> list[str]:
    if "{layer}" not in row.tensor:
        return [row.tensor]
    return [row.tensor.format(layer=layer) for layer in range(shape[0])]


def _account(tensors: Tensors, needed: Mapping[str, list[str]], rows: Mapping[str, tuple[Name, Sequence[int]]], ignore: str) -> None:
    """Raises for the first kind of tensor that is missing, of the wrong shape, or unused: all before anything is read."""
    used = {name for group in needed.values() for name in group}
    missing = sorted(used - tensors.shapes.keys())
    if missing:
        raise InputError(f"{tensors.where}: tensor missing: {_names(missing)}")
    for key, (row, shape) in rows.items():
        one = tuple(shape[1:] if "{layer}" in row.tensor else shape)
        expected = one[::-1] if row.transpose else one
        for name in needed[key]:
            if tensors.shapes[name] != expected:
                raise InputError(f"{tensors.where}: tensor {name} has shape {tensors.shapes[name]}, expected {expected}")
    unused = sorted(name for name in tensors.shapes.keys() - used if not (ignore and re.fullmatch(ignore, name)))
    if unused:
        raise InputError(f"{tensors.where}: tensor unused by this architecture: {_names(unused)}")


def _gather(tensors: Tensors, row: Name, sources: list[str], shape: Sequence[int], dtype: Any, index: tuple[slice, ...]) -> np.ndarray:
    """A slice of one parameter on the host; layers are written into place one by one, so that nothing is held twice."""
    stacked = "{layer}" in row.tensor
    out = np.empty([len(range(*part.indices(size))) for part, size in zip(index, shape, strict=True)], dtype)
    slots, names, inside = (out, sources[index[0]], index[1:]) if stacked else (out[None], sources, index)
    for slot, name in zip(slots, names, strict=True):
        value = tensors.read(name, inside[::-1] if row.transpose else inside)
        slot[...] = value.T if row.transpose else value
    return out


# -- wording ------------------------------------------------------------------------------------------------------------------------


def _names(names: Iterable[Any]) -> str:
    names = [name.name if isinstance(name, Path) else str(name) for name in names]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
