"""The nine mistakes that shipped in other implementations of retrieval-augmented training (SPEC section 9): each cannot be made here."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from radit_jax import inputs
from radit_jax.data import packing, training_sets
from radit_jax.errors import InputError
from radit_jax.inference.decode import mix_logprobs
from radit_jax.inference.ensemble import Ensemble, passage_logweights
from radit_jax.inference.score import Scorer
from radit_jax.training import batches, losses, steps
from radit_jax.training.losses import LsrOptions
from radit_jax.types import LsrBatch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def lsr_batch(passages_BxKxE, lm_logp_BxK, weights_B=None) -> LsrBatch:
    """A batch of which the objective alone is asked: no query tokens."""
    B, K, _ = np.shape(passages_BxKxE)
    return LsrBatch(
        query_tokens_BxT=jnp.zeros((B, 1), jnp.int32),
        query_mask_BxT=jnp.ones((B, 1), bool),
        passages_BxKxE=jnp.asarray(passages_BxKxE, jnp.float32),
        candidates_BxK=jnp.ones((B, K), bool),
        lm_logp_BxK=jnp.asarray(lm_logp_BxK, jnp.float32),
        target_lengths_B=jnp.full(B, 4, jnp.int32),
        base_logits_BxK=jnp.zeros((B, K)),
        weights_B=jnp.ones(B) if weights_B is None else jnp.asarray(weights_B, jnp.float32),
    )


def softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


# -- 1: the retriever's loss from detached scores --------------------------------------------------------------------------------


def test_trap_1_one_step_moves_the_query_encoder_and_nothing_else():
    _, document = tiny.parts(tiny.encoder())  # starts as the same weights, is held on its own
    vectors, before = tiny.vectors(), tiny.leaves(document)
    batch, _ = next(tiny.lsr_data())
    frozen = np.array(batch.passages_BxKxE)
    state, metrics = tiny.lsr_step()(tiny.lsr_state(), batch)
    assert metrics["grad_norm"] > 1e-3
    after = tiny.leaves(state.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert {"embed/word/embedding", "blocks/attention/q/kernel", "blocks/attention/o/kernel", "blocks/mlp/up/kernel"} <= moved
    for path, array in tiny.leaves(document).items():
        np.testing.assert_array_equal(array, before[path])
    np.testing.assert_array_equal(tiny.vectors(), vectors)
    np.testing.assert_array_equal(batch.passages_BxKxE, frozen)


def test_trap_1_the_gradient_reaches_the_queries_and_stops_at_passages_and_lm_scores():
    rng = np.random.default_rng(0)
    queries_BxE, passages_BxKxE = rng.normal(size=(2, 4)), rng.normal(size=(2, 3, 4))
    lm_logp_BxK = np.log(rng.uniform(0.001, 0.05, (2, 3)))
    options = LsrOptions(score_scale=2.0)

    def loss(queries_BxE, passages_BxKxE, lm_logp_BxK):
        return steps.lsr_objective(queries_BxE, lsr_batch(passages_BxKxE, lm_logp_BxK), options)[0]

    found = jax.grad(loss, (0, 1, 2))(*(jnp.asarray(x, jnp.float32) for x in (queries_BxE, passages_BxKxE, lm_logp_BxK)))
    p_BxK = softmax(2.0 * np.einsum("be,bke->bk", queries_BxE, passages_BxKxE))
    log_ratio_BxK = np.log(p_BxK) - np.log(softmax(np.exp(lm_logp_BxK) / 0.01))
    # d KL(p‖q) / d logit_k = p_k (log p_k/q_k − KL)
    by_hand_BxK = p_BxK * (log_ratio_BxK - (p_BxK * log_ratio_BxK).sum(-1, keepdims=True))
    expected_BxE = 2.0 * np.einsum("bk,bke->be", by_hand_BxK, passages_BxKxE) / 2
    assert np.abs(expected_BxE).max() > 0.01
    np.testing.assert_allclose(found[0], expected_BxE, rtol=1e-4, atol=1e-6)
    assert not np.any(found[1]) and not np.any(found[2])


# -- 2: log p_LM(y | c∘x) one position off ---------------------------------------------------------------------------------------


def test_trap_2_the_score_is_read_one_position_before_each_target_token():
    make = tiny.maker()
    instances = [
        make.instance(m.example.id, m.example.prompt, m.passages[0].content, m.example.target, close=False) for m in tiny.retrieved()
    ]
    logp_N = Scorer(tiny.lm(), batch_tokens=256)(instances)
    np.testing.assert_allclose(logp_N, [tiny.target_logprob(instance) for instance in instances], rtol=1e-4)
    for instance, found in zip(instances, logp_N):
        logp_TxV, ids = tiny.logprobs(instance.tokens_T), instance.tokens_T
        late = sum(logp_TxV[t, ids[t]] for t in range(instance.target_start, len(ids)))
        early = sum(logp_TxV[t - 2, ids[t]] for t in range(instance.target_start, len(ids)))
        assert abs(found - late) > 0.05 and abs(found - early) > 0.05


# -- 3: a flat target ------------------------------------------------------------------------------------------------------------


def test_trap_3_the_entropy_of_the_target_is_a_metric_of_the_step():
    batch, _ = next(tiny.lsr_data())
    _, metrics = tiny.lsr_step()(tiny.lsr_state(), batch)
    target_BxK = softmax(np.exp(np.asarray(batch.lm_logp_BxK, np.float64)) / 0.01)
    np.testing.assert_allclose(metrics["target_entropy"], -(target_BxK * np.log(target_BxK)).sum(-1).mean(), rtol=1e-4)


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_trap_3_tau_sharpens_the_target(tau):
    batch = lsr_batch(np.zeros((1, 3, 2)), np.log([[0.05, 0.01, 0.01]]))
    _, metrics = steps.lsr_objective(jnp.zeros((1, 2)), batch, LsrOptions(tau=tau))
    if tau == 0.01:  # softmax(5, 1, 1)
        total = np.e**5 + 2 * np.e
        expected = -(np.e**5 / total * np.log(np.e**5 / total) + 2 * np.e / total * np.log(np.e / total))
        assert expected < 0.3
    else:  # softmax(0.05, 0.01, 0.01): flat to four digits
        expected = np.log(3)
    np.testing.assert_allclose(metrics["target_entropy"], expected, rtol=3e-4)
    assert LsrOptions().tau == 0.01 and LsrOptions().score == "prob"


# -- 4: prompt tokens in the loss ------------------------------------------------------------------------------------------------


def test_trap_4_no_label_or_slot_is_a_prompt_token():
    instance = tiny.maker().instance("q", "Q: moss?\nA:", "oak.", " tern", close=True)
    made = packing.features(instance, 0, tiny.ROW, tiny.OUTPUT_SLOTS)
    target = [*tiny.tokenizer().encode(" tern"), tiny.tokenizer().eos_id]
    assert made["labels"].tolist() == target
    assert made["slots"].tolist() == list(range(instance.target_start - 1, len(instance.tokens_T) - 1))
    np.testing.assert_array_equal(made["tokens"][made["slots"] + 1], made["labels"])


def test_trap_4_gradients_of_the_logits_are_zero_but_before_output_tokens():
    batch, numbers = next(tiny.lm_data(rows=2))
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    logits_BxTxV = jnp.asarray(np.random.default_rng(0).normal(size=(*batch.tokens_BxT.shape, len(tiny.PIECES))), jnp.float32)

    def loss(logits_BxTxV):
        logits_BxPxV = jnp.take_along_axis(logits_BxTxV, batch.slots_BxP[..., None], axis=1)
        return losses.output_nll(logits_BxPxV, batch.labels_BxP, batch.weights_BxP)

    reached_BxT = np.abs(jax.grad(loss)(logits_BxTxV)).sum(-1) > 0
    source = tiny.lm_source()
    outputs = sum(len(source[number]["labels"]) for number in numbers)
    assert reached_BxT.sum() == outputs == batch.weights_BxP.sum() < (batch.segment_ids_BxT > 0).sum() / 2
    for row, at in zip(*np.nonzero(reached_BxT)):  # each is followed by an output token: beyond the start of its answer
        first = at - batch.positions_BxT[row, at]
        read = tiny.tokenizer().decode(batch.tokens_BxT[row, first : at + 1], skip_special=False)
        assert "A:" in read


def test_trap_4_labels_without_weight_change_neither_loss_nor_parameters():
    batch, _ = next(tiny.lm_data())
    assert (batch.weights_BxP == 0).any()
    other = dataclasses.replace(batch, labels_BxP=np.where(batch.weights_BxP > 0, batch.labels_BxP, 7))
    (state, metrics), (state_2, metrics_2) = (tiny.lm_step()(tiny.lm_state(), b) for b in (batch, other))
    assert metrics["loss"] == metrics_2["loss"] > 0
    for path, array in tiny.leaves(state.params).items():
        np.testing.assert_array_equal(array, tiny.leaves(state_2.params)[path])


# -- 5: KL divided by batch × k --------------------------------------------------------------------------------------------------


KL_1 = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
KL_2 = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
KL_1_TARGET_FIRST = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
KL_2_TARGET_FIRST = 0.25 * np.log(0.25 / 0.5) + 0.75 * np.log(0.75 / 0.5)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [("retriever_first", (KL_1 + KL_2) / 2), ("target_first", (KL_1_TARGET_FIRST + KL_2_TARGET_FIRST) / 2)],
)
def test_trap_5_the_loss_is_a_sum_over_passages_and_a_mean_over_examples(direction, expected):
    p_r_BxK = np.asarray([[0.75, 0.25], [0.5, 0.5], [0.9, 0.1]])
    p_lsr_BxK = np.asarray([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]])
    # With the unit vectors as passages the query is the row of scores; p_LM / τ = log p_LSR + 4 is a raw probability for Eq. 4.
    batch = lsr_batch(np.broadcast_to(np.eye(2), (3, 2, 2)), np.log(0.01 * (np.log(p_lsr_BxK) + 4)), weights_B=[1, 1, 0])
    options = LsrOptions(direction=direction)
    objective, metrics = steps.lsr_objective(jnp.asarray(np.log(p_r_BxK), jnp.float32), batch, options)
    np.testing.assert_allclose(objective, expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)


# -- 6: LM scores and retrieval scores in different orders -----------------------------------------------------------------------


def test_trap_6_permuting_passages_permutes_vectors_scores_and_lm_scores_alike():
    source, order = tiny.lsr_source(), [2, 0, 1]
    members = [
        dataclasses.replace(m, passages=tuple(m.passages[i] for i in order), rows_K=m.rows_K[order], scores_K=m.scores_K[order])
        for m in source.retrieved
    ]
    permuted = dataclasses.replace(source, retrieved=members)
    for n in range(len(source)):
        for name in ("passages", "lm_logp", "base_logits"):
            np.testing.assert_array_equal(permuted[n][name], source[n][name][order])
        assert len(set(source[n]["lm_logp"])) == 3


def test_trap_6_scores_stored_in_another_order_are_joined_by_id():
    source = tiny.lsr_source()
    shuffled = {id: (names[::-1], logp_K[::-1], length) for id, (names, logp_K, length) in reversed(source.scores.items())}
    for n in range(len(source)):
        np.testing.assert_array_equal(dataclasses.replace(source, scores=shuffled)[n]["lm_logp"], source[n]["lm_logp"])
        np.testing.assert_array_equal(source[n]["lm_logp"], source.scores[f"q{n}"][1])


def test_trap_6_a_missing_score_is_an_error():
    source = tiny.lsr_source()
    names, logp_K, length = source.scores["q1"]
    with pytest.raises(InputError, match="q1"):
        batches.align(source.retrieved[1], {**source.scores, "q1": (["other", *names[1:]], logp_K, length)})
    with pytest.raises(InputError, match="q1"):
        batches.align(source.retrieved[1], {"q0": source.scores["q0"]})


# -- 7: logits averaged in the ensemble ------------------------------------------------------------------------------------------


def test_trap_7_two_passages_two_tokens_by_hand():
    p_KxV, w_K = np.asarray([[0.001, 0.999], [0.7, 0.3]]), np.asarray([0.2, 0.8])
    mixed_V = np.exp(mix_logprobs(jnp.log(p_KxV), jnp.log(w_K)))
    np.testing.assert_allclose(mixed_V, [0.2 * 0.001 + 0.8 * 0.7, 0.2 * 0.999 + 0.8 * 0.3], rtol=1e-5)
    averaged_V = w_K @ np.log(p_KxV)
    assert np.argmax(mixed_V) == 0 and np.argmax(averaged_V) == 1  # the mistake picks the other token


def test_trap_7_decoding_follows_the_mixture_of_probabilities():
    ensemble = Ensemble(tiny.lm(), tiny.maker(), batch_tokens=600, max_new_tokens=4)
    members = tiny.retrieved()
    questions = [
        ensemble.prompted(m.example.id, m.example.prompt, [p.content for p in m.passages[:2]], passage_logweights(m.scores_K[:2], 1.0))
        for m in members
    ]
    answers = ensemble.generate(questions, level="token")
    by_logits = []
    for question, answer in zip(questions, answers):
        text, logprob = greedy(question, lambda logp_KxV, w_K: np.log(w_K @ np.exp(logp_KxV)))
        assert answer.text == text
        np.testing.assert_allclose(answer.logprob, logprob, rtol=1e-4)
        by_logits.append(greedy(question, lambda logp_KxV, w_K: w_K @ logp_KxV)[0])
    assert by_logits != [answer.text for answer in answers]  # the mistake would show


def greedy(question, mix) -> tuple[str, float]:
    """Text and log-probability (with its end, by any stop token) of the greedy answer under `mix`, by full forward passes."""
    tokenizer, ids, total = tiny.tokenizer(), [], 0.0
    stops = [i for i in range(len(tiny.PIECES)) if i == tokenizer.eos_id or tokenizer.decode([i]).startswith("\n")]
    while True:
        logp_KxV = np.stack([tiny.logprobs([*prompt, *ids])[-1] for prompt in question.prompts])
        mixed_V = mix(logp_KxV, np.exp(np.asarray(question.logw_K, np.float64)))
        best = int(mixed_V.argmax())
        if best in stops or len(ids) == 4:
            return tokenizer.decode(ids).strip(), total + float(np.logaddexp.reduce(mixed_V[stops]))
        ids.append(best)
        total += float(mixed_V[best])


# -- 8: the test split in training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "split", "match"),
    [
        ("web_questions", "test", "test"),
        ("web_questions", "train+test[:5]", "test"),
        ("squad_v1", "validation", "validation"),
        ("natural_questions_open", None, "evaluation only"),
        ("trivia_qa", "train", "evaluation only"),
        ("tfds:trivia_qa/rc", "train", "evaluation only"),
        ("somewhere/questions.test.jsonl", None, "test file"),
    ],
)
def test_trap_8_test_splits_and_evaluation_sets_are_not_trained_on(source, split, match):
    with pytest.raises(InputError, match=f"{match}.*may not be trained on"):
        training_sets.training_questions(training_sets.card_for(source), split=split)


def test_trap_8_the_invented_test_split_is_refused():
    spec = importlib.util.spec_from_file_location("common", CONFIGS / "common.py")
    common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(common)
    config = common.base()
    config.train.split = "test"
    with pytest.raises(InputError, match="train.split is 'test'"):
        inputs.sets(config, "train")


# -- 9: prompt and target tokenized together -------------------------------------------------------------------------------------


def test_trap_9_training_scoring_and_decoding_have_the_same_ids():
    make, tokenizer = tiny.maker(), tiny.tokenizer()
    ensemble = Ensemble(tiny.lm(), make, max_new_tokens=8)
    member = tiny.retrieved()[0]
    example, passage = member.example, member.passages[0].content
    training = make.instance(example.id, example.prompt, passage, example.target, close=True)
    scoring = make.instance(example.id, example.prompt, passage, example.target, close=False)
    prompt = ensemble.prompted(example.id, example.prompt, [passage], [0.0]).prompts[0]
    assert training.tokens_T.tolist() == [*scoring.tokens_T, tokenizer.eos_id]
    assert scoring.tokens_T.tolist() == [*prompt, *make.target_ids(example.target)]
    assert training.target_start == scoring.target_start == len(prompt)
    together = tokenizer.encode(f"Background: {passage}\n\n{example.prompt}{example.target}")
    assert [tokenizer.bos_id, *together] != scoring.tokens_T.tolist()  # here the boundary would have been another token
