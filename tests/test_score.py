"""log p_LM(y | c∘x): the same whatever it is batched with, stored by id, and not made twice."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from radit_jax import artifacts
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.padding import bucket
from radit_jax.errors import InputError
from radit_jax.inference import score
from radit_jax.inference.score import Scorer, read_scores, score_retrieval, together
from radit_jax.types import Instance


class Kept(list):
    """A retrieval in memory."""

    rows_NxK = property(lambda self: np.stack([member.rows_K for member in self]))
    examples = property(lambda self: [member.example for member in self])


MEMBERS = Kept(tiny.retrieved(5, 2))


def instances() -> list[Instance]:
    """Prompts of 2 to 60 tokens and targets of 1 to 12."""
    rng = np.random.default_rng(0)
    shapes = [(2, 1), (60, 12), (17, 3), (16, 8), (33, 9), (5, 1), (50, 2)]
    return [
        Instance(f"i{n}", rng.integers(2, len(tiny.PIECES), start + out).astype(np.int32), start) for n, (start, out) in enumerate(shapes)
    ]


class Counting(Scorer):
    """Counts what was scored."""

    scored = 0

    def __call__(self, instances, *rest):
        self.scored += len(instances)
        return super().__call__(instances, *rest)


def test_scores_are_full_forward_sums_in_the_order_given():
    given = instances()
    expected = [tiny.target_logprob(instance) for instance in given]
    scorer = Scorer(tiny.lm(), batch_tokens=150)
    np.testing.assert_allclose(scorer(given), expected, rtol=1e-4)
    np.testing.assert_allclose(scorer(given[::-1]), expected[::-1], rtol=1e-4)
    read = 2 * sum(len(instance.tokens_T) - 1 for instance in given)
    assert scorer.tokens == scorer.read == read < scorer.computed


def test_scores_do_not_depend_on_the_batch_or_its_padding():
    given = instances()
    alone = Scorer(tiny.lm(), batch_tokens=1)
    together = Scorer(tiny.lm(), batch_tokens=700)
    np.testing.assert_allclose(together(given), [alone([instance])[0] for instance in given], rtol=1e-4)


def test_lengths_share_few_compiled_shapes():
    sizes = {bucket(length) for length in range(1, 2049)}
    assert len(sizes) <= 27 and all(bucket(length) >= length for length in range(1, 2049))
    assert max(bucket(length) / length for length in range(17, 2049)) <= 1.5
    scorer = Scorer(tiny.lm(), batch_tokens=700)
    scorer(instances())
    before = set(scorer.shapes)
    scorer(instances()[::-1])
    assert scorer.shapes == before


# -- stored scores ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path, monkeypatch):
    monkeypatch.setattr(score, "SHARD", 2)
    facts = score_retrieval(Scorer(tiny.lm(), batch_tokens=300), tiny.maker(), MEMBERS, tmp_path)
    return tmp_path, facts


def test_every_pair_is_scored_and_stands_beside_its_ids(stored):
    folder, facts = stored
    assert sorted(path.name for path in folder.glob("logp-*")) == [f"logp-{n:05d}.npy" for n in range(3)]
    found, make = read_scores(folder), tiny.maker()
    assert set(found) == {member.example.id for member in MEMBERS} and facts["questions"] == len(found) == 5
    for member in MEMBERS:
        passage_ids, logp_K, length = found[member.example.id]
        assert passage_ids == [passage.id for passage in member.passages]
        assert length == len(make.target_ids(member.example.target))
        example = member.example
        made = [make.instance(example.id, example.prompt, passage.content, example.target, close=False) for passage in member.passages]
        np.testing.assert_allclose(logp_K, [tiny.target_logprob(instance) for instance in made], rtol=1e-4)


def test_only_the_missing_shard_is_scored_again(stored):
    folder, _ = stored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "logp-00001.npy").unlink()
    (folder / "logp-00001.npy.tmp").write_bytes(b"torn")
    scorer = Counting(tiny.lm(), batch_tokens=300)
    score_retrieval(scorer, tiny.maker(), MEMBERS, folder)
    assert scorer.scored == 2 * 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all(name.endswith(".npy") for name in before)


def test_a_shard_of_other_questions_is_scored_again(stored):
    """An earlier version may have left shards in another order."""
    folder, _ = stored
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in ("example_ids", "passage_ids", "target_lengths", "logp"):
        swapped = [folder / f"{name}-{n:05d}.npy" for n in (0, 1)]
        for path, content in zip(swapped, [path.read_bytes() for path in swapped[::-1]]):
            path.write_bytes(content)
    scorer = Counting(tiny.lm(), batch_tokens=300)
    score_retrieval(scorer, tiny.maker(), MEMBERS, folder)
    assert scorer.scored == 2 * 2 * 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_kill_while_a_shard_of_other_questions_is_replaced_leaves_no_scores_beside_wrong_ids(stored, monkeypatch):
    folder, _ = stored
    whole = read_scores(folder)
    for name in ("example_ids", "passage_ids", "target_lengths", "logp"):
        (folder / f"{name}-00000.npy").write_bytes((folder / f"{name}-00001.npy").read_bytes())

    def killed(path, array):
        if path.name.startswith("logp"):
            raise KeyboardInterrupt
        artifacts.save_array(path, array)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(score, "artifacts", SimpleNamespace(save_array=killed))
        score_retrieval(Scorer(tiny.lm(), batch_tokens=300), tiny.maker(), MEMBERS, folder)
    score_retrieval(Scorer(tiny.lm(), batch_tokens=300), tiny.maker(), MEMBERS, folder)
    for id, (passage_ids, logp_K, length) in read_scores(folder).items():
        assert (passage_ids, length) == (whole[id][0], whole[id][2])
        np.testing.assert_allclose(logp_K, whole[id][1], rtol=1e-5)


def test_questions_with_passages_in_common_are_scored_together():
    """Four subjects with passages of their own, asked about in turn: each group is of one subject."""
    rows_NxK = np.asarray([[10 * (n % 4) + (n + j) % 5 for j in range(3)] for n in range(20)])
    groups = together(rows_NxK, 5)
    assert sorted(sum(groups, [])) == list(range(20)) and groups == together(rows_NxK, 5)
    assert [{n % 4 for n in group} for group in groups] == [{0}, {1}, {2}, {3}]


def test_questions_with_no_passage_in_common_stay_in_their_order():
    assert together(np.arange(14).reshape(7, 2), 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert together(np.zeros((0, 2), np.int64), 3) == []


def test_a_folder_without_scores_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no LM scores"):
        read_scores(tmp_path)


# -- rows that are too long ------------------------------------------------------------------------------------------------------


def test_a_passage_is_cut_from_its_end_until_the_row_fits():
    member = MEMBERS[0]
    whole = tiny.maker(400).instance("q", member.example.prompt, "moss and tern " * 12, member.example.target, close=False)
    make = InstanceMaker(tiny.tokenizer(), 80)
    cut = make.instance("q", member.example.prompt, "moss and tern " * 12, member.example.target, close=False)
    assert len(cut.tokens_T) <= 80 < len(whole.tokens_T)
    outputs = len(cut.tokens_T) - cut.target_start
    tail = outputs + len(tiny.tokenizer().encode("\n\n" + member.example.prompt))
    np.testing.assert_array_equal(cut.tokens_T[-tail:], whole.tokens_T[-tail:])
    np.testing.assert_array_equal(cut.tokens_T[:-tail], whole.tokens_T[: len(cut.tokens_T) - tail])
    assert make.truncations.count == 1 and make.truncations.first == ["q"]


def test_a_prompt_that_cannot_fit_is_an_error():
    example = dataclasses.replace(MEMBERS[0].example, prompt="moss " * 30)
    with pytest.raises(InputError, match="q0.*do not fit a row of 40"):
        InstanceMaker(tiny.tokenizer(), 40).instance("q0", example.prompt, "tern", example.target, close=False)
    with pytest.raises(InputError, match="no tokens"):
        tiny.maker().instance("q0", "moss", None, "", close=False)
