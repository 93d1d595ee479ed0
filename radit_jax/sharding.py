"""The mesh, and where each parameter lives on it: one table of (regex → PartitionSpec), first match wins.

Axes: "data" (batch rows; parameters and optimizer are sharded over it too, FSDP) and "model" (tensor parallel).
A (1, 1) mesh is the ordinary case and runs the same program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from radit_jax.errors import InputError
from radit_jax.types import PyTree

DATA, MODEL = "data", "model"

# Paths are joined by "/"; stacked blocks have the layer axis first. Kernels are (in, out): the model axis cuts heads and the MLP width.
LM_RULES: Sequence[tuple[str, P]] = (
    (r"embed/embedding", P(MODEL, DATA)),
    (r"blocks/attention/[qkv]/kernel", P(None, DATA, MODEL)),
    (r"blocks/attention/[qkv]/bias", P(None, MODEL)),
    (r"blocks/attention/o/kernel", P(None, MODEL, DATA)),
    (r"blocks/mlp/(gate|up)/kernel", P(None, DATA, MODEL)),
    (r"blocks/mlp/(gate|up)/bias", P(None, MODEL)),
    (r"blocks/mlp/down/kernel", P(None, MODEL, DATA)),
    (r"blocks/(attention/o|mlp/down)/bias", P()),
    (r"blocks/.*(_norm)/scale", P()),
    (r"final_norm/scale", P()),
    (r"head/kernel", P(DATA, MODEL)),
)
ENCODER_RULES: Sequence[tuple[str, P]] = (
    (r"embed/word/embedding", P(MODEL, DATA)),
    (r"embed/(position|type)/embedding", P(None, DATA)),
    (r"blocks/attention/[qkv]/kernel", P(None, DATA, MODEL)),
    (r"blocks/attention/[qkv]/bias", P(None, MODEL)),
    (r"blocks/attention/o/kernel", P(None, MODEL, DATA)),
    (r"blocks/mlp/up/kernel", P(None, DATA, MODEL)),
    (r"blocks/mlp/up/bias", P(None, MODEL)),
    (r"blocks/mlp/down/kernel", P(None, MODEL, DATA)),
    (r".*(norm/(scale|bias)|/o/bias|down/bias)", P()),
)


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("data", "model") mesh over `devices` (default: all there are); data = −1 takes what `model` leaves."""
    devices = jax.devices() if devices is None else list(devices)
    if data == -1:
        data = len(devices) // max(model, 1)
    if data * model > len(devices) or data < 1 or model < 1:
        raise InputError(f"mesh {data}×{model} needs {data * model} devices, there are {len(devices)}")
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices[: data * model])


def local_mesh(mesh: Mesh) -> Mesh:
    """The devices of a mesh that are this process's own, all on "data": for work that each process does on its own shards."""
    return make_mesh(devices=[device for device in mesh.devices.flat if device.process_index == jax.process_index()])


def spec_of(path: str, shape: Sequence[int], rules: Sequence[tuple[str, P]], mesh: Mesh) -> P:
    """The spec of one parameter. Unmatched or of too low a rank raises; a dimension that an axis does not divide stays whole."""
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            if len(spec) > len(shape):
                raise ValueError(f"{path} has shape {tuple(shape)}, its sharding rule {spec} has more axes")
            return P(*(axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)))
    raise ValueError(f"{path}: no sharding rule matches")


def placer(mesh: Mesh, rules: Sequence[tuple[str, P]]) -> Callable[[str, tuple[int, ...], Callable], jax.Array]:
    """Puts a parameter on the mesh as it is read from its checkpoint (weights.hf.Place): each process reads what its devices hold."""
    return lambda path, shape, read: jax.make_array_from_callback(shape, NamedSharding(mesh, spec_of(path, shape, rules, mesh)), read)


def shardings(tree: PyTree, rules: Sequence[tuple[str, P]], mesh: Mesh) -> PyTree:
    """NamedShardings for a tree of (abstract) arrays.

    Optimizer states hold parameter trees, so a rule is found by the longest matching tail of a path; scalars are replicated.
    """

    def place(path, leaf):
        if not np.shape(leaf):
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, spec_of(_tail(path_name(path), rules), leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def path_name(path) -> str:
    """ "blocks/attention/q/kernel" of a key path; NNX's trailing `value` key is dropped."""
    keys = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return "/".join(key for key in keys if key not in ("value", ".value"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axis."""
    return NamedSharding(mesh, P(DATA))


def put_rows(mesh: Mesh, array: np.ndarray, axis: int = 0) -> jax.Array:
    """A host array that every process holds → on the mesh, with `axis` over "data"; each device is given its own rows.

    InputError where "data" does not divide them.
    """
    return jax.make_array_from_callback(array.shape, _rows_sharding(mesh, array.shape[axis], axis), lambda index: array[index])


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Which rows of a batch lie on devices of this process, ascending: those it has to read.

    InputError where "data" does not divide them.
    """
    places = _rows_sharding(mesh, rows, 0).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in places]))


def put_rows_here(mesh: Mesh, array: np.ndarray, rows: int, axis: int = 0) -> jax.Array:
    """The rows of `rows_here` alone → the global array of all `rows` rows, with `axis` over "data"."""
    here = rows_here(mesh, rows)

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        local = np.searchsorted(here, np.arange(rows)[index[axis]])
        return np.take(array, local, axis)[(*index[:axis], slice(None), *index[axis + 1 :])]

    shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, _rows_sharding(mesh, rows, axis), of_device)


def _rows_sharding(mesh: Mesh, rows: int, axis: int) -> NamedSharding:
    if rows % mesh.shape[DATA]:
        raise InputError(f"a batch of {rows} rows does not divide over the {mesh.shape[DATA]} devices of the mesh's data axis")
    return NamedSharding(mesh, P(*[None] * axis, DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _tail(path: str, rules: Sequence[tuple[str, P]]) -> str:
    parts = path.split("/")
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if any(re.fullmatch(pattern, tail) for pattern, _ in rules):
            return tail
    return path
