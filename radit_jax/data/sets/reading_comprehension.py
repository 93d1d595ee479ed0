"""Reading comprehension: questions with the text they are asked about (SPEC section 7).

Where the question makes sense without its text it gets passages too ("own text and passages"), else the text alone (SPEC section 3).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from radit_jax.data.card import UNANSWERABLE, Card, Record, checked, distinct
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, field, id_field, text_field

_LETTERED = re.compile(r"\(([A-Z])\)\s*(.*?)\s*(?=\([A-Z]\)|$)", re.DOTALL)  # of QuaRel: "… (A) more (B) less"


def coqa(record: Record) -> Iterator[Question]:
    """{"id", "story", "questions": [{"input_text"}], "answers": [{"input_text"}]}; tfds has lists of texts. A question for every turn."""
    story = text_field(record, "story").strip()
    answers = field(record, "answers")
    answers = field(answers, "input_text") if isinstance(answers, Mapping) else [text_field(answer, "input_text") for answer in answers]
    asked = [turn if isinstance(turn, str) else text_field(turn, "input_text") for turn in field(record, "questions")]
    if len(asked) != len(answers):
        raise BadRecord(f"{len(asked)} questions and {len(answers)} answers")
    turns: tuple[str, ...] = ()
    for n, (question, answer) in enumerate(zip(asked, answers)):
        id = f"{record['id']}-{n}" if "id" in record else ""
        yield Question(id, question.strip(), distinct([answer]), context=story, history=turns)
        turns += (question.strip(), answer.strip())


def drop(record: Record) -> Iterator[Question]:
    """{"passage", "qa_pairs": [{"query_id", "question", "answer": {"number", "date", "spans"}}]}; flat in tfds and on the Hub."""
    passage = text_field(record, "passage").strip()
    for pair in record.get("qa_pairs") or [record]:
        if "answers_spans" in pair:  # the Hub
            answer = ", ".join(field(pair, "answers_spans", "spans"))
        else:
            answer = field(pair, "answer")
            answer = answer if isinstance(answer, str) else _of_drop(answer)
        yield Question(id_field(pair, "query_id"), text_field(pair, "question").strip(), distinct([answer]), context=passage)


def _of_drop(answer: Any) -> str:
    """A number, several spans, or a date."""
    if number := str(field(answer, "number")).strip():
        return number
    if spans := field(answer, "spans"):
        return ", ".join(spans)
    return " ".join(part for part in (field(answer, "date", unit) for unit in ("day", "month", "year")) if part)


def narrativeqa(record: Record) -> Iterator[Question]:
    """{"document": {"summary": {"text"}}, "question": {"text"}, "answers": [{"text"}]}, or a row of qaps.csv with its summary."""
    if "answer1" in record:
        answers, summary = [text_field(record, "answer1"), text_field(record, "answer2")], text_field(record, "summary")
        yield Question("", text_field(record, "question").strip(), distinct(answers), context=summary.strip())
        return
    answers = field(record, "answers")
    answers = answers["text"] if isinstance(answers, Mapping) else [text_field(answer, "text") for answer in answers]
    summary = text_field(record, "document", "summary", "text").strip()
    yield Question("", text_field(record, "question", "text").strip(), distinct(answers), context=summary)


def with_summaries(rows: Iterable[Record]) -> Iterator[Record]:
    """Rows of qaps.csv with the summary of their document (of summaries.csv); other records as they are."""
    asked, summaries = [], {}
    for row in rows:
        if "answer1" in row:
            asked.append(row)
        elif "summary" in row and "document_id" in row:
            summaries[row["document_id"]] = row["summary"]
        else:
            yield row
    yield from ({**row, **({"summary": summaries[row["document_id"]]} if row["document_id"] in summaries else {})} for row in asked)


def newsqa(record: Record) -> Iterator[Question]:
    """{"storyId", "text", "questions": [{"q", "consensus": {"s", "e"}}]}; MRQA: {"context", "qas": [{"qid", "question", "answers"}]}."""
    if "header" in record:  # the first line of MRQA's files
        return
    if "qas" in record:
        for asked in field(record, "qas"):
            yield Question(
                id_field(asked, "qid"), text_field(asked, "question").strip(), distinct(field(asked, "answers")), context=record["context"]
            )
        return
    text = text_field(record, "text")
    for n, asked in enumerate(field(record, "questions")):
        consensus = field(asked, "consensus")
        if "s" in consensus:  # else: no answer in the text, or no good question
            answer = text[consensus["s"] : consensus["e"]].strip(" \n.,")
            yield Question(f"{record['storyId']}-{n}", text_field(asked, "q").strip(), distinct([answer]), context=text.strip())


def pubmed_qa(record: Record) -> Iterator[Question]:
    """{"QUESTION", "CONTEXTS", "final_decision", "LONG_ANSWER"} by PMID, or the Hub's {"pubid", "question", "context": {"contexts"}}."""
    if "QUESTION" in record:
        id, question, contexts = id_field(record, "key"), text_field(record, "QUESTION"), field(record, "CONTEXTS")
    else:
        id, question, contexts = id_field(record, "pubid"), text_field(record, "question"), field(record, "context", "contexts")
    yield Question(id, question.strip(), distinct([text_field(record, "final_decision")]), context=" ".join(contexts).strip())


def quail(record: Record) -> Iterator[Question]:
    """{"id", "context", "question", "answers": four texts, "correct_answer_id"}."""
    choices = checked({str(n): str(text).strip() for n, text in enumerate(field(record, "answers"))})
    answer = choices.get(str(field(record, "correct_answer_id")))
    if answer is None:
        raise BadRecord(f"correct_answer_id is {record['correct_answer_id']!r}, expected one of {', '.join(choices)}")
    question, context = text_field(record, "question").strip(), text_field(record, "context").strip()
    yield Question(id_field(record, "id"), question, (answer,), context=context, choices=tuple(choices.values()))


def quarel(record: Record) -> Iterator[Question]:
    """{"id", "question": "… (A) more (B) less", "answer_index", …}: the story is in the question."""
    asked = text_field(record, "question").strip()
    choices = checked(dict(_LETTERED.findall(asked)))
    texts = tuple(choices.values())
    at = int(field(record, "answer_index"))
    if not 0 <= at < len(texts):
        raise BadRecord(f"answer_index is {at}, expected 0 to {len(texts) - 1}")
    yield Question(id_field(record, "id"), asked[: asked.index("(A)")].strip(), (texts[at],), choices=texts)


def squad(record: Record, unanswerable: bool = False) -> Iterator[Question]:
    """An article {"title", "paragraphs": [{"context", "qas"}]}, or one question {"id", "question", "context", "answers": {"text"}}."""
    if "paragraphs" not in record:
        yield _of_squad(record, text_field(record, "context"), unanswerable)
        return
    for paragraph in field(record, "paragraphs"):
        for asked in field(paragraph, "qas"):
            yield _of_squad(asked, text_field(paragraph, "context"), unanswerable)


def _of_squad(asked: Record, context: str, unanswerable: bool) -> Question:
    answers = field(asked, "answers")
    texts = answers["text"] if isinstance(answers, Mapping) else [text_field(answer, "text") for answer in answers]
    impossible = asked.get("is_impossible", unanswerable and not len(texts))  # the Hub says it by no answers
    found = (UNANSWERABLE,) if impossible else distinct(texts)
    return Question(id_field(asked, "id"), text_field(asked, "question").strip(), found, context=context)


_READING = functools.partial(Card, category="reading_comprehension", in_lm_ft=True)
CARDS = (
    _READING(
        "coqa",
        "tfds:coqa",
        coqa,
        retrieval="own text",
        size=108_647,
        home="stanfordnlp.github.io/coqa (coqa-train-v1.0.json)",
        evaluation_split="validation",
    ),
    _READING(
        "drop",
        "tfds:drop",
        drop,
        retrieval="own text",
        size=77_400,
        home="allenai.org/data/drop (drop_dataset_train.json)",
        evaluation_split="dev",
    ),
    _READING(
        "narrativeqa",
        "hub:deepmind/narrativeqa",
        narrativeqa,
        retrieval="own text",
        size=32_747,
        home="github.com/google-deepmind/narrativeqa (a folder with qaps.csv and third_party/wikipedia/summaries.csv)",
        group=with_summaries,
        evaluation_split="validation",
    ),
    _READING(
        "newsqa",
        "hub:mrqa-workshop/mrqa",
        newsqa,
        retrieval="own text",
        size=74_160,
        home="github.com/mrqa/MRQA-Shared-Task-2019 (NewsQA.jsonl.gz) or github.com/Maluuba/newsqa (combined-newsqa-data-v1.json)",
        evaluation_split="validation",
    ),
    _READING(
        "pubmed_qa",
        "hub:qiaojin/PubMedQA#pqa_labeled",
        pubmed_qa,
        retrieval="own text and passages",
        in_r_ft=True,
        size=1_000,
        home="github.com/pubmedqa/pubmedqa (data/ori_pqal.json)",
    ),
    _READING(
        "quail",
        "hub:textmachinelab/quail",
        quail,
        retrieval="own text",
        size=10_246,
        home="github.com/text-machine-lab/quail (quail_v1.3/json)",
        evaluation_split="validation",
    ),
    _READING(
        "quarel",
        "hub:community-datasets/quarel",
        quarel,
        in_r_ft=True,
        size=1_941,
        home="allenai.org/data/quarel (quarel-v1-train.jsonl)",
        evaluation_split="validation",
    ),
    # Not one of the paper's.
    Card("squad_v1", "tfds:squad/v1.1", squad, "reading_comprehension", "own text", evaluation_split="validation"),
    _READING(
        "squad_v2",
        "tfds:squad/v2.0",
        functools.partial(squad, unanswerable=True),
        retrieval="own text",
        size=130_319,
        home="rajpurkar.github.io/SQuAD-explorer (train-v2.0.json)",
        evaluation_split="validation",
    ),
)
