"""The mesh, and where each parameter lives on it: one table of (regex → PartitionSpec), first match wins.

Axes: "data" (batch rows; parameters and optimizer are sharded over it too, FSDP) and "model" (tensor parallel).
A (1, 1) mesh is the ordinary case and runs the same program.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from radit_jax.errors import InputError
from radit_jax.types import PyTree, TrainState

if TYPE_CHECKING:
    from radit_jax.models.encoder import EncoderConfig
    from radit_jax.models.lm import LmConfig

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
    # models/lora.py: quantized kernels lie as kernels do, low-rank maps as the axis that they share with the kernel; the rank is whole.
    (r"blocks/(attention/[qkv]|mlp/(gate|up))/kernel/(codes|scales)", P(None, DATA, MODEL)),
    (r"blocks/(attention/o|mlp/down)/kernel/(codes|scales)", P(None, MODEL, DATA)),
    (r"blocks/(attention/[qkv]|mlp/(gate|up))/lora_a", P(None, DATA)),
    (r"blocks/(attention/[qkv]|mlp/(gate|up))/lora_b", P(None, None, MODEL)),
    (r"blocks/(attention/o|mlp/down)/lora_a", P(None, MODEL)),
    (r"blocks/(attention/o|mlp/down)/lora_b", P(None, None, DATA)),
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
    # A slice of TPUs is a torus of two or three axes: (8, 8) on 4×4×4 splits one of them, which JAX does only when it is told to.
    places = mesh_utils.create_device_mesh((data, model), devices=devices[: data * model], allow_split_physical_axes=True)
    return Mesh(places, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def mesh_or_one(mesh: Mesh | None) -> Mesh:
    """The mesh, or where there is none that of one device of this process."""
    return make_mesh(1, 1, jax.local_devices()[:1]) if mesh is None else mesh


def local_mesh(mesh: Mesh, process: int | None = None) -> Mesh:
    """The devices of a mesh that are one process's own (default: this one's), all on "data": for work that each does on its own shards."""
    process = jax.process_index() if process is None else process
    return make_mesh(devices=[device for device in mesh.devices.flat if device.process_index == process])


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


def put_rows(mesh: Mesh, array: np.ndarray, axis: int = 0) -> jax.Array:
    """A host array that every process holds → on the mesh, with `axis` over "data"; each device is given its own rows.

    InputError where "data" does not divide them.
    """
    return jax.make_array_from_callback(array.shape, _rows_sharding(mesh, array.shape[axis], axis), lambda index: array[index])


def put_whole(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """A host array that every process holds → whole on every device of the mesh."""
    return jax.make_array_from_callback(np.shape(array), replicated(mesh), lambda index: array[index])


def in_line(mesh: Mesh) -> bool:
    """Whether rows are read without their padding, in one line (models/unpad.py): on CPUs, where no row lies elsewhere than another."""
    return mesh.shape[DATA] == 1 and mesh.devices.flat[0].platform == "cpu"


def rows_here(mesh: Mesh, rows: int) -> np.ndarray:
    """Which rows of a batch lie on devices of this process, ascending: those it has to read.

    InputError where "data" does not divide them.
    """
    places = _rows_sharding(mesh, rows, 0).addressable_devices_indices_map((rows,)).values()
    return np.unique(np.concatenate([np.arange(rows)[index] for index in places]))


def put_rows_here(mesh: Mesh, array: np.ndarray, here: np.ndarray, rows: int, axis: int = 0) -> jax.Array:
    """The rows `here` (of rows_here) alone → the global array of all `rows` rows, with `axis` over "data"."""

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        local = np.searchsorted(here, np.arange(rows)[index[axis]])
        return np.take(array, local, axis)[(*index[:axis], slice(None), *index[axis + 1 :])]

    shape = (*array.shape[:axis], rows, *array.shape[axis + 1 :])
    return jax.make_array_from_callback(shape, _rows_sharding(mesh, rows, axis), of_device)


def _rows_sharding(mesh: Mesh, rows: int, axis: int) -> NamedSharding:
    check_rows(mesh, rows)
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


def whole_rows(mesh: Mesh, rows: int) -> int:
    """The rows of a batch, at least one, rounded up to what the mesh's data axis divides."""
    data = mesh.shape[DATA]
    return max(1, math.ceil(rows / data)) * data


# -- what a mesh cannot cut -------------------------------------------------------------------------------------------------------------


def check_rows(mesh: Mesh, rows: int, field: str = "") -> None:
    """InputError, with the config's field that gives them, where "data" does not divide the rows of a batch."""
    if rows % mesh.shape[DATA]:
        where = f"{field}: " if field else ""
        raise InputError(f"{where}a batch of {rows} rows does not divide over the {mesh.shape[DATA]} devices of the mesh's data axis")


def check_lm(mesh: Mesh, config: LmConfig) -> None:
    """InputError where this LM cannot be cut over this mesh: then something of its size would lie whole on every device.

    "model" cuts heads, never one in pieces. Fewer key-value heads than devices are fine where every device's query heads share one.
    """
    sizes = {"heads": config.heads, "MLP width": config.mlp_width, "vocabulary": config.vocab_size}
    _check(mesh, "LM", {MODEL: sizes, DATA: {"width": config.width}})
    model = mesh.shape[MODEL]
    if config.kv_heads % model and model % config.kv_heads:
        raise InputError(f"the mesh's model axis is {model}, which does not divide the LM's {config.kv_heads} key-value heads")


def check_encoder(mesh: Mesh, config: EncoderConfig) -> None:
    """As `check_lm`; the vocabulary may be any (BERT's is 30,522): nothing but the word table has its size, and "data" cuts that too."""
    _check(mesh, "encoder", {MODEL: {"heads": config.heads, "MLP width": config.mlp_width}, DATA: {"width": config.width}})


def _check(mesh: Mesh, of: str, sizes: Mapping[str, Mapping[str, int]]) -> None:
    for axis, by_name in sizes.items():
        count = mesh.shape[axis]
        wrong = ", ".join(f"{name} {size:,}" for name, size in by_name.items() if size % count)
        if wrong:
            fitting = math.gcd(*by_name.values())
            choices = ", ".join(str(n) for n in range(1, mesh.size + 1) if fitting % n == 0)
            raise InputError(f"the mesh's {axis} axis is {count}, which does not divide the {of}'s {wrong} (it may be {choices})")


# -- what lies where --------------------------------------------------------------------------------------------------------------------


def table(state: TrainState) -> str:
    """Path, shape, dtype, spec and bytes on one device of every parameter, and the totals: what a training run prints when it starts.

    `state` holds arrays on a mesh, or abstract ones with shardings.
    """
    rows = [("parameter", "shape", "dtype", "spec", "bytes/device")]
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        shape, spec = "×".join(map(str, leaf.shape)), ", ".join(str(axis or "–") for axis in _padded_spec(leaf))
        rows.append((path_name(path), shape, leaf.dtype.name, f"({spec})", f"{_bytes_here(leaf):,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row[:4], widths)), row[4].rjust(widths[4])]) for row in rows]
    for name, tree in (("parameters", state.params), ("optimizer", state.opt_state)):
        leaves = jax.tree.leaves(tree)
        whole = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        lines.append(f"{name}: {sum(map(_bytes_here, leaves)):,} bytes on a device, {whole:,} in all")
    return "\n".join(lines)


def _padded_spec(leaf: jax.Array) -> tuple:
    return (*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec)))


def _bytes_here(leaf: jax.Array) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
