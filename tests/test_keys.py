"""What artifacts hang on: a field that changes a result makes it anew, and one that does not leaves it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from torture import export_models, fields

from configs import common
from radit_jax import inputs, table
from radit_jax.artifacts import digest
from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.pipeline import Pipeline
from radit_jax.retrieval import retrieve
from radit_jax.training import tune


class Named(Pipeline):
    """Makes the passages, and of all other stages nothing but their fingerprints."""

    def stage(self, name, made_from, write):
        if name == "passages":
            return super().stage(name, made_from, write)
        self.named[name] = digest([name, made_from])
        return SimpleNamespace(path=self.workdir / name, fingerprint=self.named[name])


@pytest.fixture
def config(tmp_path, monkeypatch):
    models = export_models(tmp_path / "models")
    monkeypatch.setattr(retrieve, "Retrieval", lambda path, examples, store: SimpleNamespace(examples=examples))
    return with_fields(common.base(), fields(models))


def named(config, tmp_path, **changes) -> dict[str, str]:
    """Stage → fingerprint of all that the table is made from."""
    pipeline = Named(with_fields(config, {name.replace("__", "."): value for name, value in changes.items()}), tmp_path / "run")
    pipeline.named = {}
    for name in table.ROWS:
        table.row(pipeline, name)
    return pipeline.named


def changed(config, tmp_path, **changes) -> set[str]:
    before, after = named(config, tmp_path), named(config, tmp_path, **changes)
    assert set(before) == set(after)
    return {name for name in before if before[name] != after[name]}


ROWS = {f"row-{name.replace(' ', '_')}" for name in table.ROWS}
RETRIEVED = {"retrieved-train", "retrieved-completion", "retrieved-test", "retrieved-test-tuned"}
TRAINED = {"lm_scores-train", "lm_scores-completion", "lsr_ft", "lm_ft"}


@pytest.mark.parametrize(
    "field", ["evaluate.batch_tokens", "scoring.batch_tokens", "lm_ft.checkpoint_every", "lsr_ft.log_every", "loggers", "mesh.model"]
)
def test_what_changes_no_result_makes_nothing_anew(config, tmp_path, field):
    value = {"loggers": "tensorboard", "mesh.model": 2}.get(field, 600)
    assert changed(config, tmp_path, **{field.replace(".", "__"): value}) == set()


def test_what_changes_results_makes_anew_all_that_hangs_on_it(config, tmp_path):
    answered = ROWS - {"row-no_retrieval"}
    assert changed(config, tmp_path, retriever__max_query_tokens=16) == RETRIEVED | TRAINED | answered
    assert changed(config, tmp_path, evaluate__k=3) == ROWS
    by_lm, by_retriever = {"row-LM-ft_only", "row-both"}, {"row-R-ft_only", "row-both"}
    assert changed(config, tmp_path, lm_ft__steps=7) == {"lm_ft"} | by_lm
    assert changed(config, tmp_path, lsr_ft__tau=0.5) == {"lsr_ft", "retrieved-test-tuned"} | by_retriever
    assert changed(config, tmp_path, retriever__score_scale=3.0) == {"lsr_ft", "retrieved-test-tuned"} | ROWS


def test_a_gold_document_that_is_told_later_is_measured(config, tmp_path):
    questions = tmp_path / "test.jsonl"
    record = {"question": "Is moss green?", "answers": ["yes"]}
    questions.write_text(json.dumps(record) + "\n")
    config = with_fields(config, {"test.source": str(questions), "evaluate.k": 1})
    before = named(config, tmp_path)
    questions.write_text(json.dumps({**record, "gold_id": "p1"}) + "\n")
    assert {name for name, of_name in named(config, tmp_path).items() if of_name != before[name]} == ROWS


def test_ten_passages_are_looked_at_whatever_the_training_has(config, tmp_path):
    pipeline = Named(with_fields(config, {"retrieval.k": 2}), tmp_path / "run")
    assert len(pipeline.store) >= 10 and pipeline.depth() == 10 and pipeline.depth(12) == 12


# -- the workdir ------------------------------------------------------------------------------------------------------------------------


def test_a_variant_does_not_become_the_config_of_the_workdir(config, tmp_path):
    Pipeline(config, tmp_path / "run")
    Pipeline(with_fields(config, {"seed": 7}), tmp_path / "run", keep=False)
    assert inputs.stored_config(tmp_path / "run", config, {}).seed == config.seed


def test_plain_text_may_come_later_go_and_come_again_but_not_become_other(config, tmp_path):
    plain = {"lm_ft.mixture.text_source": "invented:passages=40,seed=3"}
    for changes in ({}, plain, {}, plain):
        assert set(Pipeline(with_fields(config, changes), tmp_path / "run").inputs) >= set(changes)
    with pytest.raises(InputError, match="text_source was invented:passages=40,seed=3, now invented:passages=40,seed=4"):
        Pipeline(with_fields(config, {"lm_ft.mixture.text_source": "invented:passages=40,seed=4"}), tmp_path / "run")
    assert list(Pipeline(config, tmp_path / "run").documents("invented:passages=40,seed=3"))


def test_a_training_is_there_only_with_these_settings(config, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert not Pipeline(config, workdir).has("lm_ft")
    folder = workdir / "lm_ft-of_other_settings"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    assert not Pipeline(config, workdir).has("lm_ft")
    assert "holds one of other settings" in capsys.readouterr().err
    assert not list(workdir.glob("passages-*"))  # nothing was made to find that out


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lsr_ft.direction", "target", "lsr_ft.direction is 'target'"),
        ("lsr_ft.tau", 0.0, "lsr_ft.tau is 0.0"),
        ("lm_ft.optimizer.decay", "step", "optimizer.decay is 'step'"),
        ("lsr_ft.optimizer.moment_dtype", "int8", "optimizer.moment_dtype is 'int8'"),
        ("lm.remat", "some", "lm.remat is 'some'"),
    ],
)
def test_options_that_are_none_are_told_before_anything_is_made(config, tmp_path, field, value, message):
    with pytest.raises(InputError, match=message):
        Pipeline(with_fields(config, {field: value}), tmp_path / "run").check_trainings()


def test_completion_of_no_passages_is_refused(config, tmp_path):
    pipeline = Named(with_fields(config, {"lsr_ft.completion_examples": 0}), tmp_path / "run")
    pipeline.named = {}
    with pytest.raises(InputError, match="completion_share is 0.25, and lsr_ft.completion_examples is 0"):
        _ = pipeline.tuned_retriever


@pytest.mark.parametrize(
    ("share", "questions", "completions", "steps"),
    [(0.0, 60, 0, 20), (0.75, 60, 90, 80), (1.0, 60, 90, 30), (0.0, 0, 90, 30), (0.75, 0, 90, 30)],
)
def test_steps_of_r_ft_are_planned_by_questions_and_without_them_by_completions(config, share, questions, completions, steps):
    c = with_fields(config, {"lsr_ft.completion_share": share, "lsr_ft.epochs": 2, "lsr_ft.batch": 6}).lsr_ft
    assert tune.planned_steps(c, questions, completions) == steps
