"""The mesh and the table of sharding rules: every parameter of every family has a place."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.sharding import PartitionSpec as P

from radit_jax import sharding
from radit_jax.errors import InputError
from radit_jax.models.encoder import Encoder
from radit_jax.models.lm import LM
from radit_jax.training import optim, steps

FAMILIES = {
    "untied": {},
    "tied": {"tied": True},
    "qwen2": {"attention_bias": True, "tied": True},
    "qwen3": {"qk_norm": True},
    "all biases": {"attention_bias": True, "output_bias": True, "mlp_bias": True},
}


def placed(model, config, rules, mesh):
    """{path: spec} of a training state: parameters and both moments."""
    params = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))[1]
    tx = optim.make_optimizer(tiny.OPTIMIZER, 10)
    abstract = jax.eval_shape(lambda p: steps.init_state(p, tx), params)
    found = sharding.shardings(abstract, rules, mesh)
    return {sharding.path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(found)}


def check(specs):
    """Kernels are cut over both axes, and moments lie where their parameters do."""
    params = {path.removeprefix("params/"): spec for path, spec in specs.items() if path.startswith("params/")}
    assert params
    for path, spec in params.items():
        if path.endswith("/kernel"):
            assert {axis for axis in spec if axis} == {"data", "model"}, path
        for moment in ("mu", "nu"):
            assert [s for other, s in specs.items() if other.endswith(f"{moment}/{path}")] == [spec]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_lm_family_has_a_rule(family):
    config = dataclasses.replace(tiny.LM_CONFIG, **FAMILIES[family])
    specs = placed(LM, config, sharding.LM_RULES, tiny.mesh(2, 2))
    check(specs)
    assert specs["params/blocks/attention/q/kernel"] == P(None, "data", "model")
    assert specs["params/blocks/attention/o/kernel"] == P(None, "model", "data")
    assert specs["params/final_norm/scale"] == P() and specs["step"] == P()


def test_every_parameter_of_the_encoder_has_a_rule():
    specs = placed(Encoder, tiny.ENCODER_CONFIG, sharding.ENCODER_RULES, tiny.mesh(2, 2))
    check(specs)
    assert specs["params/embed/word/embedding"] == P("model", "data")
    assert specs["params/blocks/mlp/up/bias"] == P(None, "model")
    assert specs["params/embed/norm/bias"] == specs["params/blocks/mlp/down/bias"] == P()


def test_the_first_rule_that_matches_the_whole_path_wins():
    mesh, rules = tiny.mesh(2, 2), [(r"a/.*", P("data")), (r".*/kernel", P("model"))]
    assert sharding.spec_of("a/kernel", (4,), rules, mesh) == P("data")
    assert sharding.spec_of("b/kernel", (4,), rules, mesh) == P("model")
    with pytest.raises(ValueError, match="b/kernels: no sharding rule"):
        sharding.spec_of("b/kernels", (4,), rules, mesh)


def test_a_rule_with_more_axes_than_the_parameter_raises():
    with pytest.raises(ValueError, match=r"head/kernel has shape \(8,\)"):
        sharding.spec_of("head/kernel", (8,), sharding.LM_RULES, tiny.mesh(2, 2))


def test_a_dimension_that_does_not_divide_is_left_whole():
    mesh = tiny.mesh(2, 2)
    assert sharding.spec_of("embed/embedding", (7, 8), sharding.LM_RULES, mesh) == P(None, "data")
    assert sharding.spec_of("embed/embedding", (8, 7), sharding.LM_RULES, mesh) == P("model", None)


def test_the_mesh_takes_the_devices_it_is_given():
    assert tiny.mesh(4, 2).size == 8
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
    assert dict(sharding.make_mesh().shape) == {"data": 8, "model": 1}
    assert sharding.make_mesh(1, 1).size == 1
    for data, model in ((5, 2), (0, 1), (-1, 16)):
        with pytest.raises(InputError, match="devices"):
            sharding.make_mesh(data, model)


def test_rows_of_a_batch_lie_on_the_data_axis():
    mesh = tiny.mesh(4, 1)
    rows = sharding.put_rows(mesh, np.arange(8.0).reshape(8, 1))
    assert sorted(float(np.asarray(shard.data)[0, 0]) for shard in rows.addressable_shards) == [0, 2, 4, 6]
    everywhere = jax.device_put(jnp.arange(8.0), sharding.replicated(mesh))
    assert all(shard.data.shape == (8,) for shard in everywhere.addressable_shards)


def test_batches_are_rounded_up_to_the_data_axis():
    mesh = tiny.mesh(4, 2)
    assert [sharding.whole_rows(mesh, rows) for rows in (0, 1, 4, 5)] == [4, 4, 4, 8]
    with pytest.raises(InputError, match="a batch of 6 rows does not divide over the 4 devices"):
        sharding.put_rows(mesh, np.zeros((6, 2)))


@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((1, 8), {}, "model axis is 8, which does not divide the LM's heads 4 (it may be 1, 2, 4)"),
        ((1, 4), {"vocab_size": 50_257}, "model axis is 4, which does not divide the LM's vocabulary 50,257"),
        ((1, 4), {"mlp_width": 50}, "MLP width 50"),
        ((3, 1), {}, "data axis is 3, which does not divide the LM's width 32 (it may be 1, 2)"),
        ((1, 4), {"heads": 12, "kv_heads": 6}, "model axis is 4, which does not divide the LM's 6 key-value heads"),
    ],
)
def test_a_mesh_that_does_not_divide_the_lm_is_told(shape, changes, message):
    with pytest.raises(InputError, match=re.escape(message)):
        sharding.check_lm(tiny.mesh(*shape), dataclasses.replace(tiny.LM_CONFIG, **changes))


def test_few_key_value_heads_and_odd_vocabularies_of_encoders_pass():
    sharding.check_lm(tiny.mesh(2, 4), tiny.LM_CONFIG)  # two key-value heads over four devices
    odd = dataclasses.replace(tiny.ENCODER_CONFIG, vocab_size=30_522)
    sharding.check_encoder(tiny.mesh(2, 4), odd)
    with pytest.raises(InputError, match="the encoder's heads 4"):
        sharding.check_encoder(tiny.mesh(1, 8), odd)


def test_the_table_says_what_lies_on_a_device():
    lines = sharding.table(tiny.lm_state(2, 4)).splitlines()
    cells = {line.split()[0]: line.split() for line in lines}
    # (2, 32, 48) in float32, cut in two over "data" and in four over "model"
    assert cells["blocks/mlp/gate/kernel"][1:] == ["2×32×48", "float32", "(–,", "data,", "model)", f"{2 * 32 * 48 * 4 // 8:,}"]
    assert cells["final_norm/scale"][1:] == ["32", "float32", "(–)", "128"]
    params = nnx.state(tiny.lm())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert lines[-2].endswith(f" {whole:,} in all")
    assert lines[-1].startswith("optimizer: ") and lines[-1].endswith(f" {2 * whole + 2 * 4:,} in all")  # two moments, two counters
    assert len(lines) == 1 + len(jax.tree.leaves(params)) + 2
