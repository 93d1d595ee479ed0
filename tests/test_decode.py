"""Decoding in bfloat16: caches and weights are written and sliced as bits, without a change in any value."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radit_jax import sharding
from radit_jax.inference import decode
from radit_jax.models import apart
from radit_jax.models.layers import as_bits, from_bits
from radit_jax.models.lm import LM, KVCache, LmConfig

# Sizes that no other array has.
CONFIG = LmConfig(
    vocab_size=61, width=24, layers=5, heads=6, kv_heads=2, head_dim=4, mlp_width=44, dtype="bfloat16", param_dtype="bfloat16"
)
B, K, T, S = 2, 3, 7, 4
RNG = np.random.default_rng(0)
TOKENS_BxKxT = jnp.asarray(RNG.integers(0, CONFIG.vocab_size, (B, K, T)), jnp.int32)
LENGTHS_BxK = jnp.asarray([[7, 5, 3], [6, 7, 4]], jnp.int32)
NEVER_I = jnp.asarray([CONFIG.vocab_size - 1], jnp.int32)  # a stop token that no prompt here says


def parts(config: LmConfig = CONFIG):
    return nnx.split(LM(config, rngs=nnx.Rngs(0)))


def decoded(graphdef, params):
    last, cache = decode.prefill(graphdef, params, TOKENS_BxKxT, LENGTHS_BxK)
    return decode.decode_each(*form(graphdef, params), last, LENGTHS_BxK, cache, NEVER_I, S)


def form(graphdef, params):
    """As this platform decodes."""
    return nnx.split(decode.decoder(nnx.merge(graphdef, params)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_bits_come_back_as_they_were(dtype):
    x = jnp.asarray(RNG.standard_normal((3, 4)) * 100, dtype)
    on_cpu = jax.default_backend() == "cpu"
    assert as_bits(x).dtype == ("uint16" if dtype == "bfloat16" and on_cpu else dtype)
    np.testing.assert_array_equal(from_bits(as_bits(x)[1:]), x[1:])
    assert from_bits(as_bits(x)).dtype == x.dtype


def test_bits_change_no_answer(monkeypatch):
    graphdef, params = parts()
    ids, logp = decoded(graphdef, params)
    jax.clear_caches()
    with monkeypatch.context() as patch:
        for module in ("radit_jax.models.lm", "radit_jax.models.apart"):
            patch.setattr(f"{module}.as_bits", lambda x: x)
        plain_ids, plain_logp = decoded(graphdef, params)
    jax.clear_caches()
    np.testing.assert_array_equal(ids, plain_ids)
    np.testing.assert_allclose(logp, plain_logp, rtol=1e-5)


def test_an_lm_as_it_is_read_has_its_layers_as_bits_and_says_the_same():
    graphdef, params = parts()
    bits = nnx.split(nnx.merge(graphdef, params).as_read())[1]
    of_layers = {leaf.dtype.name for leaf in jax.tree.leaves(bits["blocks"])}
    assert of_layers == {"uint16" if jax.default_backend() == "cpu" else "bfloat16"}
    for found, expected in zip(decoded(graphdef, bits), decoded(graphdef, params)):
        np.testing.assert_array_equal(found, expected)
    whole = jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS_BxKxT[:, 0]))  # no bits are taken there
    np.testing.assert_array_equal(whole(bits), whole(params))


@pytest.mark.parametrize("windows", [(), (None, 3, None, 4, 3)])
def test_layers_apart_say_what_the_stack_says(monkeypatch, windows):
    graphdef, params = parts(dataclasses.replace(CONFIG, dtype="float32", param_dtype="float32", windows=windows))
    ids, logp = decoded(graphdef, params)
    jax.clear_caches()
    with monkeypatch.context() as patch:
        patch.setattr("radit_jax.inference.decode.platform", lambda: "tpu")
        stacked_ids, stacked_logp = decoded(graphdef, params)
    jax.clear_caches()
    np.testing.assert_array_equal(ids, stacked_ids)
    np.testing.assert_allclose(logp, stacked_logp, rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere layers apart are copies")
@pytest.mark.parametrize("dtype", ["bfloat16", "uint16"])
def test_on_a_cpu_layers_lie_where_the_stack_does(dtype):
    values = jnp.asarray(RNG.standard_normal((3, 8, 64)), jnp.bfloat16)
    stack = as_bits(values) if dtype == "uint16" else values
    layers = apart._layers(stack)
    assert len(layers) == 3 and {layer.dtype for layer in layers} == {values.dtype}
    if dtype == "uint16":  # an LM as it is read
        begin, size = stack.unsafe_buffer_pointer(), stack.nbytes // 3
        assert [layer.unsafe_buffer_pointer() for layer in layers] == [begin + n * size for n in range(3)]
    del stack  # they keep it
    for layer, expected in zip(layers, values):
        np.testing.assert_array_equal(layer, expected)


def test_no_stack_of_layers_is_widened_and_no_cache_transposed():
    graphdef, params = parts()
    last, cache = decode.prefill(graphdef, params, TOKENS_BxKxT, LENGTHS_BxK)
    compiled = decode.decode_each.lower(*form(graphdef, params), last, LENGTHS_BxK, cache, NEVER_I, S).compile().as_text()
    c = CONFIG
    cache_first = f"[{c.layers},{K},{B},{c.kv_heads},{T + S},{c.head_dim}]"
    held, *others = ("u16", "bf16", "f32") if jax.default_backend() == "cpu" else ("bf16", "f32")
    assert f"{held}{cache_first}" in compiled and not any(f"{kind}{cache_first}" in compiled for kind in others)
    assert f"[{c.layers},{c.width},{c.mlp_width}]" not in compiled  # weights come apart
    cache_first = f"[{K},{c.layers},{B},{c.kv_heads},{T + S},{c.head_dim}]"
    assert cache_first not in compiled
    of_layer = rf"\w+\[{K},{B},{c.kv_heads},{T + S},{c.head_dim}\]"
    assert re.search(of_layer, compiled)
    name = re.search(r" while\(.*body=%?([\w.-]+)", compiled)[1]
    body = re.search(rf"^%?{re.escape(name)} .*?^}}", compiled, re.MULTILINE | re.DOTALL)[0]
    assert "dot" in body and not re.search(rf"= {of_layer}\S* copy\(", body)


def test_append_writes_prompts_side_by_side_as_it_writes_each():
    shape = (CONFIG.layers, K, B, CONFIG.kv_heads, T + S, CONFIG.head_dim)
    k, v = (jnp.asarray(RNG.standard_normal(shape), jnp.bfloat16) for _ in range(2))
    new = tuple(jnp.asarray(RNG.standard_normal(shape[:4] + (1,) + shape[5:]), jnp.bfloat16) for _ in range(2))
    positions, at = jnp.asarray(RNG.integers(0, 9, (K, B, T + S)), jnp.int32), jnp.int32(T)
    both = KVCache(k, v, positions, at).append(*new, positions[:, :, :1])
    for j in range(K):
        one = KVCache(k[:, j], v[:, j], positions[j], at).append(new[0][:, j], new[1][:, j], positions[j, :, :1])
        np.testing.assert_array_equal(both.k_LxBxGxSxh[:, j], one.k_LxBxGxSxh)
        np.testing.assert_array_equal(both.v_LxBxGxSxh[:, j], one.v_LxBxGxSxh)
        np.testing.assert_array_equal(both.positions_BxS[j], one.positions_BxS)
        np.testing.assert_array_equal(one.k_LxBxGxSxh[:, :, :, T], new[0][:, j, :, :, 0])


def test_decoding_equals_one_pass_over_what_was_decoded():
    graphdef, params = parts(dataclasses.replace(CONFIG, dtype="float32", param_dtype="float32"))
    ids_BxKxS, logp_BxK = decoded(graphdef, params)
    lm = nnx.merge(graphdef, params)
    for b, k in np.ndindex(B, K):
        prompt = TOKENS_BxKxT[b, k, : LENGTHS_BxK[b, k]]
        whole = jnp.concatenate([prompt, ids_BxKxS[b, k]])
        logp_TxV = jax.nn.log_softmax(lm(whole[None])[0])
        before = len(prompt) - 1 + np.arange(S)
        np.testing.assert_array_equal(jnp.argmax(logp_TxV[before], -1), ids_BxKxS[b, k])
        end = logp_TxV[len(whole) - 1, NEVER_I[0]]  # of an answer that is cut
        np.testing.assert_allclose(jnp.sum(jnp.max(logp_TxV[before], -1)) + end, logp_BxK[b, k], rtol=1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere layers apart are copies")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_cpu_prompts_are_looked_at_where_they_lie_and_others_take_their_place_in_a_copy(dtype):
    graphdef, params = parts(dataclasses.replace(CONFIG, head_dim=16, dtype=dtype, param_dtype=dtype))
    mesh = sharding.mesh_or_one(None)
    given = (params, TOKENS_BxKxT, LENGTHS_BxK, NEVER_I)
    params, tokens, lengths, stops = jax.device_put(given, sharding.replicated(mesh))
    with jax.set_mesh(mesh):
        decoder = form(graphdef, params)
        last, cache = decode.prefill(graphdef, params, tokens, lengths)
        begun = decode.begin(last, lengths, stops, jnp.ones(B, bool), S)
        rows, past = decode.over(begun, cache, apart=True)
        assert rows.cache.capacity == S and past.capacity == T
        begin, size = cache.k_LxBxGxSxh.unsafe_buffer_pointer(), cache.k_LxBxGxSxh.nbytes // CONFIG.layers
        assert [k.unsafe_buffer_pointer() for k in past.k_BxGxSxh] == [begin + n * size for n in range(CONFIG.layers)]
        before = jax.tree.map(np.array, cache)
        compiled = decode.go._cache_size()
        rows = decode.go(*decoder, rows, past, stops, B * K)
        expected = decode.decode_each(*decoder, last, lengths, cache, stops, S)
        np.testing.assert_array_equal(rows.ids_BxRxS, expected[0])
        np.testing.assert_allclose(rows.logp_BxR, expected[1], rtol=1e-5)
        # The prompts again, in other rows: they say what they said.
        to_M = np.random.default_rng(1).permutation(B * K).astype(np.int32)
        for _ in range(2):  # from views to a copy, and in that copy
            rows, past = decode.take(rows, past, begun, cache, to_M, np.arange(B * K, dtype=np.int32))
            jax.tree.map(np.testing.assert_array_equal, cache, before)
            rows = decode.go(*decoder, rows, past, stops, B * K)
            for found, first in zip((rows.ids_BxRxS, rows.logp_BxR), expected):
                found, first = (np.asarray(x).reshape(B * K, -1) for x in (found, first))
                np.testing.assert_allclose(found[to_M], first, rtol=1e-5)
        assert decode.go._cache_size() == compiled + 1  # one program, wherever the prompts lie
