"""Mixtures: the paper's shares, drawn exactly, by a stream that a seed repeats and a state resumes."""

from __future__ import annotations

import collections
import itertools

import grain
import numpy as np
import pytest
import tiny

from radit_jax.data import mixture
from radit_jax.errors import InputError
from radit_jax.training import batches
from radit_jax.types import Passage

SIZES = {"oasst1": 31_598, "squad": 130_319, "quarel": 1_941, "gsm8k": 7_473}
DRAWS = 100_000


class _Named:
    """A large set of which every member is its name: shuffling small sets costs Grain thirty times as much."""

    def __init__(self, name: str):
        self.name = name

    def __len__(self) -> int:
        return 65_536

    def __getitem__(self, n: int) -> str:
        return self.name


def test_the_papers_shares():
    found = mixture.lm_ft_shares(SIZES, ["oasst1"], cap=7_500, dialogue=0.05, text=0.10)
    rest = 7_500 + 1_941 + 7_473
    assert found == pytest.approx(
        {"oasst1": 0.05, "squad": 0.85 * 7_500 / rest, "quarel": 0.85 * 1_941 / rest, "gsm8k": 0.85 * 7_473 / rest, "text": 0.10}
    )
    assert sum(found.values()) == pytest.approx(1.0)


def test_dialogues_share_theirs_and_alone_they_take_the_rest():
    two = mixture.lm_ft_shares({"a": 30, "b": 10, "qa": 7}, ["a", "b"], cap=20, dialogue=0.3, text=0.0)
    assert two == pytest.approx({"a": 0.2, "b": 0.1, "qa": 0.7})
    assert mixture.lm_ft_shares({"a": 30}, ["a"], cap=20, dialogue=0.05, text=0.1) == pytest.approx({"a": 0.9, "text": 0.1})
    assert mixture.lm_ft_shares({"qa": 30}, [], cap=20, dialogue=0.05, text=0.0) == {"qa": 1.0}


@pytest.mark.parametrize(
    ("names", "shares"),
    [(list(SIZES) + ["text"], None), (["train", "completion"], {"train": 0.05, "completion": 0.95})],
    ids=["LM-ft", "R-ft 95/5"],
)
def test_a_hundred_thousand_draws_have_the_shares(names, shares):
    shares = shares or mixture.lm_ft_shares(SIZES, ["oasst1"], cap=7_500, dialogue=0.05, text=0.10)
    sets = [grain.MapDataset.source(_Named(name)) for name in names]
    mixed = mixture.mix(sets, [shares[name] for name in names], seed=3)
    counts = collections.Counter(mixed[n] for n in range(DRAWS))
    for name in names:
        assert abs(counts[name] / DRAWS - shares[name]) < 1e-3, (name, counts)


def test_each_set_is_shuffled_anew_in_every_epoch_and_the_seed_repeats_it():
    sets = [grain.MapDataset.source([(name, n) for n in range(20)]) for name in "ab"]

    def drawn(seed):
        mixed = mixture.mix(sets, [0.5, 0.5], seed=seed)
        return [mixed[n] for n in range(80)]

    once = [n for name, n in drawn(0) if name == "a"]
    assert sorted(once[:20]) == sorted(once[20:40]) == list(range(20))
    assert once[:20] != once[20:40] and once[:20] != list(range(20))
    assert drawn(0) == drawn(0) != drawn(1)


# -- instances --------------------------------------------------------------------------------------------------------------------------

TEXTS = [Passage(f"t{n}", "", " ".join(tiny.WORDS[n:] * (1 + 4 * (n == 2)))) for n in range(3)]


def mixed() -> batches.MixedInstances:
    text = batches.TextInstances(TEXTS, tiny.maker(), output_slots=tiny.OUTPUT_SLOTS)
    return batches.MixedInstances({"train": tiny.lm_source(), "text": text}, {"train": 0.75, "text": 0.25})


def test_plain_text_is_one_output_from_its_first_token_cut_where_the_row_ends():
    text = batches.TextInstances(TEXTS, tiny.maker(), output_slots=tiny.OUTPUT_SLOTS)
    for n, passage in enumerate(TEXTS):
        ids, features = tiny.tokenizer().encode(passage.content), text[n]
        room = tiny.OUTPUT_SLOTS - 1
        whole = len(ids) <= room
        expected = [*ids[:room], *([tiny.tokenizer().eos_id] if whole else [])]
        assert features["labels"].tolist() == expected and features["slots"].tolist() == list(range(len(expected)))
        assert features["tokens"].tolist() == [tiny.tokenizer().bos_id, *expected]
    assert len(tiny.tokenizer().encode(TEXTS[2].content)) > room


def test_sources_are_numbered_through_and_named():
    source, alone = mixed(), tiny.lm_source()
    assert len(source) == len(alone) + len(TEXTS)
    for n in range(len(source)):
        assert source[n]["index"].tolist() == [n + 1]
    np.testing.assert_array_equal(source[3]["tokens"], alone[3]["tokens"])
    assert source.describe(np.asarray([0, len(alone) + 1])) == f"{alone.describe(np.asarray([0]))}, t1"


def test_packed_batches_hold_both_and_go_on_from_their_state():
    def data():
        return batches.lm_batches(mixed(), rows=2, accumulate=1, seed=0)

    straight = list(itertools.islice(data(), 8))
    numbers = np.concatenate([numbers for _, numbers in straight])
    assert (numbers >= len(tiny.lm_source())).any() and (numbers < len(tiny.lm_source())).any()
    first, resumed = data(), data()
    for _ in range(3):
        next(first)
    resumed.set_state(first.get_state())
    for (batch, expected_numbers), (again, again_numbers) in zip(straight[3:], resumed):
        np.testing.assert_array_equal(expected_numbers, again_numbers)
        np.testing.assert_array_equal(batch.tokens_BxT, again.tokens_BxT)


def test_a_source_without_instances_is_named():
    with pytest.raises(InputError, match="no training examples in text"):
        batches.MixedInstances({"text": batches.TextInstances([], tiny.maker(), output_slots=8)}, {"text": 1.0})
