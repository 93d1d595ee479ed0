"""Eq. 2 in decoding and in choosing: equal to full forward passes and plain sums, whatever is batched with what."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny

from radit_jax.errors import InputError
from radit_jax.evaluation.evaluate import EvaluateOptions, answer_all
from radit_jax.inference import decode, pruning
from radit_jax.inference import ensemble as ensembles
from radit_jax.inference.ensemble import Ensemble, Prompted, passage_logweights, stop_tokens

NEW_TOKENS = 5
MEMBERS = tiny.retrieved(6, 3)
STOPS = stop_tokens(tiny.tokenizer(), len(tiny.PIECES))


def ensemble(batch_tokens: int = 600) -> Ensemble:
    return Ensemble(tiny.lm(), tiny.maker(), batch_tokens=batch_tokens, max_new_tokens=NEW_TOKENS)


def questions(k: int = 3, *, score_scale: float = 2.0):
    found = ensemble()
    return [
        found.prompted(m.example.id, m.example.prompt, [p.content for p in m.passages[:k]], passage_logweights(m.scores_K[:k], score_scale))
        for m in MEMBERS
    ]


def text_of(ids) -> str:
    return tiny.tokenizer().decode(ids).split("\n")[0].strip()


def decoded(prompt) -> list[int]:
    """Greedy ids of one prompt, a full forward pass for each."""
    ids: list[int] = []
    while len(ids) < NEW_TOKENS:
        best = int(tiny.logprobs([*prompt, *ids])[-1].argmax())
        if STOPS[best]:
            break
        ids.append(best)
    return ids


def answer_logprob(prompt, ids, ends: bool = True) -> float:
    """log p(ids, then the end | prompt)."""
    logp_TxV = tiny.logprobs([*prompt, *ids])
    inside = sum(logp_TxV[len(prompt) - 1 + t, token] for t, token in enumerate(ids))
    return inside + np.log(np.exp(logp_TxV[-1, STOPS]).sum()) if ends else inside


def mixed_logprob(question, logprob) -> float:
    """log Σ_c p_R(c) p(prompt of c)."""
    weights_K = np.exp(np.asarray(question.logw_K, np.float64))
    return np.log(sum(weight * np.exp(logprob(prompt)) for weight, prompt in zip(weights_K, question.prompts)))


def by_eq_2(question) -> dict[str, float]:
    """log Σ_c p(answer | c∘x) p_R(c) of every distinct answer of the prompts on their own."""
    own = {}
    for prompt in question.prompts:
        ids = decoded(prompt)
        own.setdefault(text_of(ids), ids)
    return {text: mixed_logprob(question, lambda prompt: answer_logprob(prompt, ids)) for text, ids in own.items()}  # noqa: B023


# -- what answers are ------------------------------------------------------------------------------------------------------------


def test_stops_are_eos_and_pieces_that_begin_with_a_new_line():
    assert {piece for piece, stop in zip(tiny.PIECES, STOPS) if stop} == {"</s>", *(p for p in tiny.PIECES if p.startswith("Ċ"))}


def test_passage_weights_are_a_softmax_of_scaled_scores():
    scores_K = np.asarray([0.9, 0.8, 0.5])
    expected = np.exp(20 * scores_K) / np.exp(20 * scores_K).sum()
    np.testing.assert_allclose(np.exp(passage_logweights(scores_K, 20.0)), expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(passage_logweights(scores_K * 100, 20.0)).sum(), 1.0, rtol=1e-6)  # no overflow


def test_one_passage_is_greedy_decoding_of_the_plain_lm():
    asked = questions(k=1)
    lengths = set()
    for question, sequence, token in zip(asked, ensemble().generate(asked), ensemble().generate(asked, level="token")):
        ids = decoded(question.prompts[0])
        lengths.add(len(ids))
        assert sequence.text == token.text == text_of(ids)
        assert sequence.own_texts == (sequence.text,)
        np.testing.assert_allclose(sequence.logprob, answer_logprob(question.prompts[0], ids), rtol=1e-4)
        assert sequence.logprob == sequence.own_logprobs[0]
    assert len(lengths) > 1  # some answers end by themselves


def test_identical_passages_equal_one():
    one = questions(k=1)
    three = [
        dataclasses.replace(question, prompts=question.prompts * 3, logw_K=np.log([0.5, 0.3, 0.2]).astype(np.float32)) for question in one
    ]
    for level in ("token", "sequence"):
        for single, same in zip(ensemble().generate(one, level=level), ensemble().generate(three, level=level)):
            assert same.text == single.text
            np.testing.assert_allclose(same.logprob, single.logprob, rtol=1e-4)


@pytest.mark.parametrize(("few", "look", "narrow"), [(0, 1, 32), (0, 2, 32), (0, 3, 2), (100, 5, 32), (100, 5, 2)])
def test_sequence_level_is_eq_2_over_the_distinct_answers(few, look, narrow, monkeypatch):
    """Whether first tokens are looked at first or whole answers are read at once, in one row for a question or in several."""
    monkeypatch.setattr(pruning, "FEW", few)
    monkeypatch.setattr(pruning, "LOOK", look)
    monkeypatch.setattr(ensembles, "NARROW", narrow)
    asked = questions()
    several = 0
    for question, answer in zip(asked, ensemble().generate(asked)):
        expected = by_eq_2(question)
        several += len(expected) > 1
        assert answer.text == max(expected, key=expected.get)
        np.testing.assert_allclose(answer.logprob, expected[answer.text], rtol=1e-4)
        own = [decoded(prompt) for prompt in question.prompts]
        assert list(answer.own_texts) == [text_of(ids) for ids in own]
        np.testing.assert_allclose(answer.own_logprobs, [answer_logprob(p, ids) for p, ids in zip(question.prompts, own)], rtol=1e-4)
    assert several > len(asked) / 2


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_all_weight_on_one_passage_gives_its_answer(level):
    asked = questions()
    for k in range(3):
        one_hot = np.where(np.arange(3) == k, 0.0, -1e9).astype(np.float32)
        chosen = ensemble().generate([dataclasses.replace(question, logw_K=one_hot) for question in asked], level=level)
        for question, answer in zip(asked, chosen):
            prompt = question.prompts[k]
            if level == "token":
                assert answer.text == text_of(decoded(prompt))
            else:  # the prompt may find another's answer likelier than its own, which is greedy
                own = [decoded(other) for other in question.prompts]
                best = max(own, key=lambda ids: answer_logprob(prompt, ids))  # noqa: B023
                assert answer.text == text_of(best)
                np.testing.assert_allclose(answer.logprob, answer_logprob(prompt, best), rtol=1e-4)


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_answers_do_not_depend_on_batching_or_order(level):
    asked = questions()
    together = ensemble(batch_tokens=1200).generate(asked, level=level)
    alone = ensemble(batch_tokens=1).generate(asked[::-1], level=level)[::-1]
    for a, b in zip(together, alone):
        assert (a.text, a.own_texts) == (b.text, b.own_texts)
        np.testing.assert_allclose(a.logprob, b.logprob, rtol=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 600])
def test_a_row_that_has_ended_is_taken_by_the_next_prompt(batch_tokens, monkeypatch):
    """Answers are those of one large batch, whoever decoded beside whom, in fewer steps than if the batches took turns."""
    asked = questions() * 3
    found, steps = ensemble(batch_tokens), []
    go = decode.go

    def counted(graphdef, params, rows, *arguments):
        before = np.asarray(rows.taken_BxR)
        rows = go(graphdef, params, rows, *arguments)
        steps.append(int((np.asarray(rows.taken_BxR) - before).max()))
        return rows

    monkeypatch.setattr(decode, "go", counted)
    together = ensemble(100_000).generate(asked)
    steps.clear()
    apart = found.generate(asked)
    for one, other in zip(together, apart):
        assert (one.text, one.own_texts) == (other.text, other.own_texts)
        np.testing.assert_allclose((one.logprob, *one.own_logprobs), (other.logprob, *other.own_logprobs), rtol=1e-4)
    batches = [numbers for numbers, _ in found._batches(asked)]
    in_turns = [max(len(decoded(prompt)) for number in numbers for prompt in asked[number].prompts) for numbers in batches]
    assert len(batches) > 3
    assert sum(steps) < sum(in_turns) if batch_tokens == 1 else sum(steps) <= sum(in_turns)  # few batches of one shape there


def test_padding_and_shapes_are_told():
    asked, asking = questions(), ensemble()
    assert asking.facts() == {"padding": 1.0, "shapes": 0}
    asking.generate(asked)
    assert asking.read == sum(len(ids) for question in asked for ids in question.prompts) < asking.computed
    first = asking.facts()
    assert first["padding"] == round(1 - asking.read / asking.computed, 4) and first["shapes"] >= 2
    asking.generate(asked)
    assert asking.facts() == first


def test_what_is_read_at_once_fills_a_line_and_no_more():
    rng = np.random.default_rng(0)
    lengths_NxK = rng.integers(20, 60, (60, 4))
    asking, logw_K = ensemble(batch_tokens=4 * 300), np.zeros(4, np.float32)
    asked = [Prompted(f"q{n}", tuple([1] * length for length in lengths_K), logw_K) for n, lengths_K in enumerate(lengths_NxK)]
    found = list(asking._batches(asked))
    assert sorted(n for rows, _ in found for n in rows) == list(range(60))
    for rows, (tokens_BxKxT, lengths_BxK, _) in found:
        assert len(rows) <= len(tokens_BxKxT) and lengths_BxK.sum() <= 1024  # the longest line of no more than 1,200 tokens
        np.testing.assert_array_equal(lengths_BxK[: len(rows)], lengths_NxK[rows])
        assert (lengths_BxK[len(rows) :] == 1).all()
    assert np.mean([lengths_NxK[rows].sum() for rows, _ in found[:-1]]) > 0.8 * 1024


def test_an_unknown_level_is_an_error():
    with pytest.raises(InputError, match="'word'"):
        ensemble().generate([], level="word")


# -- choices ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [False, True])
def test_choices_are_scored_by_eq_2(ends):
    asked = questions()
    make = tiny.maker()
    listed = [[make.target_ids(f" {word}") for word in tiny.WORDS[: 2 + i % 3]] for i in range(len(asked))]
    for question, choices, logp_C in zip(asked, listed, ensemble().choose(asked, listed, ends=ends)):
        assert len(logp_C) == len(choices)
        for ids, found in zip(choices, logp_C):
            expected = mixed_logprob(question, lambda prompt: answer_logprob(prompt, ids, ends))  # noqa: B023
            np.testing.assert_allclose(found, expected, rtol=1e-4)


# -- evaluation ------------------------------------------------------------------------------------------------------------------


def test_evaluation_asks_with_the_first_k_passages_or_none():
    examples = [member.example for member in MEMBERS]
    answers, _ = answer_all("two", ensemble(), examples, MEMBERS, EvaluateOptions(k=2, score_scale=2.0))
    assert [answer.text for answer in answers] == [answer.text for answer in ensemble().generate(questions(k=2))]
    closed, _ = answer_all("closed", ensemble(), examples, None, EvaluateOptions(k=2))
    prompts = [tiny.maker().prompt_ids(example.prompt, None) for example in examples]
    assert [answer.text for answer in closed] == [text_of(decoded(prompt)) for prompt in prompts]
    with pytest.raises(InputError, match="evaluate.k is 4"):
        answer_all("four", ensemble(), examples, MEMBERS, EvaluateOptions(k=4))
