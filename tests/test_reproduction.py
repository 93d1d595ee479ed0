"""The sweep: what its parts are made of, and what is said of its cells."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from torture import export_models, fields

from configs import common
from radit_jax import reproduction, trainings
from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.pipeline import Pipeline
from radit_jax.reproduction import PARTS, RETRIEVERS, SYSTEMS, Part
from radit_jax.training import batches


def cell(variant="", system="both", k=1, seed=0, **per_question):
    return {"part": "dual", "variant": variant, "system": system, "k": k, "seed": seed, "per_question": per_question}


def test_all_changes_are_fields_of_the_config():
    for name, part in PARTS.items():
        assert set(part.systems) <= set(SYSTEMS) | set(RETRIEVERS), name
        for changes in part.variants.values():
            for field, value in changes.items():
                changed = with_fields(common.base(), {field: value})
                group, _, rest = field.partition(".")
                *path, last = rest.split(".")
                at = changed[group]
                for step in path:
                    at = at[step]
                assert at[last] == value


def test_parts_that_name_the_weights_train_those_whatever_the_config_does():
    named = {**PARTS["adapters"].variants, **{name: v for name, v in PARTS["length"].variants.items() if name.startswith("all weights")}}
    for rank in (0, 8):
        base = with_fields(common.base(), {"lm_ft.lora.rank": rank})
        for name, changes in named.items():
            assert bool(with_fields(base, changes).lm_ft.lora.rank) == ("LoRA" in name), name


def test_parts_that_compare_many_r_fts_train_the_query_encoder_whatever_the_config_does():
    base = with_fields(common.base(), {"lsr_ft.encoders": "both"})
    for part in ("target", "data", "encoders"):
        for name, changes in PARTS[part].variants.items():
            assert with_fields(base, changes).lsr_ft.encoders == ("both" if "both encoders" in name else "query"), name


def test_seeds_are_averaged_by_question_before_questions_are_resampled():
    cells = [cell(em=[1.0, 0.0, 0.0, 1.0], seed=0), cell(em=[0.0, 1.0, 0.0, 1.0], seed=1)]
    (of_cell,) = reproduction.grouped(cells).values()
    found = reproduction.summary(of_cell, "em")
    assert found["mean"] == 0.5 and found["ci95"][0] < 0.5 < found["ci95"][1]
    assert reproduction.summary(of_cell, "recall@1") is None


def test_systems_are_compared_within_a_variant_and_variants_beside_the_first():
    values = {"neither tuned": [0.0, 0.0, 1.0, 0.0], "LM-ft only": [1.0, 0.0, 1.0, 0.0], "both": [1.0, 1.0, 1.0, 0.0]}
    found = reproduction.differences([cell(system=name, em=em) for name, em in values.items()])
    assert {name: value["mean"] for name, value in found.items()} == {
        "LM-ft only − neither tuned, em at k = 1": 0.25,
        "both − LM-ft only, em at k = 1": 0.25,
        "both − neither tuned, em at k = 1": 0.5,
    }
    variants = {"IT": [0.0, 0.0], "RA-IT": [1.0, 0.0]}
    found = reproduction.differences([cell(variant, em=em, mrr=[0.5, 0.5]) for variant, em in variants.items()])
    assert list(found) == ["RA-IT − IT: both, em at k = 1"]  # the MRR is the same for every question
    assert found["RA-IT − IT: both, em at k = 1"]["mean"] == 0.5


def test_a_difference_is_also_given_for_each_seed():
    cells = [cell(system=system, seed=seed, em=em) for system, seed, em in (
        ("LM-ft only", 0, [0.0, 0.0]), ("LM-ft only", 1, [0.0, 1.0]), ("both", 0, [1.0, 1.0]), ("both", 1, [1.0, 1.0]),
    )]  # fmt: skip
    (found,) = reproduction.differences(cells).values()
    assert found["mean"] == 0.75 and [of_seed["mean"] for of_seed in found["by_seed"]] == [1.0, 0.5]


def test_with_no_passages_every_example_is_asked_alone():
    members = tiny.retrieved(6, 3)
    alone = batches.PassageInstances(
        members, [member.example for member in members], tiny.maker(), passages=0, output_slots=tiny.OUTPUT_SLOTS
    )
    assert len(alone) == len(members)
    for n, member in enumerate(members):
        text = tiny.tokenizer().decode([int(i) for i in alone[n]["tokens"]])
        assert "Background:" not in text and member.example.prompt in text


def small_config(models: Path):
    c = common.base()
    c.update_from_flattened_dict(fields(models) | {"retrieval.k": 10, "lm_ft.steps": 2})
    return c


def test_a_sweep_makes_its_cells_once_and_goes_on(tmp_path, monkeypatch, capsys):
    variants = {"with": {}, "alone": {"lm_ft.passages": 0}}
    monkeypatch.setitem(PARTS, "small", Part("a part", variants, ("no retrieval", "LM-ft only"), (1, 2)))
    config, workdir = small_config(export_models(tmp_path / "models")), tmp_path / "run"
    value = reproduction.make(Pipeline(config, workdir), ["small"], [0])
    assert [(cell["variant"], cell["system"], cell["k"]) for cell in value["cells"]] == [
        (variant, *cell) for variant in variants for cell in (("no retrieval", 0), ("LM-ft only", 1), ("LM-ft only", 2))
    ]
    stored = json.loads((workdir / reproduction.FILE).read_text())
    assert stored["cells"] == value["cells"]
    assert all(variant in reproduction.text(stored) for variant in variants)
    assert len(list(workdir.glob("lm_ft-*"))) == 2 and len(list(workdir.glob("row-no_retrieval-*"))) == 1  # shared by the variants
    capsys.readouterr()
    again = reproduction.make(Pipeline(config, workdir), ["small"], [0])
    assert again["cells"] == value["cells"] and ": making" not in capsys.readouterr().err


def test_folds_measure_every_question_once_by_an_encoder_that_has_not_seen_it(tmp_path, monkeypatch):
    monkeypatch.setitem(PARTS, "small", Part("a part", {"": {}}, tuple(RETRIEVERS)))
    monkeypatch.setattr(reproduction, "FOLDS", 2)
    config, workdir = small_config(export_models(tmp_path / "models")), tmp_path / "run"
    config.lsr_ft.validation = 0.0
    untuned, tuned = reproduction.make(Pipeline(config, workdir), ["small"], [0])["cells"]
    assert len(untuned["per_question"]["mrr"]) == len(tuned["per_question"]["mrr"]) == config.train.limit
    pipelines = [Pipeline(with_fields(config, {"lsr_ft.fold": fold}), workdir) for fold in ("1/2", "2/2")]
    kept = [json.loads((pipeline.tuned_retriever.path / "manifest.json").read_text())["facts"]["questions"] for pipeline in pipelines]
    left_out = [{example.id for example in trainings.unseen(pipeline)} for pipeline in pipelines]
    assert kept == [config.train.limit - len(ids) for ids in left_out] and not left_out[0] & left_out[1]
    assert len(left_out[0] | left_out[1]) == config.train.limit


@pytest.mark.parametrize("fold", ["0/3", "4/3", "1/1", "one", "1/3/5"])
def test_a_wrong_fold_is_named(fold):
    pipeline = SimpleNamespace(config=with_fields(common.base(), {"lsr_ft.fold": fold}))
    with pytest.raises(InputError, match=f"lsr_ft.fold is '{fold}', expected a number and how many there are"):
        trainings.unseen(pipeline)


def test_parts_are_drawn_as_figures(tmp_path):
    systems = {"no retrieval": (0,), "LM-ft only": (1, 3), "both": (1, 3)}
    cells = [cell(system=name, k=k, em=[1.0, float(name == "both"), 0.0]) for name, ks in systems.items() for k in ks]
    retrievers = {"untuned retriever": [0.0, 0.0, 1.0], "R-ft": [1.0, 0.0, 1.0]}
    for variant, (name, found) in itertools.product(("posterior", "prob"), retrievers.items()):
        cells.append({**cell(variant, name, 0, **{"recall@1": found}), "part": "target"})
    for variant, system in itertools.product(PARTS["encoders"].variants, ("LM-ft only", "both")):
        found = [1.0, float(system == "both"), float(system == "both" and variant == "both encoders")]
        cells += [{**cell(variant, system, k, em=found), "part": "encoders"} for k in (1, 3)]
    value = {"cells": cells}
    reproduction.draw(value, tmp_path / "figures")
    drawn = {path.name: path.read_text() for path in (tmp_path / "figures").iterdir()}
    assert set(drawn) == {"dual.svg", "target.svg", "encoders.svg"}
    for name in ("LM-ft only", "both, query encoder", "both, both encoders"):
        assert f">{name}<" in drawn["encoders.svg"]
    assert "LM-ft only, " not in drawn["encoders.svg"]  # the encoders do not change it
    assert all(name in drawn["dual.svg"] for name in systems)
    assert all(variant in drawn["target.svg"] for variant in ("posterior", "prob"))
    assert reproduction.text(value).count("| untuned retriever |") == 1  # it is the same in every variant


def test_an_unknown_part_and_a_wrong_seed_are_named(tmp_path):
    with pytest.raises(InputError, match="--parts names 'duel', expected some of dual, recipe, folds, instruction"):
        reproduction.make(Pipeline(common.base(), tmp_path), ["duel"], [0])
    script = Path(__file__).parents[1] / "launch" / "reproduce.py"
    done = subprocess.run([sys.executable, str(script), "--seeds=a"], capture_output=True, text=True)
    assert done.returncode == 2 and "--seeds is 'a', expected numbers as 0,1,2" in done.stderr and "Traceback" not in done.stderr


def test_means_by_question_keep_their_order():
    cells = [cell(em=[1.0, 0.0, 0.5]), cell(em=[0.0, 0.0, 0.5], seed=1)]
    np.testing.assert_allclose(reproduction._by_question(cells, "em"), [0.5, 0.0, 0.5])


def test_the_launch_script_names_all_parts():
    text = (Path(__file__).parents[1] / "launch" / "reproduce.py").read_text()
    assert all(name in text for name in PARTS)
