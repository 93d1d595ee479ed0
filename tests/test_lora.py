"""LoRA and QLoRA: they begin at the base LM, train little of it, keep nothing for the rest, and end as a plain LM."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from processes import ROOT
from torture import FIELDS, export_models

from radit_jax import inputs, sharding, trainings
from radit_jax.errors import InputError
from radit_jax.models import lora
from radit_jax.models.layers import Linear
from radit_jax.models.lm import LM
from radit_jax.models.lora import LoraOptions
from radit_jax.pipeline import Pipeline
from radit_jax.planning import flops
from radit_jax.training import optim, steps
from radit_jax.types import LmBatch

OPTIONS = LoraOptions(rank=4, alpha=8.0, targets=".*")
NF4 = dataclasses.replace(OPTIONS, quantize="nf4")
LEARNING = dataclasses.replace(tiny.OPTIMIZER, peak_lr=4e-2, final_lr=2e-3)
TOTAL = 60


def adapted(options: LoraOptions = OPTIONS, shape=(1, 1)) -> LM:
    """The tiny LM on a mesh with low-rank maps of which b is still zero."""
    mesh = tiny.mesh(*shape)
    return lora.adapted(tiny.on_mesh(tiny.lm(), sharding.LM_RULES, mesh), options, seed=3, place=sharding.placer(mesh, sharding.LM_RULES))


def shaken(lm: LM) -> LM:
    """The LM with low-rank maps that have learned something."""
    graphdef, learned, frozen = lora.split(lm)
    keys = iter(jax.random.split(jax.random.key(7), 100))
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), learned), frozen)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, tokens_BxT):
    return nnx.merge(graphdef, params)(tokens_BxT)


def logits(lm: LM) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(lm), np.random.default_rng(0).integers(2, len(tiny.PIECES), (3, 21)).astype(np.int32)))


@functools.cache
def begun(options: LoraOptions, shape=(1, 1)):
    """(state, step, frozen parameters) of LM-ft on a mesh. The step takes a state over: give it a copy."""
    graphdef, learned, frozen = lora.split(adapted(options, shape))
    tx = optim.make_optimizer(LEARNING, TOTAL)
    state, step = steps.begin(steps.lm_step, graphdef, tx, learned, tiny.mesh(*shape), sharding.LM_RULES, frozen=[frozen])
    return state, step, frozen


def first(options: LoraOptions, shape=(1, 1)):
    state, step, _ = begun(options, shape)
    return jax.tree.map(jnp.copy, state), step


@functools.cache
def trained(options: LoraOptions):
    """(losses, state) of one batch, seen again and again."""
    (state, step), (batch, _), losses = first(options), next(tiny.lm_data()), []
    for _ in range(TOTAL):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


# -- what it computes -------------------------------------------------------------------------------------------------------------------


def test_step_0_is_the_base_lm():
    np.testing.assert_allclose(logits(adapted()), logits(tiny.lm()), atol=1e-5)
    batch, _ = next(tiny.lm_data())
    np.testing.assert_allclose(trained(OPTIONS)[0][0], tiny.lm_step()(tiny.lm_state(), batch)[1]["loss"], rtol=1e-6)


def test_the_names_are_those_of_the_linear_maps():
    plain, low = LM(tiny.LM_CONFIG, rngs=nnx.Rngs(0)), adapted(dataclasses.replace(OPTIONS, targets="q, gate|up"))
    names = {path.split("/")[-2] for path in tiny.leaves(nnx.split(plain.blocks)[1]) if path.endswith("/kernel")}
    assert names == set(lora.MAPS)
    learned = {path.removesuffix("/lora_a") for path in tiny.leaves(lora.split(low)[1]) if path.endswith("_a")}
    assert learned == {"blocks/attention/q", "blocks/mlp/gate", "blocks/mlp/up"}


@pytest.mark.parametrize("options", [OPTIONS, NF4])
def test_merged_it_is_a_plain_lm_with_the_same_logits(options):
    lm = shaken(adapted(options))
    expected, plain = logits(lm), lora.merged(lm)
    assert nnx.split(plain)[0] == nnx.split(tiny.lm())[0]
    found = logits(plain)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(found - logits(tiny.lm())).max() > 0.5  # what was learned shows
    assert lora.merged(plain) is plain


# -- what learns ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS, NF4])
def test_the_low_rank_maps_learn_a_batch_by_heart_and_nothing_else_moves(options):
    losses, state = trained(options)
    assert losses[0] > 2 and losses[-1] < 0.3
    before, _, frozen = begun(options)
    before, after = tiny.leaves(before.params), tiny.leaves(state.params)
    assert {path.rsplit("/", 1)[-1] for path in after} == {"lora_a", "lora_b"} and len(after) == 2 * len(lora.MAPS)
    for path in after:
        assert np.abs(after[path] - before[path]).max() > 1e-3, path
    fresh = tiny.leaves(lora.split(adapted(options))[2])
    for path, leaf in tiny.leaves(frozen).items():
        np.testing.assert_array_equal(leaf, fresh[path], err_msg=path)


@pytest.mark.parametrize("options", [OPTIONS, NF4])
def test_what_is_frozen_has_no_moments(options):
    state, _, frozen = begun(options)
    trees = (state.params, state.opt_state, frozen)
    learned, moments, rest = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if leaf.ndim) for tree in trees)
    assert moments == 2 * learned
    expected = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.split(tiny.lm())[1]))
    assert rest == expected if not options.quantize else rest < 0.6 * expected


def test_gradients_through_bfloat16_weights_are_those_of_the_kernels_that_they_are_merged_into():
    """dL/da = scale · dL/dW bᵀ and dL/db = scale · aᵀ dL/dW, computed in float32."""
    batch, _ = next(tiny.lm_data(rows=2))
    graphdef, learned, frozen = lora.split(shaken(adapted()))
    frozen = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), frozen)
    found, maps, scale = gradients(graphdef, batch, learned, frozen), tiny.leaves(learned), OPTIONS.alpha / OPTIONS.rank
    plain = lora.merged(nnx.merge(graphdef, learned, jax.tree.map(lambda leaf: leaf.astype("float32"), frozen)))
    of_kernels = gradients(nnx.split(plain)[0], batch, nnx.split(plain)[1])
    for path in (path.removesuffix("/lora_a") for path in found if path.endswith("/lora_a")):
        a, b, of_kernel = maps[f"{path}/lora_a"], maps[f"{path}/lora_b"], of_kernels[f"{path}/kernel"]
        for name, expected in (("a", scale * of_kernel @ np.swapaxes(b, 1, 2)), ("b", scale * np.swapaxes(a, 1, 2) @ of_kernel)):
            np.testing.assert_allclose(found[f"{path}/lora_{name}"], expected, atol=1e-3 * np.abs(expected).max(), err_msg=path)


def gradients(graphdef, batch, params, *frozen) -> dict[str, np.ndarray]:
    """What one step of plain descent subtracts."""
    tx = optax.sgd(1.0)
    step = jax.jit(lambda state, *frozen: steps.lm_step(graphdef, tx, state, batch, *frozen)[0])
    return tiny.leaves(jax.tree.map(jnp.subtract, params, step(steps.init_state(params, tx), *frozen).params))


# -- memory -----------------------------------------------------------------------------------------------------------------------------

WIDE = dataclasses.replace(tiny.LM_CONFIG, vocab_size=64, width=192, layers=12, heads=4, kv_heads=4, head_dim=48, mlp_width=512)


def of_wide_weights(options: LoraOptions, remat: str):
    """(arguments of a step for weights that are far larger than what a batch needs, the step)."""
    model = nnx.eval_shape(lambda: lora.adapted(LM(dataclasses.replace(WIDE, remat=remat), rngs=nnx.Rngs(0)), options))
    graphdef, params, *frozen = lora.split(model)
    tx = optim.make_optimizer(tiny.OPTIMIZER, tiny.STEPS)
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), params)
    ints, floats = (functools.partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in ("int32", "float32"))
    batch = LmBatch(*(ints((1, 1, 8)) for _ in range(3)), ints((1, 1, 2)), ints((1, 1, 2)), floats((1, 1, 2)))
    step = steps.compile_step(steps.lm_step, graphdef, tx, state, tiny.mesh(1, 1), sharding.LM_RULES, frozen=frozen)
    return (state, batch, *frozen), step


def bytes_of_a_step(options: LoraOptions, remat: str) -> int:
    """Of arguments and all that is there in between."""
    arguments, step = of_wide_weights(options, remat)
    found = step.lower(*arguments).compile().memory_analysis()
    return found.argument_size_in_bytes + found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


@pytest.mark.parametrize(("quantize", "share"), [("", 1), ("int8", 1 / 4), ("nf4", 1 / 8)])
def test_a_step_keeps_frozen_weights_once_and_quantized_ones_in_their_bits(quantize, share):
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.split(nnx.eval_shape(lambda: LM(WIDE, rngs=nnx.Rngs(0))))[1]))
    # Nothing is computed twice here: whatever the backward pass asks for is kept. One layer at a time is there in float32, once or twice.
    assert weights * share < bytes_of_a_step(LoraOptions(rank=2, quantize=quantize), remat="none") < weights * (share + 3 / WIDE.layers)


def test_a_step_in_which_all_weights_learn_keeps_them_four_times():
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(nnx.split(nnx.eval_shape(lambda: LM(WIDE, rngs=nnx.Rngs(0))))[1]))
    assert bytes_of_a_step(LoraOptions(), remat="none") > 4 * weights  # with gradients and two moments


@pytest.mark.parametrize(("options", "passes"), [(LoraOptions(rank=2), 2), (LoraOptions(rank=2, quantize="int8"), 2), (LoraOptions(), 3)])
def test_gradients_of_frozen_weights_are_not_computed(options, passes, traced_as_for_a_gpu):
    arguments, step = of_wide_weights(options, remat="none")
    forward = 2 * 8 * flops.matrices(WIDE)  # tokens times weights, a multiplication and an addition each
    assert flops.of(step.trace(*arguments).jaxpr).counted == pytest.approx(passes * forward, rel=0.05)


# -- quantized --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantize", "bits", "apart", "logits_apart"), [("int8", 8, 0.01, 0.04), ("nf4", 4, 0.1, 0.5)])
def test_a_quantized_base_is_near_the_float_one(quantize, bits, apart, logits_apart):
    kernel = jax.random.normal(jax.random.key(0), (2, 192, 40))
    quantized = lora.Quantized(kernel, quantize)
    assert quantized.codes[...].nbytes == kernel.size * bits // 8
    error = np.asarray(quantized[...] - kernel)
    assert quantized[...].shape == kernel.shape and 0 < np.square(error).mean() ** 0.5 < apart  # of a standard deviation
    base = LM(tiny.LM_CONFIG, rngs=nnx.Rngs(0))  # random weights, of which nothing can be left out: a trained LM loses less
    expected = logits(base)
    error = logits(lora.adapted(base, dataclasses.replace(OPTIONS, quantize=quantize))) - expected
    assert 0 < np.square(error).mean() ** 0.5 < logits_apart * expected.std()


def equal(state, other, **tolerance) -> None:
    """The same parameters and moments."""
    found, expected = tiny.leaves(state), tiny.leaves(other)
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], err_msg=path, **tolerance)


# -- on a mesh --------------------------------------------------------------------------------------------------------------------------


def test_a_mesh_gives_what_one_device_gives():
    (state, step), (expected, one) = first(NF4, (2, 2)), first(NF4)
    data = tiny.lm_data()
    for batch, _ in itertools.islice(data, 3):
        (state, metrics), (expected, metrics_1) = step(state, batch), one(expected, batch)
        np.testing.assert_allclose(metrics["loss"], metrics_1["loss"], rtol=1e-4)
        if int(state.step) == 1:
            equal(state, expected, atol=1e-2 * LEARNING.peak_lr)
    blocks = state.params["blocks"]
    for leaf, parts in ((blocks["attention"]["o"]["lora_a"], 2), (blocks["mlp"]["up"]["lora_b"], 2)):
        assert len({str(shard.index) for shard in leaf[...].addressable_shards}) == parts


# -- a person's part --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": -1}, "rank is -1, expected 0"),
        ({"rank": 4, "alpha": 0.0}, "alpha is 0.0, expected more than 0"),
        ({"rank": 4, "targets": "q,w"}, "'w' matches no linear map, there are q, k, v, o, gate, up, down"),
        ({"rank": 4, "targets": ""}, "'' matches no linear map"),
        ({"rank": 4, "targets": "(q"}, r"'\(q' is no regular expression"),
        ({"rank": 4, "quantize": "fp4"}, "quantize is 'fp4', expected '', int8 or nf4"),
        ({"quantize": "nf4"}, "needs lm_ft.lora.rank above 0"),
    ],
)
def test_wrong_fields_are_named_with_what_there_is(fields, message):
    with pytest.raises(InputError, match=f"lm_ft.lora.*{message}"):
        LoraOptions(**fields)


def test_off_it_is_no_part_of_what_a_training_is_made_from(monkeypatch):
    """Tuned LMs of before are found again."""
    monkeypatch.syspath_prepend(str(ROOT))
    c = importlib.import_module("configs.common").base().lm_ft
    fields = trainings._that_matter(c)
    assert "lora" not in fields and fields["optimizer"] == c.optimizer.to_dict()
    c.lora.rank = 8
    assert trainings._that_matter(c) == {**fields, "lora": c.lora.to_dict()}


def test_a_rank_that_is_not_low_and_a_missing_qwix_are_told(monkeypatch):
    with pytest.raises(InputError, match=r"rank is 16, expected less than the 16 of blocks/attention/k \(32 × 16\)"):
        adapted(LoraOptions(rank=16, targets="k"))
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match="needs qwix, which is not installed"):
        LoraOptions(rank=4, quantize="nf4")


def test_the_stage_keeps_the_low_rank_maps_and_answers_as_a_plain_lm(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    base = importlib.import_module("configs.common").base()
    models = export_models(tmp_path / "models")
    encoders = {f"retriever.{side}_encoder": str(models / "encoder") for side in ("query", "document")}
    lm_ft = {"lm_ft.lora.rank": 4, "lm_ft.lora.quantize": "nf4", "lm_ft.rows": 2, "lm_ft.steps": 3}
    config = inputs.with_fields(base, {**FIELDS, "lm.checkpoint": str(models / "lm"), **encoders, **lm_ft})
    pipeline = Pipeline(config, tmp_path / "run")
    made_from = pipeline.tuned_lm.manifest["made_from"]["options"]
    assert made_from["lora"]["quantize"] == "nf4"
    tuned = pipeline.lm(True)
    assert not lora.is_adapted(tuned.blocks) and type(tuned.blocks.attention.q) is Linear
    kernels = tiny.leaves(nnx.split(tuned)[1])
    rounded = tiny.leaves(nnx.split(lora.merged(adapted(LoraOptions(rank=4, quantize="nf4"))))[1])
    assert {path for path in kernels if np.abs(kernels[path] - rounded[path]).max() > 1e-5} == {
        "blocks/attention/q/kernel",
        "blocks/attention/v/kernel",
    }
