"""What share of a device our programs use (`launch/bench.py utilisation`): any shape of LM, random weights, whole rows.

The programs are those of launch/plan.py, on the devices that are here and with arrays in them. Counted is what the task asks for, not what
we compute: a product that is computed twice (remat) counts once, logits count where an output token is, attention counts pairs of tokens of
one instance. Decoding counts bytes: the weights and the filled slots of the caches, once a step.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from radit_jax import sharding
from radit_jax.errors import InputError
from radit_jax.inference import decode
from radit_jax.inputs import with_dtypes
from radit_jax.logbook import say
from radit_jax.models.attention import Segments, Trees
from radit_jax.models.lm import LmConfig
from radit_jax.planning import flops, programs, shapes
from radit_jax.planning.chips import CHIPS
from radit_jax.planning.programs import Program
from radit_jax.types import LmBatch, PyTree

KINDS = ("lm_step", "score", "prefill", "decode")
INSTANCE = (150, 450)  # tokens of one, at random between these: a passage of 200 words and a question
OUTPUTS = 16  # its last tokens, which are the output
# (bfloat16 operations a second, bytes a second of memory) by what a device calls itself; figures of the makers' data sheets, dense.
PEAKS = {
    "H100": (989e12, 3.35e12),
    "H200": (989e12, 4.8e12),
    "A100": (312e12, 2.04e12),
    **{
        name: (CHIPS[chip].flops, CHIPS[chip].hbm_rate) for name, chip in (("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v6 lite", "v6e"))
    },
    "TPU v5p": (CHIPS["v5p"].flops, CHIPS["v5p"].hbm_rate),
}


def bench(c: ConfigDict, *, kinds: Sequence[str] | None, repetitions: int) -> Iterator[dict[str, Any]]:
    """Yields a result of each kind, of the config's sizes. InputError for an unknown kind."""
    kinds = kinds or KINDS
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise InputError(f"bench utilisation: stage {unknown[0]!r}, expected {', '.join(KINDS)}")
    mesh = sharding.make_mesh(c.mesh.data, c.mesh.model)
    c = with_dtypes(c, mesh.devices.flat[0].platform)
    for kind in kinds:
        program = programs.build(kind, c, mesh, programs.Settings())
        result = measure(program, c, repetitions)
        yield {"kind": f"utilisation {kind}", "model": c.lm.checkpoint, "dtype": c.lm.dtype, "note": program.note, **result}


def measure(program: Program, c: ConfigDict, repetitions: int) -> dict[str, Any]:
    """The median time of a call, after one that compiles, and what of the devices' peaks it is."""
    run, work = ready(program, c)
    began = time.monotonic()
    run()
    first = time.monotonic() - began
    say(f"bench utilisation {program.name}: compiled and run once in {first:.1f} s")
    times = []
    for _ in range(repetitions):
        began = time.monotonic()
        run()
        times.append(time.monotonic() - began)
    seconds, devices = statistics.median(times), program.mesh.devices.flat
    peaks = next((peaks for name, peaks in PEAKS.items() if name in devices[0].device_kind), (None, None))
    shares = {
        name: round(work[name] / seconds / len(devices) / peak, 4) if peak and work[name] else None
        for name, peak in zip(("operations", "bytes"), peaks)
    }
    return {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "first_s": round(first, 1),
        "seconds": round(seconds, 5),
        "least": round(min(times), 5),
        "most": round(max(times), 5),
        **work,
        "rate": round(work["tokens"] / seconds, 1),
        "share_of_peak": shares["operations"],
        "share_of_bandwidth": shares["bytes"],
        "peak_mib": round((devices[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**20),
    }


def text(result: dict[str, Any]) -> str:
    """A result as people read it."""
    about = f"{result['kind']}: {result['model']}, {result['dtype']}{', ' * bool(result['note'])}{result['note']}, {result['device']}"
    rate = (
        f"{result['rate']:,.0f} tokens/s, {result['seconds'] * 1e3:.1f} ms a call ({result['least'] * 1e3:.1f}–{result['most'] * 1e3:.1f})"
    )
    done = [f"{result['operations'] / result['seconds'] / 1e12:.1f} TFLOP/s"] if result["operations"] else []
    done += [f"{result['bytes'] / result['seconds'] / 1e9:,.0f} GB/s"] if result["bytes"] else []
    shares = {"operations": result["share_of_peak"], "memory bandwidth": result["share_of_bandwidth"]}
    shown = [f"{100 * share:.1f} % of the peak of {name}" for name, share in shares.items() if share]
    return "; ".join([about, rate, *done, *shown, f"{result['peak_mib']:,} MiB"])


# -- the work ---------------------------------------------------------------------------------------------------------------------------


def ready(program: Program, c: ConfigDict) -> tuple[Callable[[], None], dict[str, Any]]:
    """(a call with arrays in it, which waits for its end; what it does: tokens, operations, bytes)."""
    return MAKERS[program.name](program, c)


def _lm_step(program: Program, c: ConfigDict) -> tuple[Callable[[], None], dict[str, Any]]:
    abstract, batch, *frozen = program.arguments
    config = shapes.lm_config(c.lm.checkpoint)
    A, B, T = batch.tokens_BxT.shape
    rows = [_row(T, seed) for seed in range(A * B)]
    slots_NxP = np.zeros((A * B, batch.slots_BxP.shape[-1]), np.int32)
    weights_NxP = np.zeros(slots_NxP.shape, np.float32)
    for n, (_, _, outputs) in enumerate(rows):
        outputs = outputs[: slots_NxP.shape[1]]
        slots_NxP[n, : len(outputs)], weights_NxP[n, : len(outputs)] = outputs, 1
    segments, positions = (np.stack(part) for part in list(zip(*rows))[:2])
    arrays = (_tokens(A * B, T, config), positions, segments, slots_NxP, _tokens(*slots_NxP.shape, config), weights_NxP)
    filled = LmBatch(*(_put(array.reshape(shape.shape), shape) for array, shape in zip(arrays, jax.tree.leaves(batch))))
    state, *frozen = (_random(programs.placed(tree, program.mesh, sharding.LM_RULES)) for tree in (abstract, *frozen))
    held = {"state": state}

    def run() -> None:
        held["state"], metrics = program.function(held["state"], filled, *frozen)
        jax.block_until_ready(metrics)

    return run, _work(config, A * B * T, int(weights_NxP.sum()), sum(map(_pairs, segments)), flops.FROZEN if frozen else flops.TRAINING)


def _score(program: Program, c: ConfigDict) -> tuple[Callable[[], None], dict[str, Any]]:
    graphdef, params, tokens, positions, place, slots, labels = program.arguments
    config = shapes.lm_config(c.lm.checkpoint)
    B, T = tokens.shape
    rows = [_row(T, seed) for seed in range(B)]
    segments_BxT, positions_BxT = (np.stack(part) for part in list(zip(*rows))[:2])
    M, P = slots.shape
    slots_MxP = np.full((M, P), -1, np.int32)
    for part in range(M):
        of_part = np.concatenate([row * T + outputs for row, (_, _, outputs) in enumerate(rows[part * B // M : (part + 1) * B // M])])[:P]
        slots_MxP[part, : len(of_part)] = of_part
    if isinstance(place, Trees):  # a tree without branches is a segment: it ends where its segment does
        place = Trees(_put(np.stack([_ends(segments_T) for segments_T in segments_BxT]), place.ends_BxT))
    else:
        place = Segments(_put(segments_BxT, place.ids_BxT))
    arrays = (_put(_tokens(B, T, config), tokens), _put(positions_BxT, positions), place)
    arrays += (_put(slots_MxP, slots), _put(_tokens(M, P, config), labels))
    params = _random(params)

    def run() -> None:
        with jax.set_mesh(program.mesh):
            jax.block_until_ready(program.function(graphdef, params, *arrays))

    return run, _work(config, B * T, int((slots_MxP >= 0).sum()), sum(map(_pairs, segments_BxT)), flops.FORWARD)


def _prefill(program: Program, c: ConfigDict) -> tuple[Callable[[], None], dict[str, Any]]:
    graphdef, params, tokens, lengths = program.arguments
    config = shapes.lm_config(c.lm.checkpoint)
    B, K, T = tokens.shape
    arrays = (_put(_tokens(B, K * T, config).reshape(B, K, T), tokens), _put(np.full((B, K), T, np.int32), lengths))
    params = _random(params)

    def run() -> None:
        with jax.set_mesh(program.mesh):
            jax.block_until_ready(program.function(graphdef, params, *arrays))

    return run, _work(config, B * K * T, B * K, B * K * T * (T + 1) // 2, flops.FORWARD)


def _decode(program: Program, c: ConfigDict) -> tuple[Callable[[], None], dict[str, Any]]:
    graphdef, params, last, lengths, cache, stops, new = program.arguments
    config = shapes.lm_config(c.lm.checkpoint)
    B, K, _ = last.shape
    T = cache.capacity
    filled = _random((last, cache))
    cache = type(cache)(
        filled[1].k_LxBxGxSxh,
        filled[1].v_LxBxGxSxh,
        _put(np.broadcast_to(np.arange(T, dtype=np.int32), cache.positions_BxS.shape), cache.positions_BxS),
        _put(np.int32(T), cache.next_slot),
    )
    lengths = _put(np.full((B, K), T, np.int32), lengths)
    stops = _put(np.full(stops.shape, config.vocab_size, np.int32), stops)  # none: to the last step
    with jax.set_mesh(program.mesh):
        graphdef, params = nnx.split(decode.decoder(nnx.merge(graphdef, _random(params))))
    size = jnp.dtype(c.lm.dtype).itemsize
    slots = sum(T + step + 1 for step in range(new))
    read = (
        new * (flops.matrices(config) + config.width * config.vocab_size)
        + B * K * slots * config.layers * 2 * config.kv_heads * config.head_dim
    )

    def run() -> None:
        with jax.set_mesh(program.mesh):
            jax.block_until_ready(program.function(graphdef, params, filled[0], lengths, cache, stops, new))

    return run, {"tokens": B * K * new, "operations": 0, "bytes": read * size}


MAKERS = {"lm_step": _lm_step, "score": _score, "prefill": _prefill, "decode": _decode}


def _work(config: LmConfig, tokens: int, outputs: int, pairs: int, times: flops.Times) -> dict[str, Any]:
    return {"tokens": tokens, "operations": flops.asked(config, tokens, outputs, pairs, times), "bytes": 0}


# -- arrays -----------------------------------------------------------------------------------------------------------------------------


def _row(length: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A row without padding: (segment ids, positions, the tokens before the output tokens)."""
    drawn = np.random.default_rng(seed).integers(*INSTANCE, size=length)
    ends = np.minimum(np.cumsum(drawn), length)
    ends = ends[: int(np.searchsorted(ends, length)) + 1]
    starts = np.concatenate([[0], ends[:-1]])
    lengths = ends - starts
    segments = np.repeat(np.arange(1, len(ends) + 1), lengths).astype(np.int32)
    positions = (np.arange(length) - np.repeat(starts, lengths)).astype(np.int32)
    outputs = [np.arange(max(end - OUTPUTS - 1, start), end - 1) for start, end in zip(starts, ends)]
    return segments, positions, np.concatenate(outputs).astype(np.int32)


def _ends(segments_T: np.ndarray) -> np.ndarray:
    return np.searchsorted(segments_T, segments_T, side="right").astype(np.int32)


def _pairs(segments_T: np.ndarray) -> int:
    """Pairs of tokens of which one sees the other."""
    lengths = np.bincount(segments_T[segments_T > 0])
    return int((lengths * (lengths + 1) // 2).sum())


def _tokens(rows: int, length: int, config: LmConfig) -> np.ndarray:
    return np.random.default_rng(rows * length).integers(0, config.vocab_size, (rows, length), np.int32)


def _random(tree: PyTree) -> PyTree:
    """Arrays of these shapes on their places: scales 1, other parameters and activations small and random, moments and counts 0."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or "opt_state" in name:
            make = jnp.zeros
        else:
            make = jnp.ones if "scale" in name else _normal
        return jax.jit(make, static_argnums=(0, 1), out_shardings=leaf.sharding)(leaf.shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def _normal(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape, dtype) * jnp.asarray(0.02, dtype)


def _put(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.asarray(array, like.dtype), like.sharding)
