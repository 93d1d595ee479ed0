"""The training steps: packing, accumulation and the mesh do not change the result; a model can learn; what cannot be trained stops."""

from __future__ import annotations

import dataclasses
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from radit_jax import sharding
from radit_jax.checkpoint import Checkpoints
from radit_jax.errors import InputError, TrainingDiverged
from radit_jax.training import batches, loop, optim, steps


def equal(state, other, **tolerance) -> None:
    """The same parameters and optimizer state."""
    found, expected = tiny.leaves(state), tiny.leaves(other)
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_allclose(found[path], expected[path], err_msg=path, **tolerance)


def reshaped(batch, accumulate, rows):
    return jax.tree.map(lambda leaf: leaf.reshape(accumulate, rows, *leaf.shape[2:]), batch)


# -- LM-ft -----------------------------------------------------------------------------------------------------------------------


def test_the_loss_of_packed_rows_is_that_of_their_instances():
    data, make, members = tiny.lm_data(), tiny.maker(), tiny.retrieved()
    pairs = [(member.example, passage.content) for member in members for passage in member.passages]
    for batch, numbers in itertools.islice(data, 2):
        assert len(numbers) > 4  # some rows hold several
        instances = [make.instance(x.id, x.prompt, passage, x.target, close=True) for x, passage in (pairs[n] for n in numbers)]
        _, metrics = tiny.lm_step()(tiny.lm_state(), batch)
        nll = -sum(tiny.target_logprob(instance) for instance in instances)
        assert metrics["output_tokens"] == sum(len(i.tokens_T) - i.target_start for i in instances)
        assert metrics["tokens"] == sum(len(i.tokens_T) for i in instances)
        np.testing.assert_allclose(metrics["loss"] * metrics["output_tokens"], nll, rtol=1e-4)


@pytest.mark.parametrize(("row", "known"), [(160, False), (1024, True)])
def test_one_cpu_is_told_how_long_instances_are_where_rows_are_long(row, known):
    members = tiny.retrieved()
    source = batches.PassageInstances(members, [m.example for m in members], tiny.maker(row), passages=3, output_slots=256)
    data, batch = (next(batches.lm_batches(source, rows=1, accumulate=1, seed=0, line=line))[0] for line in (False, True))
    assert data.reach is None and (batch.reach is not None) == known
    if known:
        assert batch.positions_BxT.max() < batch.reach < 2 * (batch.positions_BxT.max() + 1)
    told, metrics = tiny.lm_step()(tiny.lm_state(), batch)
    not_told, expected = tiny.lm_step()(tiny.lm_state(), data)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    equal(told, not_told, atol=1e-5)


def test_each_passage_and_the_examples_own_text_make_an_instance():
    members = tiny.retrieved(2)
    own = [
        dataclasses.replace(members[0].example, background="own text here"),
        dataclasses.replace(members[1].example, background="alone", retrieve=False),
    ]
    members = [dataclasses.replace(member, example=example) for member, example in zip(members, own)]
    source = batches.PassageInstances(members, own, tiny.maker(), passages=2, output_slots=tiny.OUTPUT_SLOTS)
    read = [tiny.tokenizer().decode(source[n]["tokens"]) for n in range(len(source))]
    expected = ["own text here", members[0].passages[0].content, members[0].passages[1].content, "alone"]
    assert [text.split("\n")[0] for text in read] == [f"Background: {background}" for background in expected]
    assert source.describe(np.arange(4)) == "q0, q1"


def test_accumulated_micro_batches_equal_one_batch():
    # Micro-batches with different numbers of output tokens: a mean of their means would be another loss.
    batch = next(batch for batch, _ in tiny.lm_data(rows=4) if len(set(batch.weights_BxP.reshape(2, -1).sum(-1))) == 2)
    one, metrics = tiny.lm_step()(tiny.lm_state(), batch)
    two, metrics_2 = tiny.lm_step()(tiny.lm_state(), reshaped(batch, 2, 2))
    for key in metrics:
        np.testing.assert_allclose(metrics[key], metrics_2[key], rtol=1e-4, err_msg=key)
    equal(two, one, atol=1e-5)


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1)])
def test_lm_step_on_a_mesh_equals_one_device(mesh):
    step, one = tiny.lm_step(*mesh), tiny.lm_step()
    state, expected = tiny.lm_state(*mesh), tiny.lm_state()
    data = tiny.lm_data(rows=4)
    batch, _ = next(data)
    (state, metrics), (expected, metrics_1) = step(state, batch), one(expected, batch)
    equal(state, expected, atol=1e-4)
    for key in metrics:
        np.testing.assert_allclose(metrics[key], metrics_1[key], rtol=1e-4, err_msg=key)
    q = state.params["blocks"]["attention"]["q"]["kernel"][...]
    assert len({str(shard.index) for shard in q.addressable_shards}) == 4  # cut in four, not copied
    batch, _ = next(data)
    np.testing.assert_allclose(step(state, batch)[1]["loss"], one(expected, batch)[1]["loss"], rtol=1e-4)


@pytest.mark.parametrize("mesh", [(2, 2), (4, 1)])
def test_lsr_step_on_a_mesh_equals_one_device(mesh):
    step, one = tiny.lsr_step(*mesh), tiny.lsr_step()
    state, expected = tiny.lsr_state(*mesh), tiny.lsr_state()
    for batch, _ in itertools.islice(tiny.lsr_data(batch=4), 2):
        (state, metrics), (expected, metrics_1) = step(state, batch), one(expected, batch)
    for key in metrics:
        np.testing.assert_allclose(metrics[key], metrics_1[key], rtol=1e-4, atol=1e-4, err_msg=key)
    equal(state, expected, atol=1e-4)


def test_a_parameter_without_a_sharding_rule_raises():
    rules = [rule for rule in sharding.LM_RULES if "down" not in rule[0]]
    tx = optim.make_optimizer(tiny.OPTIMIZER, tiny.STEPS)
    with pytest.raises(ValueError, match="blocks/mlp/down/kernel: no sharding rule"):
        steps.compile_step(steps.lm_step, nnx.split(tiny.lm())[0], tx, tiny.lm_state(), sharding.make_mesh(1, 1), rules)


def test_an_lm_learns_one_batch_by_heart_in_one_compile(monkeypatch):
    monkeypatch.setattr(steps, "lm_step", chex.assert_max_traces(steps.lm_step, n=1))
    tx = optim.make_optimizer(dataclasses.replace(tiny.OPTIMIZER, peak_lr=5e-3, final_lr=1e-4, eps=1e-8), 150)
    graphdef, params = tiny.parts(tiny.lm())
    mesh = sharding.make_mesh(1, 1)
    state = tiny.born(params, tx, sharding.LM_RULES, mesh)
    step = steps.compile_step(steps.lm_step, graphdef, tx, state, mesh, sharding.LM_RULES)
    data = tiny.lm_data(rows=2)
    for batch, _ in itertools.islice(data, 2):  # other batches meet the same compiled step
        step(jax.tree.map(jnp.copy, state), batch)
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2 and losses[-1] < 0.1
    assert int(state.step) == 150


def test_the_query_encoder_learns_the_order_of_the_lm():
    batch, _ = next(tiny.lsr_data())
    state, losses = tiny.lsr_state(), []
    for _ in range(30):
        state, metrics = tiny.lsr_step()(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] / 2


# -- R-ft data -------------------------------------------------------------------------------------------------------------------


def test_sources_with_queries_of_different_lengths_share_a_batch():
    train = tiny.lsr_source()
    shorter = dataclasses.replace(train, query_tokens=train.query_tokens[:, :5], query_mask=train.query_mask[:, :5])
    data = batches.lsr_batches({"train": train, "completion": shorter}, shares={"train": 0.5, "completion": 0.5}, batch=8, seed=0)
    batch, _ = next(data)
    assert batch.query_tokens_BxT.shape == (1, 8, train.query_tokens.shape[1])
    cut = ~batch.query_mask_BxT[..., 5:].any(-1)
    assert 0 < cut.sum() < 8


@pytest.mark.parametrize(("room", "longest", "width"), [(20, 11, 20), (64, 20, 32), (64, 33, 40), (64, 64, 64)])
def test_batches_of_short_queries_have_one_width(room, longest, width):
    """The whole rows' where those are short, else 32 at least: each width is a program."""
    train = tiny.lsr_source()
    mask = np.broadcast_to(np.arange(room) < longest, (len(train), room))
    source = dataclasses.replace(train, query_tokens=mask.astype(np.int32), query_mask=mask)
    batch, _ = next(batches.lsr_batches({"train": source}, shares={"train": 1.0}, batch=8, seed=0))
    assert batch.query_mask_BxT.shape == (1, 8, width) and batch.query_mask_BxT.sum() == 8 * longest


# -- the optimizer ---------------------------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_ends_at_final_lr():
    options = optim.OptimizerOptions(peak_lr=1e-3, final_lr=1e-5, warmup_steps=10)
    at = optim.schedule(options, 110)
    np.testing.assert_allclose([at(0), at(5), at(10)], [0.0, 0.5e-3, 1e-3], rtol=1e-5)
    np.testing.assert_allclose(at(60), 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 2)) / 2, rtol=1e-5)
    np.testing.assert_allclose([at(110), at(500)], [1e-5, 1e-5], rtol=1e-4)


def test_linear_and_constant_schedules():
    options = optim.OptimizerOptions(peak_lr=1e-3, final_lr=1e-4, warmup_steps=0, decay="linear")
    np.testing.assert_allclose([optim.schedule(options, 10)(n) for n in (0, 5, 10)], [1e-3, 5.5e-4, 1e-4], rtol=1e-5)
    constant = optim.schedule(dataclasses.replace(options, decay="constant", warmup_steps=2), 10)
    np.testing.assert_allclose([constant(n) for n in (0, 1, 2, 10)], [0.0, 5e-4, 1e-3, 1e-3], rtol=1e-5)
    with pytest.raises(InputError, match="cosin"):
        optim.schedule(dataclasses.replace(options, decay="cosin"), 10)


@pytest.mark.parametrize("model", [tiny.lm, tiny.encoder])
def test_weight_decay_acts_on_kernels_and_embeddings_alone(model):
    _, params = tiny.parts(model())
    options = optim.OptimizerOptions(peak_lr=0.1, warmup_steps=0, decay="constant", weight_decay=0.5)
    tx = optim.make_optimizer(options, 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    before, moves = tiny.leaves(params), tiny.leaves(updates)
    assert any("norm" in path for path in moves)
    for path, update in moves.items():
        factor = -0.1 * 0.5 if path.endswith(("/kernel", "/embedding")) else 0.0
        np.testing.assert_allclose(update, factor * before[path], rtol=1e-5, atol=1e-9, err_msg=path)


def test_large_gradients_are_clipped_by_their_global_norm():
    params = {"kernel": jnp.zeros((2, 2))}
    tx = optim.make_optimizer(optim.OptimizerOptions(peak_lr=1.0, warmup_steps=0, decay="constant", eps=1.0, clip_norm=1.0), 10)
    updates, _ = tx.update({"kernel": jnp.full((2, 2), 50.0)}, tx.init(params), params)
    # norm 100 becomes 1, so each gradient is 0.5; Adam's first step is g / (|g| + eps)
    np.testing.assert_allclose(updates["kernel"], np.full((2, 2), -0.5 / 1.5), rtol=1e-5)


# -- a loss that is not finite ---------------------------------------------------------------------------------------------------


class Poisoned:
    """Batches of which the third has a weight that is not a number."""

    def __init__(self, data: batches.Batches):
        self.data, self.count, self.numbers = data, 0, []

    def __next__(self):
        batch, numbers = next(self.data)
        self.count += 1
        if self.count == 3:
            self.numbers = numbers
            batch = dataclasses.replace(batch, weights_BxP=batch.weights_BxP * np.float32("nan"))
        return batch, numbers

    def get_state(self):
        return self.data.get_state()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])  # where saves are waited for, and where they run beside the next step
def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_examples(tmp_path, monkeypatch, backend):
    monkeypatch.setattr(loop.jax, "default_backend", lambda: backend)
    data, source = Poisoned(tiny.lm_data()), tiny.lm_source()
    options = loop.LoopOptions(steps=tiny.STEPS, checkpoint_every=1)
    place = loop.placer(sharding.make_mesh(1, 1), rows=4)
    with pytest.raises(TrainingDiverged) as caught:
        loop.run("lm_ft", tiny.lm_step(), tiny.lm_state(), data, tmp_path, options, place=place, describe=source.describe)
    message = str(caught.value)
    assert "lm_ft: loss nan" in message and "at step 3 " in message and "last good checkpoint: step 2" in message
    assert source.describe(data.numbers) in message
    left = Checkpoints(tmp_path / "checkpoints")
    assert left.latest == 2  # the diverged state has not replaced it
    left.close()
