"""The likeliest answer is found without reading all of all: against sums over everything."""

from __future__ import annotations

import numpy as np
import pytest

from radit_jax.inference import pruning

K, VOCABULARY, LONGEST = 5, 7, 12


def drawn(seed: int, sure: float):
    """A contest between the answers of K prompts, each a random LM: (answers, own_ids, logw_K, logp of the first n tokens, of the whole).

    With a large `sure` a prompt gives most of its probability to one token.
    """
    rng = np.random.default_rng(seed)
    logw_K = np.log(rng.dirichlet(np.ones(K)))
    own_ids = [rng.integers(VOCABULARY, size=rng.integers(0, LONGEST)).tolist() for _ in range(K)]
    own_ids[-1] = own_ids[0][:3]  # an answer that another begins with
    answers = [list(ids) for ids in dict.fromkeys(map(tuple, own_ids))]
    tables = {}

    def logp(k: int, ids) -> np.ndarray:
        """log p of the first n tokens for n = 0 …, and of all with the end."""
        total = [0.0]
        for n in range(len(ids) + 1):
            key = (k, tuple(ids[:n]))
            if key not in tables:
                tables[key] = np.log(rng.dirichlet(np.full(VOCABULARY + 1, 1 / sure)) + 1e-9)
            total.append(total[-1] + tables[key][ids[n] if n < len(ids) else VOCABULARY])
        return np.asarray(total)

    return answers, own_ids, logw_K, [[logp(k, ids) for ids in answers] for k in range(K)]


@pytest.mark.parametrize("sure", [0.2, 1.0, 10.0])
@pytest.mark.parametrize("few", [0, 24])
def test_the_likeliest_is_found_with_its_probability(sure, few, monkeypatch):
    monkeypatch.setattr(pruning, "FEW", few)
    read = everything = 0
    for seed in range(40):
        answers, own_ids, logw_K, logp = drawn(seed, sure)
        whole_KxC = np.asarray([[of[-1] for of in row] for row in logp])
        own_K = np.asarray([whole_KxC[k, answers.index(ids)] for k, ids in enumerate(own_ids)])
        contest = pruning.Contest(answers, own_ids, own_K, np.asarray([[of[1] for of in row] for row in logp]), logw_K)
        for _ in range(LONGEST):
            if not (asked := contest.to_read()):
                break
            read += sum(asked.values())
            contest.hear(asked, np.asarray([[row[c][count + (count == len(answers[c]))] for c, count in asked.items()] for row in logp]))
        assert not contest.to_read()
        best, found = contest.best()
        expected_C = pruning.mixed(whole_KxC, logw_K)
        assert expected_C[best] >= expected_C.max() - pruning.ROUNDING
        np.testing.assert_allclose(found, expected_C[best], rtol=1e-6)
        everything += sum(map(len, answers))
    assert read < (0.9 if few == 0 else 1.0) * everything


def test_an_answer_that_all_prompts_give_is_read_by_none():
    contest = pruning.Contest([[1, 2]], [[1, 2]] * 2, np.log([0.5, 0.25]), np.log([[0.6], [0.5]]), np.log([0.5, 0.5]))
    assert contest.to_read() == {}
    np.testing.assert_allclose(contest.best()[1], np.log(0.375))


def test_the_answer_without_tokens_needs_no_reading():
    first_KxC = np.log([[0.7, 0.2], [0.6, 0.3]])
    contest = pruning.Contest([[], [3]], [[], [3]], np.log([0.7, 0.1]), first_KxC, np.log([0.5, 0.5]))
    assert 0 not in contest.to_read()
    np.testing.assert_allclose(contest.upper_KxC[:, 0], np.log([0.7, 0.6]))
