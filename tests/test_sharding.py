"""The mesh and the table of sharding rules: every parameter of every family has a place."""

from __future__ import annotations

import dataclasses

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
    specs = placed(LM, config, sharding.LM_RULES, sharding.make_mesh(2, 2))
    check(specs)
    assert specs["params/blocks/attention/q/kernel"] == P(None, "data", "model")
    assert specs["params/blocks/attention/o/kernel"] == P(None, "model", "data")
    assert specs["params/final_norm/scale"] == P() and specs["step"] == P()


def test_every_parameter_of_the_encoder_has_a_rule():
    specs = placed(Encoder, tiny.ENCODER_CONFIG, sharding.ENCODER_RULES, sharding.make_mesh(2, 2))
    check(specs)
    assert specs["params/embed/word/embedding"] == P("model", "data")
    assert specs["params/blocks/mlp/up/bias"] == P(None, "model")
    assert specs["params/embed/norm/bias"] == specs["params/blocks/mlp/down/bias"] == P()


def test_the_first_rule_that_matches_the_whole_path_wins():
    mesh, rules = sharding.make_mesh(2, 2), [(r"a/.*", P("data")), (r".*/kernel", P("model"))]
    assert sharding.spec_of("a/kernel", (4,), rules, mesh) == P("data")
    assert sharding.spec_of("b/kernel", (4,), rules, mesh) == P("model")
    with pytest.raises(ValueError, match="b/kernels: no sharding rule"):
        sharding.spec_of("b/kernels", (4,), rules, mesh)


def test_a_rule_with_more_axes_than_the_parameter_raises():
    with pytest.raises(ValueError, match=r"head/kernel has shape \(8,\)"):
        sharding.spec_of("head/kernel", (8,), sharding.LM_RULES, sharding.make_mesh(2, 2))


def test_a_dimension_that_does_not_divide_is_left_whole():
    mesh = sharding.make_mesh(2, 2)
    assert sharding.spec_of("embed/embedding", (7, 8), sharding.LM_RULES, mesh) == P(None, "data")
    assert sharding.spec_of("embed/embedding", (8, 7), sharding.LM_RULES, mesh) == P("model", None)


def test_the_mesh_takes_the_devices_it_is_given():
    assert dict(sharding.make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
    assert dict(sharding.make_mesh().shape) == {"data": 8, "model": 1}
    assert sharding.make_mesh(1, 1).size == 1
    for data, model in ((5, 2), (0, 1), (-1, 16)):
        with pytest.raises(InputError, match="devices"):
            sharding.make_mesh(data, model)


def test_rows_of_a_batch_lie_on_the_data_axis():
    mesh = sharding.make_mesh(4, 1)
    rows = jax.device_put(jnp.arange(8.0).reshape(8, 1), sharding.batch_sharding(mesh))
    assert sorted(float(np.asarray(shard.data)[0, 0]) for shard in rows.addressable_shards) == [0, 2, 4, 6]
    everywhere = jax.device_put(jnp.arange(8.0), sharding.replicated(mesh))
    assert all(shard.data.shape == (8,) for shard in everywhere.addressable_shards)
