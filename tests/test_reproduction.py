"""The sweep: what its parts are made of, and what is said of its cells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from torture import FIELDS, export_models

from configs import common
from radit_jax import reproduction
from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.reproduction import PARTS, SYSTEMS, Part
from radit_jax.training import batches


def cell(variant="", system="both", k=1, seed=0, **per_question):
    return {"part": "dual", "variant": variant, "system": system, "k": k, "seed": seed, "per_question": per_question}


def test_all_changes_are_fields_of_the_config():
    for name, part in PARTS.items():
        assert set(part.systems) <= set(SYSTEMS), name
        for changes in part.variants.values():
            for field, value in changes.items():
                changed = with_fields(common.base(), {field: value})
                group, _, rest = field.partition(".")
                *path, last = rest.split(".")
                at = changed[group]
                for step in path:
                    at = at[step]
                assert at[last] == value


def test_seeds_are_averaged_by_question_before_questions_are_resampled():
    cells = [cell(em=[1.0, 0.0, 0.0, 1.0], seed=0), cell(em=[0.0, 1.0, 0.0, 1.0], seed=1)]
    (of_cell,) = reproduction.grouped(cells).values()
    found = reproduction.summary(of_cell, "em")
    assert found["mean"] == 0.5 and found["ci95"][0] < 0.5 < found["ci95"][1]
    assert reproduction.summary(of_cell, "recall@1") is None


def test_systems_are_compared_where_there_is_one_variant_and_variants_where_there_are_several():
    values = {"neither tuned": [0.0, 0.0, 1.0, 0.0], "LM-ft only": [1.0, 0.0, 1.0, 0.0], "both": [1.0, 1.0, 1.0, 0.0]}
    found = reproduction.differences([cell(system=name, em=em) for name, em in values.items()])
    assert found["both − LM-ft only, em, k = 1"]["mean"] == 0.25 and found["both − neither tuned, em, k = 1"]["mean"] == 0.5
    assert "LM-ft only − both, em, k = 1" not in found
    variants = {"IT": [0.0, 0.0], "RA-IT": [1.0, 0.0]}
    found = reproduction.differences([cell(variant, em=em) for variant, em in variants.items()])
    assert list(found) == ["RA-IT, both − IT, both, em, k = 1"] and found["RA-IT, both − IT, both, em, k = 1"]["mean"] == 0.5


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
    fields = {
        "lm.checkpoint": models / "lm",
        "retriever.query_encoder": models / "encoder",
        "retriever.document_encoder": models / "encoder",
    }
    c.update_from_flattened_dict({field: str(path) for field, path in fields.items()} | FIELDS | {"retrieval.k": 10, "lm_ft.steps": 2})
    return c


def test_a_sweep_makes_its_cells_once_and_goes_on(tmp_path, monkeypatch, capsys):
    variants = {"with": {}, "alone": {"lm_ft.passages": 0}}
    monkeypatch.setitem(PARTS, "small", Part("a part", variants, ("no retrieval", "LM-ft only"), (1, 2)))
    config, workdir = small_config(export_models(tmp_path / "models")), tmp_path / "run"
    value = reproduction.make(config, workdir, ["small"], [0])
    assert [(cell["variant"], cell["system"], cell["k"]) for cell in value["cells"]] == [
        (variant, *cell) for variant in variants for cell in (("no retrieval", 0), ("LM-ft only", 1), ("LM-ft only", 2))
    ]
    stored = json.loads((workdir / reproduction.FILE).read_text())
    assert stored["cells"] == value["cells"]
    assert all(variant in reproduction.text(stored) for variant in variants)
    assert len(list(workdir.glob("lm_ft-*"))) == 2 and len(list(workdir.glob("row-no_retrieval-*"))) == 1  # shared by the variants
    capsys.readouterr()
    again = reproduction.make(config, workdir, ["small"], [0])
    assert again["cells"] == value["cells"] and ": making" not in capsys.readouterr().err


def test_an_unknown_part_and_a_wrong_seed_are_named(tmp_path):
    with pytest.raises(InputError, match="--parts names 'duel', expected some of dual, instruction"):
        reproduction.make(common.base(), tmp_path, ["duel"], [0])
    script = Path(__file__).parents[1] / "launch" / "reproduce.py"
    done = subprocess.run([sys.executable, str(script), "--seeds=a"], capture_output=True, text=True)
    assert done.returncode == 2 and "--seeds is 'a', expected numbers as 0,1,2" in done.stderr and "Traceback" not in done.stderr


def test_means_by_question_keep_their_order():
    cells = [cell(em=[1.0, 0.0, 0.5]), cell(em=[0.0, 0.0, 0.5], seed=1)]
    np.testing.assert_allclose(reproduction._by_question(cells, "em"), [0.5, 0.0, 0.5])


def test_the_launch_script_names_all_parts():
    text = (Path(__file__).parents[1] / "launch" / "reproduce.py").read_text()
    assert all(name in text for name in PARTS)
