"""What the share of a device is taken of: operations and bytes counted by formula are those of the programs."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from configs import common
from radit_jax import sharding
from radit_jax.benchmarks import utilisation
from radit_jax.errors import InputError
from radit_jax.models import lora
from radit_jax.planning import flops, programs, shapes

SHAPE = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "hidden_act": "silu",
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    c = common.base()
    c.lm.checkpoint, c.lm.dtype, c.lm.max_tokens, c.lm.remat = str(tmp_path), "float32", 64, "none"
    c.lm_ft.row_length, c.lm_ft.rows, c.lm_ft.output_slots = 512, 2, 64
    c.scoring.batch_tokens = 128
    c.evaluate.batch_tokens, c.evaluate.max_new_tokens, c.evaluate.k = 128, 4, 2
    return c


def program(c, kind):
    return programs.build(kind, c, sharding.make_mesh(1, 1), programs.Settings())


@pytest.mark.parametrize("kind", utilisation.KINDS)
def test_every_program_runs_on_random_weights(config, kind):
    (result,) = utilisation.bench(config, kinds=[kind], repetitions=1)
    assert result["tokens"] > 0 and result["seconds"] > 0 and (result["operations"] > 0) == (result["bytes"] == 0)
    assert result["share_of_peak"] is None  # nobody says what a CPU's is
    assert f"utilisation {kind}" in utilisation.text(result)


def test_operations_are_those_of_the_program_where_every_token_sees_every_token(config, traced_as_for_a_gpu):
    """The reference computes all T × T pairs; what is counted for the same number of pairs and of output slots is what the program says."""
    traced = program(config, "score").trace()
    lm = shapes.lm_config(config.lm.checkpoint)
    B, T = 2, 64
    slots = B * programs.TARGET
    # attention in blocks of CPU_BLOCK queries: one block here
    assert flops.of(traced.jaxpr).counted == utilisation._work(lm, B * T, slots, B * T * T, flops.FORWARD)["operations"]


def test_a_backward_pass_is_two_forward_passes_and_that_of_frozen_weights_one(config):
    lm = shapes.lm_config(config.lm.checkpoint)
    ways = (flops.FORWARD, flops.FROZEN, flops.TRAINING)
    (once, _, thrice), products = ([flops.asked(lm, 1000, 100, pairs, times) for times in ways] for pairs in (5000, 0))
    assert thrice == 3 * once and products == [products[0], 2 * products[0], 3 * products[0]]


@pytest.mark.parametrize("quantize", ["", "nf4"])
def test_a_step_of_low_rank_maps_holds_the_rest_frozen_and_runs(config, quantize):
    everything = program(config, "lm_step")
    config.lm_ft.lora.rank, config.lm_ft.lora.targets, config.lm_ft.lora.quantize = 4, ".*", quantize
    adapted = program(config, "lm_step")
    state, _, frozen = adapted.arguments
    assert len(jax.tree.leaves(state.params)) == 2 * len(lora.MAPS)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(frozen)} == ({"float32", "uint8"} if quantize else {"float32"})
    assert adapted.asked < everything.asked  # nobody asks for the gradients of frozen weights
    (result,) = utilisation.bench(config, kinds=["lm_step"], repetitions=1)
    assert result["operations"] > 0


def test_bytes_of_decoding_are_weights_and_filled_slots(config):
    _, work = utilisation.ready(program(config, "decode"), config)
    lm = shapes.lm_config(config.lm.checkpoint)
    B, K, new, prompt = 1, 2, 4, config.lm.max_tokens - 4
    layers = lm.layers * lm.width * (2 * (lm.heads + lm.kv_heads) * lm.head_dim + 3 * lm.mlp_width)
    slots = sum(prompt + step for step in range(1, new + 1))
    cache = B * K * slots * lm.layers * 2 * lm.kv_heads * lm.head_dim
    assert work["bytes"] == 4 * (new * (layers + lm.width * lm.vocab_size) + cache)
    assert work["tokens"] == B * K * new


def test_rows_are_full_of_instances_that_end_in_their_outputs():
    segments_T, positions_T, outputs = utilisation._row(2048, seed=3)
    lengths = np.bincount(segments_T)[1:]
    assert lengths.sum() == 2048 and (segments_T > 0).all() and (np.diff(segments_T) >= 0).all()
    assert all((positions_T[segments_T == n] == np.arange(length)).all() for n, length in enumerate(lengths, 1))
    assert utilisation._pairs(segments_T) == sum(int(n) * (int(n) + 1) // 2 for n in lengths)
    assert set(outputs) <= set(np.flatnonzero(segments_T)) and len(set(outputs)) == len(outputs)
    ends = utilisation._ends(segments_T)
    assert all(segments_T[end - 1] == segment and (end == 2048 or segments_T[end] != segment) for segment, end in zip(segments_T, ends))


def test_an_unknown_stage_is_named(config):
    with pytest.raises(InputError, match="stage 'lm_ft', expected lm_step, score, prefill, decode"):
        next(utilisation.bench(config, kinds=["lm_ft"], repetitions=1))


def test_every_peak_is_of_a_device(config):
    assert all(operations > 1e14 and rate > 1e11 for operations, rate in utilisation.PEAKS.values())
    assert not any(name in jax.devices()[0].device_kind for name in utilisation.PEAKS)
