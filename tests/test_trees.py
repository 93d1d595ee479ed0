"""Token trees: every sequence is found in its row as it was, what is alike stands there once, and nothing sees what is not its own."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from radit_jax.data import trees
from radit_jax.inference.score import Scorer
from radit_jax.models.attention import Segments, Trees
from radit_jax.types import Instance

RNG = np.random.default_rng(0)


def drawn(count: int, vocab: int = len(tiny.PIECES)) -> list[np.ndarray]:
    """Sequences of 5 to 60 tokens, in threes that begin alike; some are said twice, some are the beginning of another."""
    found = []
    while len(found) < count:
        start = RNG.integers(2, vocab, RNG.integers(18, 40))
        start[0] = 2 + len(found)  # threes have nothing in common
        found += [np.concatenate([start, RNG.integers(2, vocab, RNG.integers(1, 20))]) for _ in range(3)]
    found[1], found[4] = found[0].copy(), found[5][:20].copy()
    return [sequence.astype(np.int32) for sequence in found[:count]]


def planted(sequences: list[np.ndarray], row_length: int, *, share: bool = True) -> trees.Forest:
    return trees.plant(sequences, trees.pack(trees.grow(sequences, share=share, most=row_length), row_length), row_length)


@pytest.mark.parametrize("share", [True, False])
def test_every_sequence_stands_in_its_row_as_it_was(share):
    sequences = drawn(30)
    forest = planted(sequences, 128, share=share)
    for sequence, row, path in zip(sequences, forest.row_N, forest.paths):
        assert forest.tokens_RxT[row, path].tolist() == sequence.tolist()
        assert forest.positions_RxT[row, path].tolist() == list(range(len(sequence)))


@pytest.mark.parametrize("share", [True, False])
def test_a_token_sees_its_own_sequence_and_no_other(share):
    sequences = drawn(30)
    forest = planted(sequences, 128, share=share)
    kinds = [Trees(jnp.asarray(forest.ends_RxT))] + ([] if share else [Segments(jnp.asarray(forest.segment_ids_RxT))])
    for rows in kinds:
        visible = np.array(rows.visible_BxTxT()) & (np.arange(128)[:, None] >= np.arange(128)[None])[None]
        for row, path in zip(forest.row_N, forest.paths):
            assert np.flatnonzero(visible[row, path[-1]]).tolist() == path.tolist()
        assert np.array_equal(np.array(rows.real_BxT), forest.ends_RxT > 0)


def test_what_begins_alike_is_there_once():
    sequences = drawn(30)
    shared, apart = planted(sequences, 128), planted(sequences, 128, share=False)
    assert apart.nodes == sum(map(len, sequences))
    assert shared.nodes == len({tuple(sequence[: t + 1]) for sequence in sequences for t in range(len(sequence))})
    assert len(shared.tokens_RxT) < len(apart.tokens_RxT)


def test_rows_are_never_longer_than_asked_for():
    alike = [np.concatenate([np.arange(50), [n]]).astype(np.int32) for n in range(100)]
    forest = planted(alike, 64)
    assert forest.tokens_RxT.shape[1] == 64 and len(forest.tokens_RxT) > 1  # a tree too large is several, each with its beginning
    assert sorted(forest.tokens_RxT[row, path[-1]] for row, path in zip(forest.row_N, forest.paths)) == list(range(100))


def test_shared_tokens_change_no_score():
    sequences = drawn(24)
    given = [Instance(str(n), sequence, len(sequence) - 1 - n % 3) for n, sequence in enumerate(sequences)]
    scorer = Scorer(tiny.lm(), batch_tokens=512)
    np.testing.assert_allclose(scorer(given), [tiny.target_logprob(instance) for instance in given], rtol=1e-4)
    assert scorer.read < scorer.tokens and scorer.facts()["shared"] > 0.3
