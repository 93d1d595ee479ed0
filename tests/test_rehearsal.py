"""`--dry-run`: every stage of the run is told, what is there is known as such, and nothing is made or written."""

from __future__ import annotations

import pytest
from torture import FIELDS, export_models

from configs import common
from radit_jax import rehearsal
from radit_jax.inputs import with_fields
from radit_jax.pipeline import NotMade, Pipeline


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    models = export_models(tmp_path_factory.mktemp("models"))
    encoders = {f"retriever.{side}_encoder": str(models / "encoder") for side in ("query", "document")}
    return with_fields(common.base(), {"lm.checkpoint": str(models / "lm"), **encoders, **FIELDS})


def names(stages, there: bool) -> list[str]:
    return [stage.name for stage in stages if stage.there == there]


def test_a_fresh_workdir_has_all_before_it_and_stays_untouched(config, tmp_path):
    pipeline = Pipeline(config, tmp_path / "w", dry=True)
    with pytest.raises(NotMade, match="passages"):
        _ = pipeline.store
    stages = rehearsal.rehearse(pipeline)
    assert names(stages, there=True) == [] and all(stage.seconds > 0 for stage in stages)
    assert names(stages, there=False)[:5] == ["passages", "vectors", "retrieved-train", "lm_scores-train", "lm_scores-completion"]
    assert names(stages, there=False)[-2:] == ["row-LM-ft_only", "row-both"]
    assert not (tmp_path / "w").exists()
    shown = rehearsal.text(stages)
    assert "more than" not in shown and all(stage.name in shown for stage in stages)


def test_what_is_there_costs_nothing_more(config, tmp_path):
    made = Pipeline(config, tmp_path)
    assert len(made.vectors) == len(made.store)
    before = sorted(path.name for path in tmp_path.iterdir())
    stages = rehearsal.rehearse(Pipeline(config, tmp_path, dry=True))
    assert names(stages, there=True) == ["passages", "vectors"] and not sum(stage.seconds for stage in stages[:2])
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    other = Pipeline(with_fields(config, {"corpus.max_words": 20}), tmp_path, dry=True)
    assert names(rehearsal.rehearse(other), there=True) == []


def test_r_ft_of_both_encoders_reads_passages_and_embeds_the_corpus_anew(config, tmp_path):
    fields = {"lsr_ft.encoders": "both", "lsr_ft.completion_share": 0.0}
    query, both = (
        {stage.name: stage for stage in rehearsal.rehearse(Pipeline(with_fields(config, chosen), tmp_path, dry=True))}
        for chosen in (fields | {"lsr_ft.encoders": "query"}, fields)
    )
    assert set(both) - set(query) == {"vectors-tuned"}
    assert f"{config.retrieval.k} passages of each" in both["lsr_ft"].work
    assert both["lsr_ft"].seconds > 2 * query["lsr_ft"].seconds


@pytest.mark.parametrize(("goal", "absent"), [("lm_ft", "lsr_ft"), ("lsr_ft", "lm_ft")])
def test_a_goal_has_its_own_stages(config, tmp_path, goal, absent):
    stages = names(rehearsal.rehearse(Pipeline(with_fields(config, {"goal": goal}), tmp_path / "w", dry=True)), there=False)
    assert stages[-1] == goal and absent not in stages and not any(name.startswith("row-") for name in stages)
