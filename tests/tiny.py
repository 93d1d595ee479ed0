"""Tiny models, a tiny tokenizer and a handful of questions with passages, all made in memory: what training and inference are tested on."""

from __future__ import annotations

import functools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from radit_jax import sharding
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.tokenizer import Tokenizer
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.lm import LM, LmConfig
from radit_jax.training import batches, steps
from radit_jax.training.losses import LsrOptions
from radit_jax.training.optim import OptimizerOptions, make_optimizer
from radit_jax.types import Example, Instance, Passage, Retrieved, TrainState

NEW_LINES = 12  # pieces that begin with a new line, so that a random LM ends its answers now and then
PIECES = [
    *("<s>", "</s>", "Ġ", "Ċ", ":Ġ", "ĊĊ", "Ġt", "Ġth"),
    *(string.ascii_letters + string.digits + ".,:?"),
    *(f"Ċ{letter}" for letter in string.ascii_letters[:NEW_LINES]),
    *("Ġa", "Ġb"),
]
# The first merge joins what stands on both sides of the boundary between prompt ("A:") and target (" …").
MERGES = [(":", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "t"), ("Ġt", "h")]
LM_CONFIG = LmConfig(vocab_size=len(PIECES), width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48, rope_theta=100.0)
ENCODER_CONFIG = EncoderConfig(
    vocab_size=len(PIECES), width=16, layers=2, heads=4, mlp_width=24, max_positions=32, pooling="mean", normalize=True
)
OPTIMIZER = OptimizerOptions(peak_lr=1e-2, final_lr=1e-3, warmup_steps=0, eps=1e-3, weight_decay=0.01)
STEPS = 6  # of the schedule
ROW = 160  # tokens of a packed row, and of a row of `logprobs`
OUTPUT_SLOTS = 24
WORDS = ("moss", "tern", "loch", "ruby", "vale", "oak", "iris", "flint", "dune", "wren")


@functools.cache
def tokenizer() -> Tokenizer:
    """Characters and a few merges, without a rule that cuts text before the merges."""
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


def maker(max_tokens: int = ROW) -> InstanceMaker:
    return InstanceMaker(tokenizer(), max_tokens)


@functools.cache
def lm() -> LM:
    """Weights enlarged, so that attention and passages matter."""
    graphdef, params = nnx.split(LM(LM_CONFIG, rngs=nnx.Rngs(0)))
    return nnx.merge(graphdef, jax.tree.map(lambda p: p * 2.0, params))


@functools.cache
def encoder() -> Encoder:
    graphdef, params = nnx.split(Encoder(ENCODER_CONFIG, rngs=nnx.Rngs(1)))
    return nnx.merge(graphdef, jax.tree.map(lambda p: p * 2.0, params))


def parts(model: nnx.Module):
    """(graphdef, a copy of the parameters): training steps take the buffers over."""
    graphdef, params = nnx.split(model)
    return graphdef, jax.tree.map(jnp.copy, params)


def logprobs(ids) -> np.ndarray:
    """log p(next token | ids[: t + 1]), (len(ids), V), by one full forward pass. Padding on the right is out of sight of a causal LM."""
    padded = np.zeros((1, ROW), np.int32)
    padded[0, : len(ids)] = ids
    logits_TxV = np.asarray(_logits()(padded)[0, : len(ids)], np.float64)
    shifted_TxV = logits_TxV - logits_TxV.max(-1, keepdims=True)
    return shifted_TxV - np.log(np.exp(shifted_TxV).sum(-1, keepdims=True))


@functools.cache
def _logits():
    graphdef, params = nnx.split(lm())
    return jax.jit(lambda tokens_BxT: nnx.merge(graphdef, params)(tokens_BxT))


def target_logprob(instance: Instance) -> float:
    """log p of the target's tokens: the token at t is read from the distribution after t − 1."""
    logp_TxV = logprobs(instance.tokens_T)
    return sum(float(logp_TxV[t - 1, instance.tokens_T[t]]) for t in range(instance.target_start, len(instance.tokens_T)))


# -- questions ----------------------------------------------------------------------------------------------------------------------


def passages(count: int = 12) -> list[Passage]:
    rng = np.random.default_rng(3)
    return [Passage(f"p{i}", str(rng.choice(WORDS)), " ".join(rng.choice(WORDS, 1 + i % 3)) + ".") for i in range(count)]


def vectors(count: int = 12) -> np.ndarray:
    """Frozen E_d(c), unit length."""
    drawn_NxE = np.random.default_rng(4).normal(size=(count, ENCODER_CONFIG.width)).astype(np.float32)
    return drawn_NxE / np.linalg.norm(drawn_NxE, axis=-1, keepdims=True)


def retrieved(count: int = 6, k: int = 3) -> list[Retrieved]:
    """Questions of different lengths with k passages each, best first."""
    rng, corpus, found = np.random.default_rng(5), passages(), []
    for i in range(count):
        asked = " ".join(rng.choice(WORDS, 1 + i % 3))
        answer = " ".join(rng.choice(WORDS, 1 + i % 2))
        example = Example(f"q{i}", asked, f"Q: {asked}?\nA:", f" {answer}", (answer,))
        rows_K = rng.choice(len(corpus), k, replace=False)
        scores_K = np.sort(rng.uniform(0, 1, k))[::-1].astype(np.float32)
        found.append(Retrieved(example, tuple(corpus[row] for row in rows_K), rows_K, scores_K))
    return found


def lm_source(count: int = 6, k: int = 3) -> batches.PassageInstances:
    members = retrieved(count, k)
    return batches.PassageInstances(members, [member.example for member in members], maker(), passages=k, output_slots=OUTPUT_SLOTS)


def lm_data(*, rows: int = 4, accumulate: int = 1, seed: int = 0) -> batches.Batches:
    return batches.lm_batches(lm_source(), rows=rows, accumulate=accumulate, seed=seed)


def lsr_source(count: int = 12, k: int = 3) -> batches.LsrSource:
    members = retrieved(count, k)
    rng = np.random.default_rng(6)
    scores = {m.example.id: ([p.id for p in m.passages], np.log(rng.uniform(1e-4, 0.03, k)).astype(np.float32), 3) for m in members}
    tokens, mask = tokenizer().encode_with_specials([m.example.query for m in members], 32)
    return batches.LsrSource(members, scores, vectors(), tokens, mask, score_scale=5.0)


def lsr_data(*, batch: int = 4, seed: int = 0) -> batches.Batches:
    return batches.lsr_batches({"train": lsr_source()}, shares={"train": 1.0}, batch=batch, seed=seed)


def mesh(data: int, model: int) -> jax.sharding.Mesh:
    """A mesh of the devices here. Skips the test that asks for more than there are: one GPU, say."""
    if data * model > jax.device_count():
        pytest.skip(f"needs {data * model} devices, there are {jax.device_count()}")
    return sharding.make_mesh(data, model)


def on_mesh(model: nnx.Module, rules, mesh) -> nnx.Module:
    """A copy of the model with its parameters where the rules say."""
    graphdef, params = parts(model)
    return nnx.merge(graphdef, jax.device_put(params, sharding.shardings(params, rules, mesh)))


# -- compiled steps, one for each mesh and shared by all tests --------------------------------------------------------------------------


def born(params, tx, rules, mesh) -> TrainState:
    """Step 0, where the compiled step will leave the later states: otherwise its second call would be another compile."""
    state = steps.init_state(params, tx)
    return jax.device_put(state, sharding.shardings(state, rules, mesh))


def lm_state(data: int = 1, model: int = 1) -> TrainState:
    return born(parts(lm())[1], make_optimizer(OPTIMIZER, STEPS), sharding.LM_RULES, mesh(data, model))


def lsr_state(data: int = 1, model: int = 1) -> TrainState:
    return born(parts(encoder())[1], make_optimizer(OPTIMIZER, STEPS), sharding.ENCODER_RULES, mesh(data, model))


@functools.cache
def lm_step(data: int = 1, model: int = 1) -> steps.Step:
    tx = make_optimizer(OPTIMIZER, STEPS)
    return steps.compile_step(steps.lm_step, parts(lm())[0], tx, lm_state(), mesh(data, model), sharding.LM_RULES)


@functools.cache
def lsr_step(data: int = 1, model: int = 1) -> steps.Step:
    tx, options = make_optimizer(OPTIMIZER, STEPS), LsrOptions(score_scale=5.0)
    graphdef, where = parts(encoder())[0], mesh(data, model)
    return steps.compile_step(steps.lsr_step, graphdef, tx, lsr_state(), where, sharding.ENCODER_RULES, options=options)


def leaves(tree) -> dict[str, np.ndarray]:
    """Arrays by path, on the host."""
    return {sharding.path_name(path): np.array(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
