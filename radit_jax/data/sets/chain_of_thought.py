"""Chain of thought: the reasoning stands before the answer, in the output (SPEC section 7)."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

from radit_jax.data.card import Card, Record, checked, chosen, distinct
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, field, id_field, text_field

_CALCULATION = re.compile(r"<<.*?>>")  # what GSM8K's calculator is told
_OPTION = re.compile(r"\s*\(?([A-E])\s*\)\s*(.*)", re.DOTALL)  # of AQuA: "A)21"
BOXED = "\\boxed{"


def aqua_rat(record: Record) -> Iterator[Question]:
    """{"question", "options": ["A)21", …], "rationale", "correct"}."""
    found = [_OPTION.fullmatch(str(option)) for option in field(record, "options")]
    if not all(found):
        raise BadRecord(f"options are {record['options']!r:.60}, expected texts as 'A)21'")
    choices = checked({option[1]: option[2].strip() for option in found})
    answer = chosen(choices, field(record, "correct"))
    reasoning = text_field(record, "rationale").strip()
    yield Question("", text_field(record, "question").strip(), (answer,), choices=tuple(choices.values()), reasoning=reasoning)


def ecqa(record: Record) -> Iterator[Question]:
    """A row of ecqa_data.csv: q_no, q_text, q_op1 … q_op5, q_ans, taskB (the explanation in free flow)."""
    choices = checked({str(n): text_field(record, f"q_op{n}").strip() for n in range(1, 6)})
    answer = text_field(record, "q_ans").strip()
    if answer not in choices.values():
        raise BadRecord(f"the answer {answer!r} is none of the choices ({', '.join(choices.values())})")
    question, reasoning = text_field(record, "q_text").strip(), text_field(record, "taskB").strip()
    yield Question(id_field(record, "q_no"), question, (answer,), choices=tuple(choices.values()), reasoning=reasoning)


def gsm8k(record: Record) -> Iterator[Question]:
    """{"question", "answer": "reasoning\\n#### 72"}."""
    reasoning, mark, answer = text_field(record, "answer").rpartition("####")
    if not mark:
        raise BadRecord('field "answer" has no "####" before the result')
    reasoning = _CALCULATION.sub("", reasoning).strip()
    yield Question("", text_field(record, "question").strip(), distinct([answer]), reasoning=reasoning)


def competition_math(record: Record) -> Iterator[Question]:
    """{"problem", "solution" with \\boxed{result}, "level", "type"}."""
    solution = text_field(record, "solution").strip()
    yield Question("", text_field(record, "problem").strip(), distinct([boxed(solution)]), reasoning=solution)


def boxed(solution: str) -> str:
    """What stands in the last \\boxed{…}; a BadRecord where there is none."""
    start = solution.rfind(BOXED)
    depth, end = 1, start + len(BOXED)
    while start >= 0 and end < len(solution) and depth:
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        end += 1
    if start < 0 or depth:
        raise BadRecord('field "solution" has no \\boxed{result}')
    return solution[start + len(BOXED) : end - 1]


def strategyqa(record: Record) -> Iterator[Question]:
    """{"qid", "question", "answer": true or false, "facts": […], …}."""
    answer = field(record, "answer")
    if not isinstance(answer, bool):
        raise BadRecord(f'field "answer" is {answer!r}, expected true or false')
    reasoning = " ".join(" ".join(field(record, "facts")).split())
    question = text_field(record, "question").strip()
    yield Question(id_field(record, "qid"), question, ("yes" if answer else "no",), reasoning=reasoning or None)


_THOUGHT = functools.partial(Card, category="chain_of_thought", in_lm_ft=True)
CARDS = (
    _THOUGHT(
        "aqua_rat",
        "hub:deepmind/aqua_rat#raw",
        aqua_rat,
        size=97_467,
        home="github.com/google-deepmind/AQuA (train.json)",
        evaluation_split="validation",
    ),
    _THOUGHT(
        "ecqa",
        "hub:yangdong/ecqa",
        ecqa,
        size=7_598,
        home="github.com/dair-iitd/ECQA-Dataset (ecqa_data.csv)",
        evaluation_split="validation",
    ),
    _THOUGHT(
        "gsm8k",
        "tfds:gsm8k",
        gsm8k,
        size=7_473,
        home="github.com/openai/grade-school-math (train.jsonl)",
        evaluation_split="test",
    ),
    _THOUGHT(
        "competition_math",
        "hub:hendrycks/competition_math",
        competition_math,
        size=7_500,
        home="github.com/hendrycks/math (MATH.tar, the folder train)",
        evaluation_split="test",
    ),
    _THOUGHT(
        "strategyqa",
        "hub:ChilleD/StrategyQA",
        strategyqa,
        size=2_290,
        home="allenai.org/data/strategyqa (strategyqa_train.json)",
        evaluation_split="test",
    ),
)
