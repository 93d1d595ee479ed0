"""Prompts: SPEC section 6 word for word, markers that are random and repeatable, completions that never show y in x."""

from __future__ import annotations

import collections

import pytest

from radit_jax.data.prompts import (
    ANSWER_STARTS,
    EVALUATION_PROMPTS,
    STARTS,
    TRAINING_PROMPTS,
    background_prompt,
    choice_lines,
    completion_example,
    dialogue_turns,
    evaluation_example,
    training_example,
)
from radit_jax.data.questions import Question
from radit_jax.errors import InputError
from radit_jax.types import Passage

QUESTION = Question("q1", "who {wrote} it?", ("Ann", "Bo"), gold_id="d1", context="Ann wrote it.")


class CharacterTokenizer:
    """Three characters a token: cuts fall in the middle of words."""

    def encode(self, text: str) -> list[int]:
        self.pieces = [text[i : i + 3] for i in range(0, len(text), 3)]
        return list(range(len(self.pieces)))

    def decode(self, ids) -> str:
        return "".join(self.pieces[i] for i in ids)


def test_the_background_stands_in_front():
    example = evaluation_example(QUESTION)
    joined = background_prompt("Title. Text.", example.prompt) + example.target
    assert joined == "Background: Title. Text.\n\nQ: who {wrote} it?\nA: Ann"
    assert background_prompt(None, example.prompt) == example.prompt


def test_evaluation_has_fixed_markers_and_every_answer():
    example = evaluation_example(QUESTION)
    assert (example.query, example.answers, example.gold_id) == (QUESTION.question, ("Ann", "Bo"), "d1")
    assert (example.background, example.retrieve) == (None, True)
    question = EVALUATION_PROMPTS["choice"].format(question="which?", choices=choice_lines(["red", "blue"]))
    assert question == "Q: which?\nA. red\nB. blue\nA:"


def test_training_draws_every_pair_of_markers_about_equally_often():
    examples = [training_example(Question(str(n), "who?", ("x",)), seed=0) for n in range(1200)]
    counts = collections.Counter(example.prompt for example in examples)
    assert set(counts) == {f"{start}who?\n{answer_start}" for start in STARTS for answer_start in ANSWER_STARTS}
    assert min(counts.values()) > 150 and max(counts.values()) < 250, counts


def test_markers_depend_on_the_seed_and_the_id_alone():
    questions = [Question(str(n), "who?", ("a", "b", "c")) for n in range(50)]
    examples = [training_example(question, seed=3, any_answer=True) for question in questions]
    assert examples[::-1] == [training_example(question, seed=3, any_answer=True) for question in questions[::-1]]
    assert examples != [training_example(question, seed=4, any_answer=True) for question in questions]
    assert training_example(QUESTION, seed=0).prompt == training_example(QUESTION, seed=0, category="reading_comprehension").prompt


def test_the_first_answer_is_trained_on_unless_any_is_asked_for():
    questions = [Question(str(n), "who?", ("a", "b", "c")) for n in range(60)]
    assert {training_example(question, seed=0).target for question in questions} == {" a"}
    assert {training_example(question, seed=0, any_answer=True).target for question in questions} == {" a", " b", " c"}


@pytest.mark.parametrize("category", sorted(TRAINING_PROMPTS))
def test_prompt_ends_without_a_space_and_target_begins_with_one(category):
    """Trap 9: the boundary is the same string cut at the same place in training and in evaluation."""
    for seed in range(12):
        example = training_example(Question("q", "who?", (" Ann ",)), seed=seed, category=category)
        assert example.prompt == example.prompt.rstrip()
        assert example.target in {"chain_of_thought": (" A: Ann", " Answer: Ann")}.get(category, (" Ann",))  # without reasoning
    assert all(template == template.rstrip() for template in EVALUATION_PROMPTS.values())


@pytest.mark.parametrize(
    ("rule", "background", "retrieve"),
    [("passages", None, True), ("own text", "Ann wrote it.", False), ("own text and passages", "Ann wrote it.", True)],
)
def test_retrieval_rules(rule, background, retrieve):
    for example in (training_example(QUESTION, seed=0, rule=rule), evaluation_example(QUESTION, rule=rule)):
        assert (example.background, example.retrieve) == (background, retrieve)


def test_a_rule_that_needs_a_text_of_its_own_says_so():
    with pytest.raises(InputError, match="'q' has no context"):
        training_example(Question("q", "who?", ("x",)), seed=0, rule="own text")
    with pytest.raises(InputError, match="expected one of 'passages'"):
        evaluation_example(QUESTION, rule="everything")


def test_dialogue_takes_all_turns_as_questions_and_answers():
    assert dialogue_turns(["Hi.", "Hello.", "Who are you?"]) == "Q: Hi. A: Hello. Q: Who are you?"


def _passage(n_words: int) -> Passage:
    return Passage("d#1", "A title", " ".join(f"word{n}" for n in range(n_words)))


@pytest.mark.parametrize("n_words", [20, 40, 200])
def test_completion_takes_the_first_and_the_last_tokens_at_whole_words(n_words):
    passage = _passage(n_words)
    example = completion_example(passage, CharacterTokenizer(), n_prompt=20, n_target=16, exclude=["d#0", "d#1", "d#2"])
    words = passage.content.split()
    n_prompt, n_target = len(example.prompt.split()), len(example.target.split())
    assert example.prompt.split() == words[:n_prompt] and example.target.split() == words[-n_target:]
    assert n_prompt + n_target <= len(words), "y is not in x"
    assert 20 * 3 - 9 < len(example.prompt) <= 20 * 3 and 16 * 3 - 9 < len(example.target) <= 16 * 3
    assert example.query == example.prompt and example.target.startswith(" ")
    assert example.exclude == ("d#1", "d#0", "d#2")


def test_a_short_passage_is_cut_once_or_left_out():
    passage = _passage(10)
    assert completion_example(passage, CharacterTokenizer()) is None
    example = completion_example(passage, CharacterTokenizer(), min_tokens=16)
    assert example.prompt + example.target == passage.content
    assert abs(len(example.prompt) - len(example.target)) < 16
    assert example.exclude == ("d#1",)
    assert completion_example(Passage("d", "", "x" * 600), CharacterTokenizer()) is None, "no space to cut at"
