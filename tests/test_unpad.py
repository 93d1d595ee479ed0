"""Rows read in one line of their real tokens: what comes out, and every gradient, is what padded rows give; padding is not computed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from radit_jax import sharding
from radit_jax.data.padding import LINE, line_of_call, line_rows, real_indices
from radit_jax.models.attention import Segments, Trees
from radit_jax.models.unpad import Line
from radit_jax.training import batches

RNG = np.random.default_rng(0)
LENGTHS_B = np.asarray([3, 32, 9, 1, 22])
REAL_BxT = np.arange(32)[None] < LENGTHS_B[:, None]
TOKENS_BxT = np.where(REAL_BxT, RNG.integers(2, len(tiny.PIECES), REAL_BxT.shape), 0).astype(np.int32)


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * max(np.abs(b).max(), 1), rtol=1e-4)


def test_padding_undoes_unpadding_and_so_do_the_gradients():
    indices_N = real_indices(REAL_BxT)
    assert REAL_BxT.sum() < len(indices_N) < REAL_BxT.size
    line = Line.of(jnp.asarray(REAL_BxT), jnp.asarray(indices_N))
    x_BxTxD = RNG.standard_normal((*REAL_BxT.shape, 3)).astype(np.float32)
    line_1xNxD = line.unpad(x_BxTxD)
    np.testing.assert_array_equal(line_1xNxD[0, : REAL_BxT.sum()], x_BxTxD[REAL_BxT])
    assert not line_1xNxD[0, REAL_BxT.sum() :].any()
    np.testing.assert_array_equal(line.pad(line_1xNxD), x_BxTxD * REAL_BxT[..., None])
    # Of a sum weighted by w: each token's gradient is its own weight, at its own place.
    weights_1xNxD, weights_BxTxD = (RNG.standard_normal(np.shape(x)).astype(np.float32) for x in (line_1xNxD, x_BxTxD))
    of_rows = jax.grad(lambda x: jnp.sum(line.unpad(x) * weights_1xNxD))(jnp.asarray(x_BxTxD))
    of_line = jax.grad(lambda x: jnp.sum(line.pad(x) * weights_BxTxD))(line_1xNxD)
    np.testing.assert_array_equal(of_rows[REAL_BxT], weights_1xNxD[0, : REAL_BxT.sum()])
    np.testing.assert_array_equal(of_line[0, : REAL_BxT.sum()], weights_BxTxD[REAL_BxT])
    assert not of_rows[~REAL_BxT].any() and not of_line[0, REAL_BxT.sum() :].any()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_encoder_gives_the_same_vectors_and_gradients(pooling):
    encoder = tiny.encoder()
    encoder.config = dataclasses.replace(encoder.config, pooling=pooling)
    graphdef, params = nnx.split(encoder)

    def loss(params, indices_N):
        vectors_BxE = nnx.merge(graphdef, params)(jnp.asarray(TOKENS_BxT), jnp.asarray(REAL_BxT), indices_N)
        return jnp.sum(vectors_BxE**3), vectors_BxE

    run = jax.jit(jax.grad(loss, has_aux=True))
    close(run(params, real_indices(REAL_BxT)), run(params, None))


@pytest.mark.parametrize("kind", [Segments, Trees])
def test_an_lm_gives_the_same_states_and_gradients(kind):
    graphdef, params = nnx.split(tiny.lm())
    positions_BxT = jnp.broadcast_to(jnp.arange(32)[None], TOKENS_BxT.shape)
    place_BxT = jnp.asarray(np.where(REAL_BxT, LENGTHS_B[:, None] if kind is Trees else 1, 0).astype(np.int32))

    def loss(params, indices_N):
        hidden, _, _ = nnx.merge(graphdef, params)._forward(
            jnp.asarray(TOKENS_BxT), positions_BxT, kind(place_BxT, indices_N), None, collect=False
        )
        hidden = hidden * REAL_BxT[..., None]
        return jnp.sum(hidden**3), hidden

    run = jax.jit(jax.grad(loss, has_aux=True))
    close(run(params, real_indices(REAL_BxT)), run(params, None))


def test_prompts_leave_the_same_cache():
    graphdef, params = nnx.split(tiny.lm())
    run = jax.jit(lambda params, indices_N: nnx.merge(graphdef, params).prefill(jnp.asarray(TOKENS_BxT), LENGTHS_B, indices_N))
    (hidden, cache), (expected, other) = run(params, real_indices(REAL_BxT)), run(params, None)
    close(hidden * REAL_BxT[..., None], expected * REAL_BxT[..., None])
    there_BxS = np.asarray(cache.positions_BxS) >= 0
    np.testing.assert_array_equal(cache.positions_BxS, other.positions_BxS)
    close(*(np.moveaxis(np.asarray(of.k_LxBxGxSxh), 3, 2)[:, there_BxS] for of in (cache, other)))
    close(*(np.moveaxis(np.asarray(of.v_LxBxGxSxh), 3, 2)[:, there_BxS] for of in (cache, other)))


def test_r_ft_takes_the_same_step():
    def stepped(line: bool):
        data = batches.lsr_batches({"train": tiny.lsr_source()}, shares={"train": 1.0}, batch=8, seed=0, line=line)
        batch, _ = next(data)
        assert (batch.query_indices_N is not None) == line
        return tiny.lsr_step()(tiny.lsr_state(), batch)

    (found, metrics), (expected, others) = stepped(True), stepped(False)
    close(metrics, others)
    close(found.params, expected.params)


def test_rows_on_several_devices_or_no_cpu_keep_their_padding():
    assert sharding.in_line(tiny.mesh(1, 1)) and sharding.in_line(tiny.mesh(1, 2))
    assert not sharding.in_line(tiny.mesh(2, 1))


def test_a_line_is_never_longer_than_the_rows():
    full = np.ones((4, 20), bool)
    assert real_indices(full) is None
    assert real_indices(np.stack([REAL_BxT, np.zeros_like(REAL_BxT)])).shape == (2, 80)


def test_calls_in_one_line_hold_everything_once_with_little_padding():
    sizes = sorted(RNG.geometric(1 / 50, 600).clip(8, 400).tolist(), reverse=True)
    left, places, shapes = list(sizes), 0, set()
    while left:
        taken, rows, line = line_of_call(left, line_rows(int(0.75 * left[0])))
        assert 0 < taken <= rows and sum(left[:taken]) <= line <= LINE
        left, places, shapes = left[taken:], places + line, shapes | {line}
    assert places < 1.1 * sum(sizes) and len(shapes) < 8
