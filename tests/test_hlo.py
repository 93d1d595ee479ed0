"""What the partitioner makes of the training steps: nothing of the size of all parameters is whole on a device, or sent to one."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from radit_jax import sharding
from radit_jax.inference import decode
from radit_jax.models.encoder import Encoder
from radit_jax.models.lm import LM
from radit_jax.training import optim, steps
from radit_jax.training.losses import LsrOptions
from radit_jax.types import LmBatch, LsrBatch

# Activations of a data shard are smaller than a kernel, those of all rows are not; no number of tokens is a width.
LAYERS, ROWS, T, SLOTS, K = 6, 8, 12, 2, 3
LM_CONFIG = dataclasses.replace(tiny.LM_CONFIG, width=64, layers=LAYERS, heads=8, kv_heads=4, mlp_width=176, vocab_size=264, remat="full")
ENCODER_CONFIG = dataclasses.replace(tiny.ENCODER_CONFIG, width=64, layers=LAYERS, heads=8, mlp_width=176, vocab_size=264, remat="full")
COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\(")


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, np.int32)


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, np.float32)


def lm_batch(accumulate: int) -> LmBatch:
    tokens, slots = (accumulate, ROWS, T), (accumulate, ROWS, SLOTS)
    return LmBatch(ints(*tokens), ints(*tokens), ints(*tokens), ints(*slots), ints(*slots), floats(*slots))


def lsr_batch() -> LsrBatch:
    rows = 1, ROWS
    tokens, mask, candidates = ints(*rows, T), jax.ShapeDtypeStruct((*rows, T), bool), jax.ShapeDtypeStruct((*rows, K), bool)
    scores = floats(*rows, K)
    return LsrBatch(tokens, mask, floats(*rows, K, ENCODER_CONFIG.width), candidates, scores, ints(*rows), scores, floats(*rows))


def compiled(step, module, rules, batch, mesh, **static):
    """The state with its shardings and the executable of one training step, from shapes alone."""
    graphdef, params = nnx.split(nnx.eval_shape(module))
    tx = optim.make_optimizer(tiny.OPTIMIZER, tiny.STEPS)
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), params)
    return state, steps.compile_step(step, graphdef, tx, state, mesh, rules, **static).lower(state, batch).compile()


def lm(mesh, rules=sharding.LM_RULES, *, accumulate: int = 1, **changes):
    config = dataclasses.replace(LM_CONFIG, **changes)
    return compiled(steps.lm_step, lambda: LM(config, rngs=nnx.Rngs(0)), rules, lm_batch(accumulate), mesh)


def lsr(mesh):
    return compiled(
        steps.lsr_step, lambda: Encoder(ENCODER_CONFIG, rngs=nnx.Rngs(0)), sharding.ENCODER_RULES, lsr_batch(), mesh, options=LsrOptions()
    )


def elements(shapes: str) -> list[int]:
    """Of every array type in a piece of HLO."""
    return [math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]


def largest_collective(executable) -> int:
    """Elements of the largest result of any collective."""
    results = [size for line in executable.as_text().splitlines() if (m := COLLECTIVE.search(line)) for size in elements(m[1])]
    assert results
    return max(results)


def bound(config, mesh) -> int:
    """What FSDP may gather at once: one layer's largest kernel, or the table of the vocabulary, cut over "model" in any case."""
    return config.width * max(config.mlp_width, config.vocab_size) // mesh.shape["model"]


def whole(state, placed, mesh) -> list[str]:
    """Paths of kernels and embeddings, of parameters and of both moments, that are not cut over both axes."""
    pieces = {
        sharding.path_name(path): leaf.size // math.prod(where.shard_shape(leaf.shape))
        for (path, leaf), where in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(placed))
    }
    matrices = [path for path in pieces if path.endswith(("/kernel", "word/embedding", "embed/embedding"))]
    assert sum("/mu/" in path for path in matrices) == sum("/nu/" in path for path in matrices) == len(matrices) // 3 > 6
    return [path for path in matrices if pieces[path] < mesh.size]


def check(state, executable, config, mesh):
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert bound(config, mesh) < params // mesh.shape["model"] // LAYERS  # the bound tells a layer from the stack
    for placed in (executable.input_shardings[0][0], executable.output_shardings[0]):
        assert whole(state, placed, mesh) == []
    assert largest_collective(executable) <= bound(config, mesh)
    # Gradients are no output. If one were whole in its stacked form, over "data" too, its shape would be in the program.
    width, inner = config.width, config.mlp_width
    text = executable.as_text()
    cut = f"f32[{LAYERS},{width // mesh.shape['data']},{inner // mesh.shape['model']}]"
    over_model = f"f32[{LAYERS},{width},{inner // mesh.shape['model']}]"
    assert cut in text and over_model not in text and f"f32[{LAYERS},{width},{inner}]" not in text


def test_lm_step_gathers_one_layer_at_a_time():
    mesh = tiny.mesh(4, 2)
    check(*lm(mesh), LM_CONFIG, mesh)


def test_so_it_does_with_tied_tables_and_micro_batches():
    mesh = tiny.mesh(2, 4)
    check(*lm(mesh, accumulate=2, tied=True, remat="none"), LM_CONFIG, mesh)


def test_lsr_step_gathers_one_layer_at_a_time():
    mesh = tiny.mesh(4, 2)
    check(*lsr(mesh), ENCODER_CONFIG, mesh)


def test_a_rule_that_replicates_is_seen():
    mesh = tiny.mesh(4, 2)
    rules = [(pattern, P() if "gate" in pattern else spec) for pattern, spec in sharding.LM_RULES]
    state, executable = lm(mesh, rules)
    found = {path.split("blocks/")[-1] for path in whole(state, executable.output_shardings[0], mesh)}
    assert found == {"mlp/gate/kernel", "mlp/up/kernel"}
    with pytest.raises(AssertionError):
        check(state, executable, LM_CONFIG, mesh)
    assert largest_collective(executable) > bound(LM_CONFIG, mesh)  # their whole gradients are summed over all devices


def test_the_cache_of_the_ensemble_is_cut_by_rows_and_heads():
    mesh = tiny.mesh(2, 4)
    data, model = mesh.shape.values()
    graphdef, params = nnx.split(nnx.eval_shape(lambda: LM(LM_CONFIG, rngs=nnx.Rngs(0))))
    placed = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), params, sharding.shardings(params, sharding.LM_RULES, mesh))
    rows = NamedSharding(mesh, P(sharding.DATA))
    tokens, lengths = (jax.ShapeDtypeStruct(s, np.int32, sharding=rows) for s in ((ROWS, K, T), (ROWS, K)))
    stops = jax.ShapeDtypeStruct((5,), np.int32, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        executable = decode.prefill.lower(graphdef, placed, tokens, lengths).compile()
        last, cache = jax.tree.map(
            lambda leaf, where: leaf.update(sharding=where),
            jax.eval_shape(lambda *a: decode.prefill(graphdef, *a), placed, tokens, lengths),
            executable.output_shardings,
        )
        lm = LM(LM_CONFIG, rngs=nnx.Rngs(0))
        nnx.update(lm, jax.device_put(nnx.state(lm), sharding.shardings(params, sharding.LM_RULES, mesh)))
        decoder = nnx.split(decode.decoder(lm))
        decoding = decode.decode_each.lower(*decoder, last, lengths, cache, stops, 2).compile()
    piece = (LAYERS, K, ROWS // data, LM_CONFIG.kv_heads // model, T, LM_CONFIG.head_dim)
    for kept in (cache.k_LxBxGxSxh, cache.v_LxBxGxSxh):
        assert kept.sharding.shard_shape(kept.shape) == piece
    assert last.sharding.shard_shape(last.shape)[:2] == (ROWS // data, K)
    states = K * ROWS // data * T * LM_CONFIG.width  # of all tokens that a device reads
    assert largest_collective(executable) <= max(bound(LM_CONFIG, mesh), states)
    assert largest_collective(decoding) <= bound(LM_CONFIG, mesh)
