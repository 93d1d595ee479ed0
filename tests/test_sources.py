"""Questions from jsonl and from tensorflow-datasets: the sets are prepared with their real builders, from tiny raw files."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from radit_jax.data.card import UNANSWERABLE
from radit_jax.data.questions import Question
from radit_jax.data.training_sets import CARDS, card_for, evaluation_questions, load_questions, training_questions, training_split
from radit_jax.errors import InputError


def _jsonl(path, records):
    path.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return str(path)


# --- files


def test_jsonl_questions_with_and_without_the_optional_fields(tmp_path):
    source = _jsonl(
        tmp_path / "train.jsonl",
        [
            {"question": " who? ", "answers": [" Ann", "Ann", "Bo "]},
            "\n",
            {"id": 5, "question": "where?", "answers": ["é"], "gold_id": 12, "context": "There.", "extra": 1},
        ],
    )
    assert load_questions(source) == [
        Question("train-1", "who?", ("Ann", "Bo")),
        Question("5", "where?", ("é",), gold_id="12", context="There."),
    ]
    assert len(load_questions(source, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops\n", "not JSON"),
        ('{"answers": ["x"]}\n', 'no field "question"'),
        ('{"question": "q"}\n', 'no field "answers"'),
        ('{"question": "q", "answers": []}\n', "list of answers is empty"),
        ('{"question": "q", "answers": "x"}\n', "expected a list"),
        ('{"question": "q", "answers": [3]}\n', "expected a text"),
        ('{"question": "q", "answers": [""]}\n', "is empty"),
        ('{"id": "a", "question": "q", "answers": ["x"]}\n', "used before, in"),
    ],
)
def test_a_bad_question_stops_with_its_place_or_is_left_out_and_shown(tmp_path, caplog, line, says):
    good = {"id": "a", "question": "q", "answers": ["x"]}
    source = _jsonl(tmp_path / "q.jsonl", [good, line, {**good, "id": "c"}])
    with pytest.raises(InputError) as caught:
        load_questions(source)
    assert str(caught.value).startswith(f"{source}:2: ") and says in str(caught.value) and "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        assert [question.id for question in load_questions(source, max_bad_records=1)] == ["a", "c"]
    assert "q.jsonl:2" in caplog.text


def test_no_questions_no_file_and_a_split_of_a_file_are_refused(tmp_path):
    with pytest.raises(InputError, match="no questions"):
        load_questions(_jsonl(tmp_path / "q.jsonl", ["\n"]))
    with pytest.raises(InputError, match="no such file"):
        load_questions(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="has no split"):
        load_questions(_jsonl(tmp_path / "q.jsonl", ["\n"]), split="train")


def test_nq_wiki_questions_name_their_passages(data_dir):
    questions = load_questions(str(data_dir / "nq_wiki" / "dev.jsonl"))
    assert len(questions) == 374 and all(question.gold_id and question.answers for question in questions)


# --- tensorflow-datasets


def _prepare(data_dir, name, config, **raw_files):
    """Runs the set's own builder on raw files of ours, in place of what it would download."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.question_answering.web_questions import WebQuestions  # noqa: F401  registers it

    real = tfds.builder_cls(name)
    with tfds.core.registered.skip_registration():

        class Local(real):
            pkg_dir_path = real.pkg_dir_path or data_dir

            def _split_generators(self, dl_manager):
                return [tfds.core.SplitGenerator(name=split, gen_kwargs=kwargs) for split, kwargs in raw_files.items()]

    Local.name = name
    Local(**({"config": config} if config else {}), data_dir=data_dir, file_format="array_record").download_and_prepare()


def _squad_file(path, *questions):
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [{"context": "Ann lived in Rom.", "qas": list(questions)}]}]}))
    return {"filepath": str(path)}


def _qa(id, *answers, **more):
    return {"id": id, "question": f" Who is {id}?", "answers": [{"text": text, "answer_start": 0} for text in answers], **more}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with the four sets, a few records each."""
    data_dir, raw = tmp_path_factory.mktemp("tfds"), tmp_path_factory.mktemp("raw")
    v1 = _squad_file(raw / "v1.json", _qa("s1", "Ann", "Ann", "Ann B."), _qa("s2", "Rom"))
    _prepare(data_dir, "squad", "v1.1", train=v1, validation=v1)
    v2 = _squad_file(raw / "v2.json", _qa("s1", "Ann", is_impossible=False), _qa("s2", is_impossible=True))
    _prepare(data_dir, "squad", "v2.0", train=v2)

    nq = raw / "nq.jsonl"
    rows = [("who is é", ["Ann", "Bo"]), ("who", ["Al"]), ("who", ["Bo"])]
    nq.write_text("".join(json.dumps({"question": question, "answer": answer}) + "\n" for question, answer in rows))
    _prepare(data_dir, "natural_questions_open", None, validation={"file_path": str(nq)})

    web = raw / "web.json"
    rows = [("where?", '(list (description Rome) (description "Old Rome"))'), ("none?", "(list)")]
    web.write_text(json.dumps([{"url": "u", "utterance": question, "targetValue": value} for question, value in rows]))
    _prepare(data_dir, "web_questions", None, train={"file_path": str(web)})

    answer = {"Aliases": ["The Sun", " Sol"], "NormalizedAliases": ["sun"], "NormalizedValue": "sun", "Type": "x", "Value": "Sol"}
    for split, extra in (("dev", {"Answer": answer}), ("test", {})):
        article = {"Question": "Which star?", "QuestionId": "tq_1", "QuestionSource": "x", **extra}
        body = "\n".join(" " * 12 + line for line in json.dumps(article, indent=1).splitlines()[1:-1])
        (raw / f"trivia-{split}.json").write_text('{\n    "Data": [\n        {\n' + body + "\n        }\n    ]\n}\n")
    files = {split: {"files": [str(raw / f"trivia-{split}.json")], "web_dir": None, "wiki_dir": None} for split in ("dev", "test")}
    _prepare(data_dir, "trivia_qa", "unfiltered.nocontext", validation=files["dev"], test=files["test"])
    return data_dir


def test_squad_v1_has_contexts_and_distinct_answers(prepared):
    questions = load_questions("tfds:squad", split="train", data_dir=prepared)
    assert sorted(questions, key=lambda q: q.id) == [
        Question("s1", "Who is s1?", ("Ann", "Ann B."), context="Ann lived in Rom."),
        Question("s2", "Who is s2?", ("Rom",), context="Ann lived in Rom."),
    ]
    assert len(load_questions("tfds:squad/v1.1", split="validation[:1]", data_dir=prepared)) == 1


def test_squad_v2_answers_what_its_text_does_not_with_i_dont_know(prepared):
    questions = load_questions("tfds:squad/v2.0", split="train", data_dir=prepared)
    assert {question.id: question.answers for question in questions} == {"s1": ("Ann",), "s2": (UNANSWERABLE,)}


def test_natural_questions_have_ids_that_do_not_depend_on_the_slice(prepared):
    def load(split):
        return load_questions("tfds:natural_questions_open", split=split, data_dir=prepared)

    questions = load("validation")
    assert {question.question: question.answers for question in questions}["who is é"] == ("Ann", "Bo")
    assert len({question.id for question in questions}) == 3, "a question asked twice has two ids"
    first = next(i for i, question in enumerate(questions) if question.question == "who is é")
    assert load(f"validation[{first}:{first + 1}]")[0].id == questions[first].id


def test_web_questions_are_read_and_a_record_without_answers_is_a_bad_one(prepared):
    with pytest.raises(InputError, match="tfds:web_questions train, record .: the list of answers is empty"):
        load_questions("tfds:web_questions", split="train", data_dir=prepared)
    (question,) = load_questions("tfds:web_questions", split="train", data_dir=prepared, max_bad_records=1)
    assert question.question == "where?" and question.answers == ("Rome", "Old Rome")


def test_trivia_qa_answers_are_the_value_and_its_aliases_and_its_test_split_has_none(prepared):
    assert load_questions("tfds:trivia_qa", split="validation", data_dir=prepared) == [Question("tq_1", "Which star?", ("Sol", "The Sun"))]
    with pytest.raises(InputError, match="list of answers is empty"):
        load_questions("tfds:trivia_qa", split="test", data_dir=prepared)


def test_the_data_dir_comes_from_the_environment_and_tensorflow_is_not_imported(prepared):
    """In a process of its own, where no other test can have imported it."""
    code = """
import sys
from radit_jax.data.training_sets import load_questions
print(len(load_questions("tfds:squad/v2.0", split="train")))
assert not {"tensorflow", "torch"} & set(sys.modules)
"""
    env = {**os.environ, "TFDS_DATA_DIR": str(prepared), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2\n"


@pytest.mark.parametrize(
    ("source", "split", "says"),
    [
        ("tfds:sqaud", "train", "no such set here, expected one of tfds:"),
        ("tfds:squad", None, "no split is named, expected one such as train"),
        ("tfds:squad", "test", "split 'test'"),
        ("tfds:squad/v3", "train", "v3 not found"),
    ],
)
def test_wrong_names_of_sets_and_splits_are_input_errors_of_one_line(prepared, source, split, says):
    with pytest.raises(InputError) as caught:
        load_questions(source, split=split, data_dir=prepared)
    assert says in str(caught.value) and "\n" not in str(caught.value)


# --- cards (SPEC section 9, trap 8)


@pytest.mark.parametrize(
    ("source", "split"),
    [
        ("web_questions", "test"),
        ("web_questions", "train+test"),
        ("web_questions", "train[:10%]+test[:1]"),
        ("web_questions", "all"),
        ("squad_v2", "validation"),
        ("natural_questions_open", None),
        ("natural_questions_open", "train"),
        ("trivia_qa", "train"),
        ("tfds:trivia_qa/rc.nocontext", "train"),
        ("tfds:natural_questions_open", "train"),
        ("data/test.jsonl", None),
        ("data/gsm8k_test.jsonl.gz", None),
    ],
)
def test_test_splits_and_evaluation_only_sets_may_not_be_trained_on(source, split):
    with pytest.raises(InputError, match="may not be trained on"):
        training_questions(card_for(source), split=split)


def test_a_few_examples_of_a_set_for_evaluation_may_be_trained_on_when_that_is_asked_for(tmp_path):
    record = {"input": "who?", "output": [{"answer": "Ann"}]}
    train = _jsonl(tmp_path / "nq-train-kilt.jsonl", [{"id": str(n), **record} for n in range(80)])
    card = card_for(f"nq:{train}")
    assert len(training_questions(card, limit=64, few=True)) == 64
    for limit, few, says in ((64, False, "evaluation only"), (65, True, "at most 64"), (None, True, "at most 64")):
        with pytest.raises(InputError, match=says):
            training_questions(card, limit=limit, few=few)
    for name in ("nq-dev-kilt.jsonl", "nq-test-kilt.jsonl"):
        with pytest.raises(InputError, match="may not be trained on"):
            training_questions(card_for(f"nq:{_jsonl(tmp_path / name, [record])}"), limit=64, few=True)


@pytest.mark.parametrize(
    ("source", "split", "expected"),
    [
        ("web_questions", None, "train"),
        ("tfds:squad/v2.0", "train[:90%]", "train[:90%]"),
        ("data/train.jsonl", None, None),
        ("test/latest_contest.jsonl", None, None),
    ],
)
def test_training_splits_may(source, split, expected):
    assert training_split(card_for(source), split) == expected


def test_cards_and_files_are_loaded_through_their_card(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    card = card_for("tfds:squad/v2.0")
    assert card is CARDS["squad_v2"] and card_for("squad_v2") is card
    questions = training_questions(card)
    examples = card.training_examples(questions, seed=0)
    assert [example.id for example in examples] == [question.id for question in questions]
    assert all(example.background == "Ann lived in Rom." and not example.retrieve for example in examples)

    mine = card_for(_jsonl(tmp_path / "mine.jsonl", [{"question": "q", "answers": ["x"]}]))
    (example,) = mine.evaluation_examples(evaluation_questions(mine))
    assert example.background is None and example.retrieve
    with pytest.raises(InputError, match="no such set"):
        card_for("tfds:unknown")
