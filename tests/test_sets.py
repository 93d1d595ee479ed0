"""Cards: records in the schema in which the authors publish each set (values written here), the real files, a golden text a category."""

from __future__ import annotations

import csv
import gzip
import json
import os
import subprocess
import sys

import pytest
from processes import ROOT

from radit_jax.data.card import UNANSWERABLE
from radit_jax.data.prompts import background_prompt, training_example
from radit_jax.data.questions import Question
from radit_jax.data.training_sets import CARDS, card_for, load_questions, training_questions
from radit_jax.errors import InputError

CHOICES = [{"label": "A", "text": "bank"}, {"label": "B", "text": "moon "}]
COLUMNS = {"label": ["A", "B"], "text": ["bank", "moon"]}
STORY = "Ann fed the cat. It slept."
OASST = {
    "message_tree_id": "m1",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "m1",
        "role": "prompter",
        "text": "Hi?",
        "lang": "en",
        "replies": [
            {"message_id": "m2", "role": "assistant", "text": "Hello.", "replies": []},
            {
                "message_id": "m3",
                "role": "assistant",
                "text": "Yes.",
                "replies": [
                    {
                        "message_id": "m4",
                        "role": "prompter",
                        "text": "More?",
                        "replies": [{"message_id": "m5", "role": "assistant", "text": "Sure."}],
                    }
                ],
            },
            {"message_id": "m6", "role": "assistant", "text": "Bad", "deleted": True},
        ],
    },
}
HELLO = [
    Question("m2", "Hi?", ("Hello.",)),
    Question("m3", "Hi?", ("Yes.",)),
    Question("m5", "More?", ("Sure.",), history=("Hi?", "Yes.")),
]
MESSAGES = [
    {"message_id": "m1", "parent_id": None, "message_tree_id": "m1", "role": "prompter", "text": "Hi?", "deleted": False},
    {"message_id": "m2", "parent_id": "m1", "message_tree_id": "m1", "role": "assistant", "text": "Hello.", "deleted": False},
    {"message_id": "m3", "parent_id": "m1", "message_tree_id": "m1", "role": "assistant", "text": "Yes.", "deleted": False},
    {"message_id": "m4", "parent_id": "m3", "message_tree_id": "m1", "role": "prompter", "text": "More?", "deleted": False},
    {"message_id": "m5", "parent_id": "m4", "message_tree_id": "m1", "role": "assistant", "text": "Sure.", "deleted": False},
]
SQUAD = {
    "title": "T",
    "paragraphs": [
        {
            "context": STORY,
            "qas": [
                {"id": "s1", "question": " Who fed it?", "answers": [{"text": "Ann", "answer_start": 0}], "is_impossible": False},
                {"id": "s2", "question": "Why?", "answers": [], "is_impossible": True},
            ],
        }
    ],
}
SQUADS = [Question("s1", "Who fed it?", ("Ann",), context=STORY), Question("s2", "Why?", (UNANSWERABLE,), context=STORY)]


def kilt(asked: str, answer: str) -> dict:
    """A record of KILT."""
    provenance = [{"wikipedia_id": "12", "title": "T", "section": "S", "start_paragraph_id": 1}]
    return {"id": "k1", "input": asked, "output": [{"answer": answer, "provenance": provenance}, {"provenance": provenance}], "meta": {}}


# (set, records as they are published, what they are)
RECORDS = [
    ("oasst1", [OASST], HELLO),
    ("oasst1", MESSAGES, HELLO),
    (
        "commonsense_qa",
        [{"id": "c1", "answerKey": "A", "question": {"question_concept": "money", "choices": CHOICES, "stem": "Where is money?"}}],
        [Question("c1", "Where is money?", ("bank",), choices=("bank", "moon"))],
    ),
    (
        "commonsense_qa",
        [{"id": "c1", "answerKey": "B", "question": "Where?", "question_concept": "x", "choices": COLUMNS}],
        [Question("c1", "Where?", ("moon",), choices=("bank", "moon"))],
    ),
    (
        "math_qa",
        [{"Problem": "2 + 2 ?", "Rationale": "r", "options": "a ) 3 , 5 , b ) 4 , c ) none of these", "correct": "b", "category": "x"}],
        [Question("", "2 + 2 ?", ("4",), choices=("3 , 5", "4", "none of these"))],
    ),
    (
        "math_qa",
        [{"Problem": "2 + 2 ?", "options": "['a ) 3', 'b ) 4']", "correct": "a"}],
        [Question("", "2 + 2 ?", ("3",), choices=("3", "4"))],
    ),
    ("web_questions", [{"qId": "w1", "qText": "where?", "answers": ["Rome", "Roma"]}], [Question("w1", "where?", ("Rome", "Roma"))]),
    (
        "web_questions",
        [{"url": "u", "utterance": "where?", "targetValue": '(list (description Rome) (description "Old Rome (Italy)"))'}],
        [Question("", "where?", ("Rome", "Old Rome (Italy)"))],
    ),
    (
        "wiki_qa",
        [
            {"QuestionID": "Q1", "Question": "who?", "DocumentTitle": "T", "Sentence": "Ann did.", "Label": "1"},
            {"QuestionID": "Q1", "Question": "who?", "DocumentTitle": "T", "Sentence": "It rained.", "Label": "0"},
        ],
        [Question("", "who?", ("Ann did.",))],
    ),
    (
        "wiki_qa",
        [{"question_id": "Q1", "question": "who?", "answer": "Ann.", "label": 1}, {"question": "a", "answer": "b", "label": 0}],
        [Question("", "who?", ("Ann.",))],
    ),
    (
        "yahoo_answers_qa",
        [{"id": "y1", "question": "why?", "answer": "So.", "nbestanswers": ["So.", "Because."], "main_category": "Pets"}],
        [Question("y1", "why?", ("So.", "Because."))],
    ),
    (
        "freebase_qa",
        [
            {
                "Question-ID": "F1",
                "RawQuestion": "Who wrote it?",
                "ProcessedQuestion": "who wrote it",
                "Parses": [{"Parse-Id": "P0", "Answers": [{"AnswersMid": "m.0", "AnswersName": ["ann b", "ann"]}]}],
            }
        ],
        [Question("F1", "Who wrote it?", ("ann b", "ann"))],
    ),
    (
        "freebase_qa",
        [{"Question-ID": "F1", "RawQuestion": "Who?", "Parses": {"Answers": [{"AnswersMid": ["m.0"], "AnswersName": [["ann"]]}]}}],
        [Question("F1", "Who?", ("ann",))],
    ),
    (
        "ms_marco",
        [
            {"query_id": 1, "query": "what is x", "query_type": "description", "answers": ["X is y."], "passages": []},
            {"query_id": 2, "query": "none", "answers": ["No Answer Present."]},
            {"query_id": 3, "query": "none", "answers": []},
        ],
        [Question("1", "what is x", ("X is y.",))],
    ),
    (
        "coqa",
        [
            {
                "source": "mctest",
                "id": "k1",
                "story": STORY,
                "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "And then?", "turn_id": 2}],
                "answers": [{"input_text": "Ann", "span_text": "Ann", "turn_id": 1}, {"input_text": "It slept", "turn_id": 2}],
            }
        ],
        [
            Question("k1-0", "Who?", ("Ann",), context=STORY),
            Question("k1-1", "And then?", ("It slept",), context=STORY, history=("Who?", "Ann")),
        ],
    ),
    (
        "coqa",
        [{"source": "x", "story": STORY, "questions": ["Who?"], "answers": {"input_text": ["Ann"], "answer_start": [0]}}],
        [Question("", "Who?", ("Ann",), context=STORY)],
    ),
    (
        "drop",
        [
            {
                "key": "nfl_1",
                "passage": STORY,
                "wiki_url": "u",
                "qa_pairs": [
                    {"query_id": "d1", "question": "How many?", "answer": {"number": "3", "date": {}, "spans": []}},
                    {"query_id": "d2", "question": "Who?", "answer": {"number": "", "date": {}, "spans": ["Ann", "Bo"]}},
                    {
                        "query_id": "d3",
                        "question": "When?",
                        "answer": {"number": "", "date": {"day": "2", "month": "May", "year": ""}, "spans": []},
                    },
                ],
            }
        ],
        [
            Question("d1", "How many?", ("3",), context=STORY),
            Question("d2", "Who?", ("Ann, Bo",), context=STORY),
            Question("d3", "When?", ("2 May",), context=STORY),
        ],
    ),
    (
        "drop",
        [{"passage": STORY, "question": "How many?", "answer": "3", "validated_answers": [], "query_id": "d1"}],
        [Question("d1", "How many?", ("3",), context=STORY)],
    ),
    (
        "drop",
        [
            {
                "section_id": "s",
                "query_id": "d1",
                "passage": STORY,
                "question": "Who?",
                "answers_spans": {"spans": ["Ann"], "types": ["span"]},
            }
        ],
        [Question("d1", "Who?", ("Ann",), context=STORY)],
    ),
    (
        "narrativeqa",
        [
            {
                "document": {"id": "n", "kind": "book", "summary": {"text": STORY, "title": "T"}, "text": "long"},
                "question": {"text": "Who fed it?", "tokens": []},
                "answers": [{"text": "Ann", "tokens": []}, {"text": "Ann did", "tokens": []}],
            }
        ],
        [Question("", "Who fed it?", ("Ann", "Ann did"), context=STORY)],
    ),
    (
        "narrativeqa",
        [
            {"document_id": "n", "set": "train", "question": "Who?", "answer1": "Ann", "answer2": "She", "question_tokenized": "who"},
            {"document_id": "n", "set": "train", "summary": STORY, "summary_tokenized": "x"},
        ],
        [Question("", "Who?", ("Ann", "She"), context=STORY)],
    ),
    (
        "newsqa",
        [
            {"header": {"dataset": "NewsQA", "split": "train"}},
            {"context": STORY, "qas": [{"qid": "q1", "question": "Who?", "answers": ["Ann"], "detected_answers": []}]},
            {
                "storyId": "./cnn/1.story",
                "text": STORY,
                "type": "train",
                "questions": [
                    {"q": "Who?", "consensus": {"s": 0, "e": 4}},
                    {"q": "Eh?", "consensus": {"badQuestion": True}},
                    {"q": "Why?", "consensus": {"noAnswer": True}},
                ],
            },
        ],
        [Question("q1", "Who?", ("Ann",), context=STORY), Question("./cnn/1.story-0", "Who?", ("Ann",), context=STORY)],
    ),
    (
        "pubmed_qa",
        [{"key": "21", "QUESTION": "Do cats?", "CONTEXTS": ["One.", "Two."], "LONG_ANSWER": "They do.", "final_decision": "yes"}],
        [Question("21", "Do cats?", ("yes",), context="One. Two.")],
    ),
    (
        "pubmed_qa",
        [{"pubid": 21, "question": "Do cats?", "context": {"contexts": ["One."]}, "long_answer": "x", "final_decision": "maybe"}],
        [Question("21", "Do cats?", ("maybe",), context="One.")],
    ),
    (
        "quail",
        [
            {
                "id": "f1_0",
                "context_id": "f1",
                "question_id": "0",
                "domain": "fiction",
                "context": STORY,
                "question": "Who?",
                "question_type": "Character_identity",
                "answers": ["Bo", "Ann", "Al", "not enough information"],
                "correct_answer_id": 1,
            }
        ],
        [Question("f1_0", "Who?", ("Ann",), context=STORY, choices=("Bo", "Ann", "Al", "not enough information"))],
    ),
    (
        "quarel",
        [{"id": "QuaRel_1", "answer_index": 1, "question": "Ice or rug. It slides on the (A) rug (B) ice", "logical_forms": ["x"]}],
        [Question("QuaRel_1", "Ice or rug. It slides on the", ("ice",), choices=("rug", "ice"))],
    ),
    ("squad_v2", [SQUAD], SQUADS),
    (
        "squad_v2",
        [
            {"id": "s1", "title": "T", "context": STORY, "question": "Who fed it?", "answers": {"text": ["Ann"], "answer_start": [0]}},
            {"id": "s2", "title": "T", "context": STORY, "question": "Why?", "answers": {"text": [], "answer_start": []}},
        ],
        SQUADS,
    ),
    (
        "cnn_dailymail",
        [{"id": "a1", "article": STORY, "highlights": "Ann fed a cat .\nIt slept ."}],
        [Question("a1", "", ("Ann fed a cat . It slept .",), context=STORY)],
    ),
    (
        "aqua_rat",
        [{"question": "2 + 2?", "options": ["A)3", "B) 4"], "rationale": "Two and two.\nAnswer B", "correct": "B"}],
        [Question("", "2 + 2?", ("4",), choices=("3", "4"), reasoning="Two and two.\nAnswer B")],
    ),
    (
        "ecqa",
        [
            {
                "q_no": "e1",
                "q_concept": "x",
                "q_text": "Where?",
                **{f"q_op{n}": f"place {n}" for n in range(1, 6)},
                "q_ans": "place 2",
                "taskA_pos": "p",
                "taskA_neg": "n",
                "taskB": "It is so.",
            }
        ],
        [
            Question(
                "e1",
                "Where?",
                ("place 2",),
                choices=("place 1", "place 2", "place 3", "place 4", "place 5"),
                reasoning="It is so.",
            )
        ],
    ),
    (
        "gsm8k",
        [{"question": "How many?", "answer": "It is 48/2 = <<48/2=24>>24.\n#### 24"}],
        [Question("", "How many?", ("24",), reasoning="It is 48/2 = 24.")],
    ),
    (
        "competition_math",
        [{"problem": "Half?", "level": "Level 1", "type": "Algebra", "solution": "So $\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}$."}],
        [Question("", "Half?", ("\\frac{1}{2}",), reasoning="So $\\boxed{1}$, no: $\\boxed{\\frac{1}{2}}$.")],
    ),
    (
        "strategyqa",
        [{"qid": "g1", "term": "T", "question": "Is it?", "answer": True, "facts": ["One.", "Two."], "decomposition": [], "evidence": []}],
        [Question("g1", "Is it?", ("yes",), reasoning="One. Two.")],
    ),
    ("natural_questions_open", [{"question": "who", "answer": ["Ann", "Bo"]}], [Question("", "who", ("Ann", "Bo"))]),
    (
        "mmlu",
        [{"question": "2?", "subject": "x", "choices": list("abcd"), "answer": 2}],
        [Question("", "2?", ("c",), choices=tuple("abcd"))],
    ),
    *(
        (name, [kilt("who?", "Ann")], [Question("k1", "who?", ("Ann",), gold_id="12")])
        for name in ("nq", "tqa", "eli5", "hotpotqa", "aida")
    ),
    ("fever", [kilt("Cats fly.", "REFUTES")], [Question("k1", "Cats fly.", ("REFUTES",), gold_id="12")]),
    (
        "zsre",
        [{**kilt("Ann [SEP] place of birth", "Rome"), "meta": {"template_questions": ["Where was Ann born?", "Ann's birth place?"]}}],
        [Question("k1", "Where was Ann born?", ("Rome",), gold_id="12")],
    ),
    ("trex", [kilt("Ann [SEP] place of birth", "Rome")], [Question("k1", "Ann [SEP] place of birth", ("Rome",), gold_id="12")]),
    ("wow", [kilt("Hi.\nHello.\nCats?", "Nice.")], [Question("k1", "Cats?", ("Nice.",), gold_id="12", history=("Hi.", "Hello."))]),
    (
        "boolq",
        [{"question": "is it", "title": "T", "passage": STORY, "answer": False}],
        [Question("", "is it", ("no",), context=STORY, choices=("no", "yes"))],
    ),
    ("piqa", [{"goal": "How?", "sol1": "So.", "sol2": "Thus.", "label": 1}], [Question("", "How?", ("Thus.",), choices=("So.", "Thus."))]),
    (
        "siqa",
        [{"context": "It was.", "question": "Why?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "3"}],
        [Question("", "Why?", ("c",), context="It was.", choices=("a", "b", "c"))],
    ),
    (
        "hellaswag",
        [
            {
                "activity_label": "Food",
                "ctx_a": "[header] Eat [title] Sit.",
                "ctx_b": "he",
                "endings": ["a [x] b", "c", "d", "e"],
                "label": 0,
            }
        ],
        [Question("", "Food: Eat. Sit. He", ("a b",), choices=("a b", "c", "d", "e"))],
    ),
    (
        "hellaswag",
        [{"activity_label": "Food", "context": "He sat.", "endings": ["a", "b", "c", "d"], "label": 3, "split_type": "indomain"}],
        [Question("", "Food: He sat.", ("d",), choices=tuple("abcd"))],
    ),
    (
        "winogrande",
        [{"qID": "1", "sentence": "Ann met Bo as _ ran.", "option1": "Ann", "option2": "Bo", "answer": "2"}],
        [Question("", "Ann met Bo as _ ran.", ("Bo",), choices=("Ann", "Bo"))],
    ),
    (
        "arc_easy",
        [{"id": "M1", "question": {"stem": "Where?", "choices": CHOICES}, "answerKey": "B"}],
        [Question("", "Where?", ("moon",), choices=("bank", "moon"))],
    ),
    (
        "arc_challenge",
        [{"id": "M1", "question": "Where?", "choices": {"label": [0, 1], "text": ["bank", "moon"]}, "answerKey": 1}],
        [Question("", "Where?", ("moon",), choices=("bank", "moon"))],
    ),
    (
        "obqa",
        [{"id": "7-1", "question": {"stem": "The sun", "choices": CHOICES}, "fact1": "f", "answerKey": "A"}],
        [Question("", "The sun", ("bank",), choices=("bank", "moon"))],
    ),
    (
        "obqa",
        [
            {"id": "7-1", "question_stem": "The sun", "choices": COLUMNS, "answerKey": "A"},
            {"question": {"stem": "It", **{f"choice_{x}": x for x in "ABCD"}}, "fact1": "f", "answerKey": 3},
        ],
        [Question("", "The sun", ("bank",), choices=("bank", "moon")), Question("", "It", ("D",), choices=tuple("ABCD"))],
    ),
    (
        "trivia_qa",
        [{"question_id": "t1", "question": "Which star?", "answer": {"value": "Sol", "aliases": ["Sol", "The Sun"]}}],
        [Question("t1", "Which star?", ("Sol", "The Sun"))],
    ),
    (
        "popqa",
        [{"id": 4, "subj": "Ann", "prop": "occupation", "question": "What is Ann's job?", "possible_answers": '["poet", "writer"]'}],
        [Question("4", "What is Ann's job?", ("poet", "writer"))],
    ),
]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(("name", "records", "expected"), RECORDS, ids=[f"{row[0]}-{n}" for n, row in enumerate(RECORDS)])
def test_records_of_the_authors_read(tmp_path, name, records, expected):
    found = load_questions(f"{name}:{write(tmp_path / 'records.jsonl', records)}")
    assert len({question.id for question in found}) == len(found) and all(question.id for question in found)
    assert [Question(wanted.id or got.id, *_rest(got)) for got, wanted in zip(found, expected, strict=True)] == [
        Question(wanted.id or got.id, *_rest(wanted)) for got, wanted in zip(found, expected)
    ]


def _rest(question):
    return [getattr(question, name) for name in Question.__dataclass_fields__ if name != "id"]


def test_every_set_of_the_paper_has_a_card_and_every_card_a_test():
    paper = [card for card in CARDS.values() if card.size is not None]
    assert len(paper) == 22 and {card.name for card in CARDS.values()} - {name for name, _, _ in RECORDS} == {"squad_v1"}
    assert sum(card.in_lm_ft for card in paper) == 20 and sum(card.in_r_ft for card in paper) == 10
    assert sum(card.size for card in paper if card.in_r_ft) == 286_118
    assert all(card.home and card.trainable for card in paper)
    assert {card.name for card in CARDS.values() if card.trainable} == {card.name for card in paper} | {"squad_v1"}


def test_every_set_of_tensorflow_datasets_is_known_there_without_tensorflow():
    """In a process of its own, where no other test can have imported it."""
    code = """
import importlib, sys
import tensorflow_datasets as tfds
from radit_jax.data.sources import TFDS, _IMPORTED
from radit_jax.data.training_sets import CARDS
for module in _IMPORTED.values():
    importlib.import_module(f"tensorflow_datasets.{module}")
for card in CARDS.values():
    if card.source.startswith(TFDS):
        tfds.builder_cls(card.source.removeprefix(TFDS).partition("/")[0])
assert not {"tensorflow", "torch"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the real files ---------------------------------------------------------------------------------------------------------------------

FILES = [
    ("gsm8k", "gsm8k_train.jsonl.gz", 7_473),
    ("gsm8k", "gsm8k_test.jsonl.gz", 1_319),
    ("strategyqa", "strategyqa_train.json.gz", 2_061),
    ("pubmed_qa", "pubmedqa_labelled.json.gz", 1_000),
    ("web_questions", "webquestions_trainmodel.json.gz", 2_834),
    ("web_questions", "webquestions_test.json.gz", 2_032),
    ("aqua_rat", "aqua_rat_dev.jsonl.gz", 254),
    ("aqua_rat", "aqua_rat_test.jsonl.gz", 254),
]


@pytest.mark.parametrize(("name", "file", "count"), FILES, ids=[row[1] for row in FILES])
def test_all_records_of_the_real_files_read(data_dir, name, file, count):
    path = data_dir / "raw" / file
    if not path.is_file():
        pytest.skip(f"no {path}")
    questions = load_questions(f"{name}:{path}")
    assert len(questions) == count
    examples = card_for(f"{name}:{path}").training_examples(questions, seed=0)
    assert len({example.id for example in examples}) == len(examples)
    for question, example in zip(questions, examples):
        assert question.answers[0] in example.target and example.target.startswith(" ") and example.prompt
        if CARDS[name].category == "chain_of_thought" and question.reasoning:
            assert example.target.index(question.reasoning[:20]) < example.target.rindex(question.answers[0])


# -- golden texts -----------------------------------------------------------------------------------------------------------------------

GOLDEN = {
    "dialogue": ("oasst1", HELLO[2], "Background: P.\n\nQ: Hi? A: Yes. Q: More? A:| Sure."),
    "open_qa": ("web_questions", Question("w", "where?", ("Rome",)), "Background: P.\n\n{start}where?\n{answer}| Rome"),
    "choices": (
        "commonsense_qa",
        Question("c", "where?", ("bank",), choices=("bank", "moon")),
        "Background: P.\n\n{start}where?\nA. bank\nB. moon\n{answer}| bank",
    ),
    "reading_comprehension": ("squad_v2", SQUADS[1], f"Background: {STORY}\n\n{{start}}Why?\n{{answer}}| I don't know"),
    "a story's turns": (
        "coqa",
        Question("k1-1", "And then?", ("It slept",), context=STORY, history=("Who?", "Ann")),
        f"Background: {STORY}\n\n{{start}}Who?\n{{answer}} Ann\n{{start}}And then?\n{{answer}}| It slept",
    ),
    "summarization": (
        "cnn_dailymail",
        Question("a", "", ("Short.",), context=STORY),
        f"Background: {STORY}\n\nSummarize this article:\n{{answer}}| Short.",
    ),
    "chain_of_thought": (
        "gsm8k",
        Question("g", "How many?", ("24",), reasoning="It is 24."),
        "Background: P.\n\n{start}How many?| It is 24. {answer} 24",
    ),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_the_text_of_each_category_with_its_random_markers(case):
    name, question, text = GOLDEN[case]
    card = CARDS[name]
    expected = {text.format(start=s, answer=a) for s in ("Q: ", "Question: ", "") for a in ("A:", "Answer:")}
    found = set()
    for seed in range(60):
        example = training_example(question, seed=seed, category=card.category, rule=card.retrieval)
        found.add(background_prompt(example.background or "P.", example.prompt) + "|" + example.target)
    assert found == expected


# -- how files are kept -----------------------------------------------------------------------------------------------------------------


def test_json_jsonl_csv_tsv_parquet_gz_and_folders_read_alike(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    records = [{"question": f"q{n}?", "answer": "a", "label": 1} for n in range(3)]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "data.json").write_text(json.dumps({"version": 1, "data": records}))
    (tmp_path / "keyed.json").write_text(json.dumps({f"k{n}": record for n, record in enumerate(records)}))
    write(tmp_path / "lines.jsonl", records)
    write(tmp_path / "lines.json", records)
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes()))
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"table.{suffix}", "w", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(records)
    parquet.write_table(Table.from_pylist(records), tmp_path / "rows.parquet")
    folder = tmp_path / "folder" / "data"
    folder.mkdir(parents=True)
    parquet.write_table(Table.from_pylist(records[:2]), folder / "train-00000-of-00002.parquet")
    parquet.write_table(Table.from_pylist(records[2:]), folder / "train-00001-of-00002.parquet")
    parquet.write_table(Table.from_pylist(records[:1]), folder / "validation-00000-of-00001.parquet")
    expected = load_questions(f"wiki_qa:{tmp_path / 'lines.jsonl'}")
    assert [question.question for question in expected] == ["q0?", "q1?", "q2?"]
    for file in ("list.json", "data.json", "keyed.json", "lines.json", "zipped.jsonl.gz", "table.csv", "table.tsv", "rows.parquet"):
        assert load_questions(f"wiki_qa:{tmp_path / file}") == expected, file
    assert training_questions(card_for(f"wiki_qa:{tmp_path / 'folder'}")) == expected
    assert load_questions(f"wiki_qa:{tmp_path / 'folder'}", split="validation") == expected[:1]
    with pytest.raises(InputError, match="may not be trained on"):
        training_questions(card_for(f"wiki_qa:{tmp_path / 'folder'}"), split="test")
    with pytest.raises(InputError, match="none with 'dev' in their path"):
        load_questions(f"wiki_qa:{tmp_path / 'folder'}", split="dev")


def test_a_file_can_be_cut_between_training_and_evaluation(tmp_path):
    path = write(tmp_path / "records.jsonl", [{"question": f"q{n}", "answer": f"x\n#### {n}"} for n in range(6)])
    whole = load_questions(f"gsm8k:{path}")
    assert load_questions(f"gsm8k:{path}[:4]") == whole[:4] and load_questions(f"gsm8k:{path}[4:]") == whole[4:]
    assert load_questions(f"gsm8k:{path}[1:4]", limit=2) == whole[1:3]
    with pytest.raises(InputError, match="no questions"):
        load_questions(f"gsm8k:{path}[9:]")


def test_a_set_of_the_hub_is_read_from_its_parquet_branch(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    from pyarrow import Table, parquet

    calls = []

    def snapshot_download(name, **how):
        calls.append((name, how))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    folder = tmp_path / "default" / "train"
    folder.mkdir(parents=True)
    parquet.write_table(Table.from_pylist([{"question": "who?", "answer": "Ann", "label": 1}]), folder / "0000.parquet")
    (question,) = training_questions(card_for("wiki_qa"))
    assert question.question == "who?"
    assert calls == [
        ("microsoft/wiki_qa", {"repo_type": "dataset", "revision": "refs/convert/parquet", "allow_patterns": "*/train/*.parquet"})
    ]


# -- bad input --------------------------------------------------------------------------------------------------------------------------


def test_a_set_that_cannot_be_fetched_says_what_to_fetch_by_hand():
    with pytest.raises(InputError) as caught:  # HF_HUB_OFFLINE is set in tests
        training_questions(card_for("oasst1"))
    message = str(caught.value)
    assert "hub:OpenAssistant/oasst1: cannot be fetched" in message and "\n" not in message
    assert "huggingface.co/datasets/OpenAssistant/oasst1" in message and "oasst1:PATH" in message


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("gsm8", "no such set; did you mean gsm8k"),
        ("strategy_qa:x.json", "did you mean strategyqa"),
        ("hub:someone/else", "no such set here, expected one of hub:OpenAssistant/oasst1"),
        ("gsm8k:nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_a_set_that_does_not_exist_names_near_misses(source, says):
    with pytest.raises(InputError, match="^[^\n]*$") as caught:
        load_questions(source)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("gsm8k", {"question": "q"}, 'no field "answer"'),
        ("gsm8k", {"question": "q", "answer": "no mark"}, "####"),
        ("gsm8k", {"question": "q", "answer": "x\n####  "}, "list of answers is empty"),
        ("web_questions", {"qText": "q", "answers": []}, "list of answers is empty"),
        ("commonsense_qa", {"id": "1", "question": "q", "choices": {"label": ["A"], "text": ["x"]}, "answerKey": "A"}, "1 choices"),
        ("commonsense_qa", {"id": "1", "question": "q", "choices": COLUMNS, "answerKey": "C"}, "expected one of A, B"),
        ("quail", {"id": "1", "question": "q", "context": "c", "answers": ["x", "y"], "correct_answer_id": 7}, "correct_answer_id is 7"),
        ("quarel", {"id": "1", "question": "no choices", "answer_index": 0}, "0 choices"),
        ("strategyqa", {"qid": "1", "question": "q", "answer": "yes", "facts": []}, "expected true or false"),
        ("squad_v2", {"id": "1", "question": "q", "answers": {"text": ["a"]}}, 'no field "context"'),
        ("competition_math", {"problem": "p", "solution": "\\boxed{1"}, "boxed"),
        ("pubmed_qa", {"pubid": 1, "question": "q", "context": 3, "final_decision": "yes"}, 'no field "context.contexts"'),
        ("wiki_qa", {"question": "q", "answer": "a", "label": "x"}, "not a record of wiki_qa"),
        ("aqua_rat", {"question": "q", "options": ["3", "4"], "rationale": "r", "correct": "A"}, "expected texts as 'A)21'"),
    ],
)
def test_bad_records_are_one_line_with_their_place_or_counted(tmp_path, name, record, says):
    good = next(records[0] for other, records, _ in RECORDS if other == name)
    path = write(tmp_path / "records.jsonl", [record, good])
    with pytest.raises(InputError, match="^[^\n]*$") as caught:
        load_questions(f"{name}:{path}")
    assert says in str(caught.value) and f"{path}:1" in str(caught.value)
    assert len(load_questions(f"{name}:{path}", max_bad_records=1)) >= 1
