"""Configs: every variant loads, and the paper's hold the paper's numbers (SPEC sections 3 and 4)."""

from __future__ import annotations

import importlib

import pytest

from radit_jax.data.training_sets import CARDS
from radit_jax.evaluation.tasks import TASKS


@pytest.fixture
def configs(monkeypatch):
    from processes import ROOT

    monkeypatch.syspath_prepend(str(ROOT))
    return {name: importlib.import_module(f"configs.{name}") for name in ("common", "lm_ft", "lsr_ft", "radit")}


def test_every_variant_of_every_config_loads_and_is_locked(configs):
    for variant in configs["common"].VARIANTS:
        for name, goal in (("lm_ft", "lm_ft"), ("lsr_ft", "lsr_ft"), ("radit", "radit")):
            config = configs[name].get_config(variant)
            assert config.goal == goal and config.is_locked
    with pytest.raises(ValueError, match="no variant 'llama_8b', expected one of .*llama_7b"):
        configs["lm_ft"].get_config("llama_8b")


@pytest.mark.parametrize(("variant", "batch", "steps"), [("llama_7b", 64, 500), ("llama_13b", 128, 400), ("llama_65b", 128, 300)])
def test_lm_ft_of_the_paper(configs, variant, batch, steps):
    c = configs["lm_ft"].get_config(variant)
    assert set(c.train.source.split(",")) == {name for name, card in CARDS.items() if card.size and card.in_lm_ft}
    assert (c.lm_ft.rows * c.lm_ft.accumulate, c.lm_ft.row_length, c.lm_ft.passages, c.lm_ft.steps) == (batch, 2048, 3, steps)
    assert (c.lm_ft.mixture.cap, c.lm_ft.mixture.dialogue_share, c.lm_ft.mixture.text_share) == (7_500, 0.05, 0.10)
    o = c.lm_ft.optimizer
    assert (o.peak_lr, o.final_lr, o.warmup_steps, o.decay) == (1e-5, 1e-7, 200, "cosine")
    assert (c.lm_ft.validate_every, c.tasks.limit) == (100, 2_500) and len(c.lm_ft.dev_tasks.split(",")) == 6
    assert set(c.lm_ft.dev_tasks.split(",")) <= set(TASKS)


def test_r_ft_of_the_paper(configs):
    c = configs["lsr_ft"].get_config("dragon_plus")
    assert set(c.train.source.split(",")) == {name for name, card in CARDS.items() if card.size and card.in_r_ft}
    assert (c.retrieval.k, c.lsr_ft.tau, c.lsr_ft.score, c.lsr_ft.direction) == (10, 0.01, "prob", "retriever_first")
    assert (c.lsr_ft.batch, c.lsr_ft.epochs, c.lsr_ft.completion_share, c.lsr_ft.completion_examples) == (512, 1, 0.95, 900_000)
    o = c.lsr_ft.optimizer
    assert (o.peak_lr, o.warmup_steps, c.lsr_ft.validate_every) == (1e-5, 1_237, 500)


def test_the_64_shot_stage_of_the_paper(configs):
    c = configs["lm_ft"].get_config("few_shot")
    o = c.lm_ft.optimizer
    assert (c.train.limit, c.lm_ft.rows * c.lm_ft.accumulate, c.lm_ft.steps) == (64, 8, 100)
    assert (o.peak_lr, o.final_lr, o.warmup_steps, o.decay) == (1e-5, 1e-6, 0, "linear")


def test_the_recipe_is_that_of_three_sets_and_the_papers_stages_are_the_papers(configs):
    found = {name: configs["radit"].get_config(name) for name in configs["common"].VARIANTS}
    assert {name for name, c in found.items() if c.lsr_ft.encoders == "both"} == {"invented", "nq_wiki", "pubmed_qa"}
    assert {name for name, c in found.items() if c.lm_ft.lora.rank} == {"invented", "nq_wiki", "pubmed_qa"}
    assert {name for name, c in found.items() if c.lsr_ft.prior} == {"invented", "nq_wiki", "pubmed_qa", "own", "multi_task", "few_shot"}
    trained = {name: c.lm_ft for name, c in found.items()}
    assert {(c.lora.rank, c.optimizer.peak_lr) for c in trained.values() if c.lora.rank} == {(16, 1e-3)}
    assert trained["multi_task"].optimizer.peak_lr == 1e-4
