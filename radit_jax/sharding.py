"""The mesh, and where each parameter lives on it: one table of (regex → PartitionSpec), first match wins.

Axes: "data" (batch rows; parameters and optimizer are sharded over it too, FSDP) and "model" (tensor parallel).
A (1, 1) mesh is the ordinary case and runs the same program.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

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


def local_mesh() -> Mesh:
    """The devices of this process alone, all on "data": for work that each process does on its own shards."""
    return make_mesh(devices=jax.local_devices())


def spec_of(path: str, shape: Sequence[int], rules: Sequence[tuple[str, P]], mesh: Mesh) -> P:
    """The spec of one parameter. Unmatched or of too low a rank raises; a dimension that an axis does not divide stays whole."""
    for pattern, spec in rules:
        if re.fullmatch(pattern, path):
            if len(spec) > len(shape):
                raise ValueError(f"{path} has shape {tuple(shape)}, its sharding rule {spec} has more axes")
            return P(*(axis if axis is not None and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape)))
    raise ValueError(f"{path}: no sharding rule matches")


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
    if array.shape[axis] % mesh.shape[DATA]:
        raise InputError(f"{array.shape[axis]} rows of a batch do not divide over the {mesh.shape[DATA]} devices of the mesh's data axis")
    sharding = NamedSharding(mesh, P(*[None] * axis, DATA))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def _tail(path: str, rules: Sequence[tuple[str, P]]) -> str:
    parts = path.split("/")
    for start in range(len(parts)):
        tail = "/".join(parts[start:])
        if any(re.fullmatch(pattern, tail) for pattern, _ in rules):
            return tail
    return path
