"""Prompts as data (SPEC section 6), and the Examples that are made with them.

Prompt and target are tokenized apart and joined as ids (SPEC section 9, trap 9), so the space between them must belong to one of them,
always the same one: the prompt ends with the bare marker ("A:") and the target begins with the space (" Paris"), in training, scoring
and decoding alike. That is also where byte-level BPE puts the space in running text.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from radit_jax.data.questions import Question
from radit_jax.data.tokenizer import Tokenizer
from radit_jax.errors import InputError
from radit_jax.types import Example, Passage

# Markers of training instances, drawn at random per example; of the answer's, the last space goes to the target.
STARTS = ("Q: ", "Question: ", "")
ANSWER_STARTS = ("A:", "Answer:")

# The prompt of each category, without the background. {start} and {answer_start} are the markers, {history} is what was said before in the
# form of HISTORY; {question} is the question, with its choices one a line below it.
TRAINING_PROMPTS = {
    "dialogue": "{turns} A:",
    "open_qa": "{start}{question}\n{answer_start}",
    "reading_comprehension": "{history}{start}{question}\n{answer_start}",
    "summarization": "Summarize this article:\n{answer_start}",
    "chain_of_thought": "{start}{question}",
}
HISTORY = "{start}{question}\n{answer_start} {answer}\n"
# What the LM is to say, where that is more than the answer.
TRAINING_TARGETS = {"chain_of_thought": "{reasoning} {answer_start} {answer}"}
# Evaluation has fixed markers.
EVALUATION_PROMPTS = {
    "qa": "Q: {question}\nA:",
    "choice": "Q: {question}\n{choices}\nA:",  # choices: one line each, from choice_lines
    "fact_checking": "Is this statement true? {statement}",
    "entity_linking": "{context}\nOutput the Wikipedia page title of the entity mentioned between [START_ENT] and [END_ENT] "
    "in the given text",
    "slot_filling": "{entity} [SEP] {relation}",
}
# Which passages an example is given (SPEC section 3, the retrieval rule of LM-ft).
RETRIEVAL_RULES = ("passages", "own text", "own text and passages")


def background_prompt(background: str | None, prompt: str) -> str:
    """c∘x: the passage in front of the instruction. The only place where the two are joined; without a background, the bare prompt."""
    return prompt if background is None else f"Background: {background}\n\n{prompt}"


def as_target(answer: str) -> str:
    """y as it is tokenized: with the one space that follows the prompt."""
    return f" {answer.strip()}"


def dialogue_turns(turns: Sequence[str]) -> str:
    """All turns so far, the first by the user: "Q: … A: … Q: …"."""
    return " ".join(f"{('Q:', 'A:')[n % 2]} {turn.strip()}" for n, turn in enumerate(turns))


def choice_lines(choices: Sequence[str]) -> str:
    """The choices of a multiple-choice question, lettered, one a line."""
    return "\n".join(f"{chr(ord('A') + n)}. {choice}" for n, choice in enumerate(choices))


def asked(question: Question) -> str:
    """The question as it is read: with its choices, if it has any."""
    return "\n".join(filter(None, [question.question, choice_lines(question.choices)]))


def training_example(
    question: Question, *, seed: int, category: str = "open_qa", rule: str = "passages", any_answer: bool = False
) -> Example:
    """An Example to train on, with random markers and one answer; the same for the same seed and question id.

    any_answer: draw one of the accepted answers instead of taking the first.
    Raises InputError if the rule wants a text of the question's own and it has none.
    """
    start = STARTS[_draw(seed, question.id, "start", len(STARTS))]
    answer_start = ANSWER_STARTS[_draw(seed, question.id, "answer start", len(ANSWER_STARTS))]
    answer = question.answers[_draw(seed, question.id, "answer", len(question.answers)) if any_answer else 0]
    markers = {"start": start, "answer_start": answer_start}
    said = zip(question.history[::2], question.history[1::2])
    parts = {
        **markers,
        "question": asked(question),
        "turns": dialogue_turns([*question.history, question.question]),
        "history": "".join(HISTORY.format(question=q, answer=a, **markers) for q, a in said),
        "reasoning": question.reasoning or "",
        "answer": answer.strip(),
    }
    target = TRAINING_TARGETS.get(category, "{answer}").format(**parts)
    return _example(question, TRAINING_PROMPTS[category].format(**parts), target, rule)


def evaluation_example(question: Question, *, rule: str = "passages") -> Example:
    """An Example to be asked, with the fixed markers and every accepted answer; its target is the first of them."""
    return _example(question, EVALUATION_PROMPTS["qa"].format(question=asked(question)), question.answers[0], rule)


def _example(question: Question, prompt: str, target: str, rule: str) -> Example:
    if rule not in RETRIEVAL_RULES:
        raise InputError(f"retrieval rule {rule!r}, expected one of {', '.join(map(repr, RETRIEVAL_RULES))}")
    if rule != "passages" and question.context is None:
        raise InputError(f"question {question.id!r} has no context, which the retrieval rule {rule!r} needs")
    return Example(
        id=question.id,
        query="\n".join([*question.history, asked(question)]),
        prompt=prompt,
        target=as_target(target),
        answers=question.answers,
        background=None if rule == "passages" else question.context,
        retrieve=rule != "own text",
        gold_id=question.gold_id,
        choices=question.choices,
    )


def _draw(seed: int, id: str, what: str, n: int) -> int:
    """A number below n that depends on nothing but its arguments: not on the order of examples, the process or the Python version."""
    digest = hashlib.blake2b(f"{seed}\0{what}\0{id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % n


def completion_example(
    passage: Passage,
    tokenizer: Tokenizer,
    *,
    n_prompt: int = 50,
    n_target: int = 50,
    min_tokens: int | None = None,
    exclude: Sequence[str] = (),
) -> Example | None:
    """Corpus completion (SPEC section 4): x the first `n_prompt` tokens of the passage, y its last `n_target`, without markers.

    Cuts are moved to the next space inside (x and y are at most that long), so that both are plain text. A passage of fewer than
    n_prompt + n_target tokens is cut once, in the same proportion, and y is all that follows x; below `min_tokens` (by default that
    sum) there is no example: None.
    exclude: passage ids that may not be retrieved for it because they hold y (all pieces of the source document); the passage itself
    is always among them.
    """
    text = " ".join(passage.content.split())
    tokens = tokenizer.encode(text)
    if len(tokens) < (n_prompt + n_target if min_tokens is None else min_tokens):
        return None
    if len(tokens) >= n_prompt + n_target:
        prompt_end = _space_before(text, len(tokenizer.decode(tokens[:n_prompt])))
        target_start = _space_after(text, len(tokenizer.decode(tokens[: len(tokens) - n_target])))
    else:
        cut = round(len(tokens) * n_prompt / (n_prompt + n_target))
        prompt_end = target_start = _space_before(text, len(tokenizer.decode(tokens[:cut])))
    if not 0 < prompt_end <= target_start < len(text):
        return None  # a text without spaces where the cuts would be
    example = Example(f"completion-{passage.id}", text[:prompt_end], text[:prompt_end], as_target(text[target_start:]))
    return dataclasses.replace(example, exclude=tuple(dict.fromkeys([passage.id, *exclude])))


def _space_before(text: str, at: int) -> int:
    """The last space at or before `at`, or -1."""
    return text.rfind(" ", 0, at + 1)


def _space_after(text: str, at: int) -> int:
    """The first space at or after `at`, or the end of the text."""
    found = text.find(" ", at)
    return found if found >= 0 else len(text)
