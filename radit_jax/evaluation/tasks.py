"""What is asked (SPEC sections 5, 6 and 8): one card per evaluation task, from a question to the prompt, the choices and the measure."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Sequence

from radit_jax.data.card import Card
from radit_jax.data.prompts import EVALUATION_PROMPTS, TRAINING_PROMPTS, as_target, asked, choice_lines, dialogue_turns, evaluation_example
from radit_jax.data.questions import Question
from radit_jax.data.training_sets import CARDS, card_for
from radit_jax.errors import InputError
from radit_jax.types import Example

SCORES = ("nll", "nll_char", "nll_token", "nll_compl")  # how choices compare, from log p(choice | prompt); SPEC section 5
NO_QUESTION = "Answer:"  # the prompt of nll_compl's denominator
AROUND = 100  # words of an entity's text on each side of the mention
_MENTION = re.compile(r"\[START_ENT\]\s*(.*?)\s*\[END_ENT\]", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question of a task: what is read and, where there are choices, the (prompt, target) of each and which is right."""

    example: Example
    choices: tuple[tuple[str, str], ...] = ()
    right: int = -1


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to know about one task."""

    name: str
    card: Card
    ask: Callable[[Question], Asked]
    metric: str  # the one the paper reports: em, f1, acc or rouge_l
    score: str | None = None  # of SCORES; None: the answer is free text
    retrieve: bool = True
    max_new_tokens: int = 16

    @property
    def is_choice(self) -> bool:
        return self.score is not None


# -- how questions are put --------------------------------------------------------------------------------------------------------------


def _example(question: Question, text: str, *, query: str | None = None, target: str | None = None) -> Example:
    prompt = EVALUATION_PROMPTS["qa"].format(question=text)
    target = as_target(question.answers[0] if target is None else target)
    query = asked(question) if query is None else query
    return Example(question.id, query, prompt, target, question.answers, gold_id=question.gold_id)


def _place(question: Question, among: Sequence[str]) -> int:
    """Where the right answer stands among the choices."""
    if question.answers[0] not in among:
        raise InputError(f"question {question.id!r}: the answer is {question.answers[0]!r}, expected one of {', '.join(among)}")
    return among.index(question.answers[0])


def _free(question: Question) -> Asked:
    return Asked(_example(question, asked(question)))


def _entity(question: Question) -> Asked:
    """AIDA: the query is the mention; its text is cut around it."""
    found = _MENTION.search(question.question)
    if found is None:
        return Asked(_example(question, EVALUATION_PROMPTS["entity_linking"].format(context=question.question)))
    before, after = question.question[: found.start()].split()[-AROUND:], question.question[found.end() :].split()[:AROUND]
    context = " ".join([*before, "[START_ENT]", found[1], "[END_ENT]", *after])
    return Asked(_example(question, EVALUATION_PROMPTS["entity_linking"].format(context=context), query=found[1]))


def _dialogue(question: Question) -> Asked:
    turns = [*question.history, question.question]
    example = _example(question, "", query=" ".join(turns))
    return Asked(dataclasses.replace(example, prompt=TRAINING_PROMPTS["dialogue"].format(turns=dialogue_turns(turns))))


def _fever(question: Question) -> Asked:
    """SUPPORTS is yes, REFUTES no."""
    right = _place(question, ("SUPPORTS", "REFUTES"))
    text = EVALUATION_PROMPTS["fact_checking"].format(statement=question.question)
    example = _example(question, text, query=question.question, target=("Yes", "No")[right])
    return Asked(example, tuple((example.prompt, as_target(word)) for word in ("Yes", "No")), right)


def _lettered(question: Question) -> Asked:
    """The choices are read, and a letter answers."""
    right = _place(question, question.choices)
    prompt = EVALUATION_PROMPTS["choice"].format(question=question.question, choices=choice_lines(question.choices))
    letters = [chr(ord("A") + n) for n in range(len(question.choices))]
    example = dataclasses.replace(_example(question, "", target=letters[right]), prompt=prompt)
    return Asked(example, tuple((prompt, as_target(letter)) for letter in letters), right)


def _continued(question: Question, template: str) -> Asked:
    """The choices are not read: each is a way to go on (the prompts of lm-evaluation-harness, which the field's figures are made with)."""
    prompt = template.format(question=question.question, context=question.context)
    right = _place(question, question.choices)
    example = Example(question.id, question.question, prompt, as_target(question.answers[0]), question.answers)
    return Asked(example, tuple((prompt, as_target(choice)) for choice in question.choices), right)


def _gap(question: Question) -> Asked:
    """WinoGrande: each option in the gap is a prompt, and what follows the gap is scored."""
    before, after = question.question.split("_")
    right = _place(question, question.choices)
    choices = tuple((before + option, as_target(after)) for option in question.choices)
    return Asked(Example(question.id, question.question, *choices[right], question.answers), choices, right)


def _own(question: Question, rule: str) -> Asked:
    """With letters where it has choices, and with the text it is asked about, if the rule says so."""
    if question.choices:
        return _lettered(question)
    return Asked(evaluation_example(question, rule=rule))


def _yes_or_no(question: Question, rule: str, words: Sequence[str] = ("yes", "no")) -> Asked:
    example = evaluation_example(question, rule=rule)
    return Asked(example, tuple((example.prompt, as_target(word)) for word in words), _place(question, words))


def _choices(name: str, template: str, score: str = "nll_char") -> Task:
    return Task(name, CARDS[name], functools.partial(_continued, template=template), "acc", score, retrieve=False)


_ALL = (
    Task("mmlu", CARDS["mmlu"], _lettered, "acc", "nll"),
    Task("nq", CARDS["nq"], _free, "em"),
    Task("tqa", CARDS["tqa"], _free, "em"),
    Task("eli5", CARDS["eli5"], _free, "rouge_l", max_new_tokens=256),
    Task("hotpotqa", CARDS["hotpotqa"], _free, "em"),
    Task("fever", CARDS["fever"], _fever, "acc", "nll"),
    Task("aida", CARDS["aida"], _entity, "em"),
    Task("zsre", CARDS["zsre"], _free, "em"),
    Task("trex", CARDS["trex"], _free, "em"),
    Task("wow", CARDS["wow"], _dialogue, "f1", max_new_tokens=64),
    Task("popqa", CARDS["popqa"], _free, "em"),
    # Scored as LLaMA's authors did: by character, BoolQ and OBQA against the answer without a question.
    _choices("boolq", "{context}\nQuestion: {question}?\nAnswer:", "nll_compl"),
    _choices("piqa", "Question: {question}\nAnswer:"),
    _choices("siqa", "Q: {context} {question}\nA:"),
    _choices("hellaswag", "{question}"),
    Task("winogrande", CARDS["winogrande"], _gap, "acc", "nll", retrieve=False),
    _choices("arc_easy", "Question: {question}\nAnswer:"),
    _choices("arc_challenge", "Question: {question}\nAnswer:"),
    _choices("obqa", "{question}", "nll_compl"),
    # Not the paper's: two of its training sets, on questions that were not trained on.
    Task("strategyqa", CARDS["strategyqa"], functools.partial(_yes_or_no, rule="passages"), "acc", "nll"),
    Task(
        "pubmed_qa",
        CARDS["pubmed_qa"],
        functools.partial(_yes_or_no, rule="own text", words=("yes", "no", "maybe")),
        "acc",
        "nll",
        retrieve=False,
    ),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_for(source: str) -> Task:
    """The task `NAME`, `NAME:PATH` (its files lie at PATH), or a set: a card's, or a jsonl file of the user's own.

    A set with choices is asked with letters, any other as an open question. InputError names near misses.
    """
    name, _, path = source.partition(":")
    if name in TASKS:
        return dataclasses.replace(TASKS[name], card=card_for(source)) if path else TASKS[name]
    try:
        card = card_for(source)
    except InputError:
        near = difflib.get_close_matches(name, [*TASKS, *CARDS], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(TASKS)}, a set or a jsonl file"
        raise InputError(f"no task {source!r}; {hint}") from None
    return Task(card.name, card, functools.partial(_own, rule=card.retrieval), "em", retrieve=card.retrieval == "passages")


def ask(task: Task, questions: Sequence[Question]) -> tuple[Task, list[Asked]]:
    """The questions as they are put. A set of the user's own, or of training, is a choice task where all its questions have choices.

    InputError for a set where some have choices and some do not.
    """
    made = [task.ask(question) for question in questions]
    with_choices = sum(bool(one.choices) for one in made)
    if 0 < with_choices < len(made):
        raise InputError(f"{task.name}: {with_choices} of {len(made)} questions have choices, expected all or none")
    if with_choices and task.score is None:
        task = dataclasses.replace(task, score="nll", metric="acc")
    return task, made
