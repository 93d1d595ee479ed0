"""One program, any mesh: what is scored, found, answered and learned on eight devices is what one device gives."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import tiny

from radit_jax import sharding
from radit_jax.inference.ensemble import Ensemble, passage_logweights
from radit_jax.inference.score import Scorer
from radit_jax.retrieval.encode import encoding
from radit_jax.retrieval.search import ExactSearcher
from radit_jax.retrieval.vectors import Vectors
from radit_jax.training import optim, steps
from radit_jax.training.losses import LsrOptions
from radit_jax.types import Instance

MESHES = [(8, 1), (4, 2), (2, 4)]
MEMBERS = tiny.retrieved(8, 2)
STEPS, ROWS = 20, 8
# Ten times the paper's learning rate. At a hundred times of this the tiny LM is chaotic: on one device alone, parameters that differ by
# 1e-7 give losses that differ by 4e-2 after six steps.
OPTIMIZER = dataclasses.replace(tiny.OPTIMIZER, peak_lr=1e-4, final_lr=1e-5)


def lm_on(shape):
    """A tiny LM on the mesh of this shape, and the mesh."""
    mesh = tiny.mesh(*shape)
    return tiny.on_mesh(tiny.lm(), sharding.LM_RULES, mesh), mesh


@functools.cache
def scores(shape) -> np.ndarray:
    rng = np.random.default_rng(0)
    drawn = [rng.integers(2, len(tiny.PIECES), 33 + n).astype(np.int32) for n in range(11)]  # two batches, the second not full
    lm, mesh = lm_on(shape)
    return Scorer(lm, batch_tokens=8 * 48, mesh=mesh)([Instance(f"i{n}", tokens, 30) for n, tokens in enumerate(drawn)])


@functools.cache
def answers(shape):
    """Answers at both levels, and the log-probabilities of choices."""
    lm, mesh = lm_on(shape)
    ensemble = Ensemble(lm, tiny.maker(), batch_tokens=2 * 8 * 96, max_new_tokens=4, mesh=mesh)
    asked = [
        ensemble.prompted(m.example.id, m.example.prompt, [p.content for p in m.passages], passage_logweights(m.scores_K, 2.0))
        for m in MEMBERS[:6]  # padded to the eight that every data axis divides
    ]
    choices = [[tiny.maker().target_ids(f" {word}") for word in tiny.WORDS[: 2 + i % 3]] for i in range(len(asked))]
    sequence, token = (ensemble.generate(asked, level=level) for level in ("sequence", "token"))
    return sequence, token, ensemble.choose(asked, choices, ends=True)


@functools.cache
def found(shape):
    """Rows and scores of the passages of each question."""
    mesh = tiny.mesh(*shape)
    encoder = tiny.on_mesh(tiny.encoder(), sharding.ENCODER_RULES, mesh)
    tokens, mask = tiny.tokenizer().encode_with_specials([m.example.query for m in MEMBERS], 32)
    query_BxE = np.asarray(encoding(encoder, mesh)(tokens, mask))
    return ExactSearcher(Vectors([tiny.vectors(50)]), mesh).search(query_BxE, 5)


@functools.cache
def trained(kind, shape):
    """Losses of every step, and the parameters before the first and after the last."""
    tx = optim.make_optimizer(OPTIMIZER, STEPS)
    step, model, rules, data, static = {
        "lm_ft": (steps.lm_step, tiny.lm(), sharding.LM_RULES, tiny.lm_data(rows=ROWS), {}),
        "lsr_ft": (
            steps.lsr_step,
            tiny.encoder(),
            sharding.ENCODER_RULES,
            tiny.lsr_data(batch=ROWS),
            {"options": LsrOptions(score_scale=5.0)},
        ),
    }[kind]
    graphdef, params = tiny.parts(model)
    mesh = tiny.mesh(*shape)
    state = tiny.born(params, tx, rules, mesh)
    before = tiny.leaves(state.params)
    run = steps.compile_step(step, graphdef, tx, state, mesh, rules, **static)
    losses = []
    for batch, _ in itertools.islice(data, STEPS):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, before, tiny.leaves(state.params)


def distance(some, others) -> float:
    return sum(float(np.square(some[path] - others[path]).sum()) for path in others) ** 0.5


@pytest.mark.parametrize("shape", MESHES)
def test_scores_are_those_of_one_device(shape):
    np.testing.assert_allclose(scores(shape), scores((1, 1)), rtol=1e-5)
    assert np.ptp(scores(shape)) > 1


@pytest.mark.parametrize("shape", MESHES)
def test_answers_and_choices_are_those_of_one_device(shape):
    *found, chosen = answers(shape)
    *expected, chosen_1 = answers((1, 1))
    for level, level_1 in zip(found, expected):
        assert [(answer.text, answer.own_texts) for answer in level] == [(answer.text, answer.own_texts) for answer in level_1]
        for answer, answer_1 in zip(level, level_1):
            logprobs, logprobs_1 = ([a.logprob, *a.own_logprobs] for a in (answer, answer_1))
            np.testing.assert_allclose(logprobs, logprobs_1, rtol=1e-5, atol=1e-4)
    assert len({answer.text for answer in found[0]}) > 3
    for logp_C, logp_1_C in zip(chosen, chosen_1, strict=True):
        np.testing.assert_allclose(logp_C, logp_1_C, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", MESHES)
def test_passages_are_those_of_one_device(shape):
    (rows, scores), (rows_1, scores_1) = found(shape), found((1, 1))
    np.testing.assert_array_equal(rows, rows_1)
    np.testing.assert_allclose(scores, scores_1, atol=1e-5)


@pytest.mark.parametrize("kind", ["lm_ft", "lsr_ft"])
@pytest.mark.parametrize("shape", MESHES)
def test_training_is_that_of_one_device(kind, shape):
    (losses, _, params), (losses_1, before, params_1) = trained(kind, shape), trained(kind, (1, 1))
    np.testing.assert_allclose(losses, losses_1, rtol=1e-4)
    for path, expected in params_1.items():
        # The floor is for the encoder's key biases: no softmax sees them, so that they move by rounding alone, to about 1e-9.
        np.testing.assert_allclose(params[path], expected, rtol=0, atol=max(1e-4 * np.abs(expected).max(), 1e-8), err_msg=path)
    # What they learned is far more than what they differ by.
    assert distance(params, params_1) < 0.01 * distance(before, params_1)
