"""The `export` command: the models of a workdir as folders for other software, each with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from radit_jax import dossier, trainings
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.evaluation import report
from radit_jax.paths import last_part
from radit_jax.pipeline import Pipeline
from radit_jax.weights import card
from radit_jax.weights.export import export_encoder, export_lm

DESCRIBED = ("radit-jax", "jax", "flax", "optax", "transformers")  # packages whose versions a card names
NAMES = dict(zip(card.KINDS, ("LM", "query encoder", "document encoder")))
# What a table must share with the exported models to be theirs.
MODELS = ("seed", "lm", "retriever", "corpus", "train", "retrieval", "lm_ft", "lsr_ft")


def export(pipeline: Pipeline, folder: Path, dtype: str) -> str:
    """Writes folder/lm, folder/query_encoder and folder/document_encoder, and returns in words what they are.

    The LM's tensors are of `dtype`, those of the encoders float32. Tuned models are taken where the workdir holds them.
    """
    retriever = pipeline.config.retriever
    lm_tuned, retriever_tuned = pipeline.has("lm_ft"), pipeline.has("lsr_ft")
    tuned = dict(zip(card.KINDS, (lm_tuned, retriever_tuned, pipeline.tunes_documents(retriever_tuned))))
    cards = {kind: card.text(_card(pipeline, kind, tuned, dtype)) for kind in card.KINDS}
    lm = pipeline.lm(lm_tuned, full_precision=True)
    export_lm(lm, pipeline.tokenizer, folder / card.LM, dtype=dtype, readme=cards[card.LM])
    for kind, encoder, checkpoint in (
        (card.QUERY_ENCODER, pipeline.query_encoder(retriever_tuned), retriever.query_encoder),
        (card.DOCUMENT_ENCODER, pipeline.document_encoder(retriever_tuned), retriever.document_encoder),
    ):
        export_encoder(encoder, load_tokenizer(checkpoint), folder / kind, readme=cards[kind])
    said = [f"{'tuned' if tuned[kind] else 'untuned'} {NAMES[kind]}" for kind in card.KINDS]
    return f"{folder}: {', '.join(said)}"


def _card(pipeline: Pipeline, kind: str, tuned: Mapping[str, bool], dtype: str) -> card.Card:
    c = pipeline.config
    bases = {card.LM: c.lm.checkpoint, card.QUERY_ENCODER: c.retriever.query_encoder, card.DOCUMENT_ENCODER: c.retriever.document_encoder}
    return card.Card(
        kind=kind,
        base=last_part(bases[kind]) if Path(bases[kind]).exists() else bases[kind],  # OWNER/NAME may be a folder here
        tuned=tuned[kind],
        dtype=dtype if kind == card.LM else "float32",
        score_scale=c.retriever.score_scale,
        corpus=f"{last_part(c.corpus.source)}, {len(pipeline.store):,} passages of at most {c.corpus.max_words} words",
        data=_data(pipeline, kind) if tuned[kind] else {},
        settings=_settings(pipeline, kind) if tuned[kind] else {},
        table=_table(pipeline) if any(tuned.values()) else "",
        versions=dossier.package_versions(DESCRIBED),
    )


def _data(pipeline: Pipeline, kind: str) -> dict[str, int]:
    """The sets of one training, by name, with their examples."""
    c = pipeline.config
    sets = (trainings.lm_ft_sets if kind == card.LM else trainings.r_ft_sets)(pipeline)
    left_out = set() if kind == card.LM else {example.id for example in trainings.unseen(pipeline)}
    found = {name: sum(example.id not in left_out for example in examples) for name, (_, examples) in sets.items()}
    if kind == card.LM:
        plain = c.lm_ft.mixture.text_share and not c.lm_ft.mixture.text_source
        return found | ({"plain text of the corpus": len(pipeline.store)} if plain else {})
    if c.lsr_ft.completion_share == 1:  # the questions tell which step is the best, and no more
        found = {}
    if trainings.completes(pipeline):
        found["completion of the corpus"] = len(trainings.completion_examples(pipeline))
    return found


def _settings(pipeline: Pipeline, kind: str) -> dict[str, Any]:
    c = pipeline.config
    part = "lm_ft" if kind == card.LM else "lsr_ft"
    settings = {key: value for key, value in c[part].to_dict().items() if key not in (*trainings.CHANGE_NOTHING, "dev_tasks")}
    if kind == card.LM:
        settings["mixture"] = {key: value for key, value in settings["mixture"].items() if key != "text_source"}
    return {part: settings, "retrieval": c.retrieval.to_dict(), "seed": c.seed}


def _table(pipeline: Pipeline) -> str:
    """The workdir's table.json in Markdown, if it was made with the settings of these models."""
    path = pipeline.workdir / "table.json"
    if not path.exists():
        return ""
    value, config = json.loads(path.read_text()), json.loads(json.dumps(pipeline.config.to_dict()))
    if any(value["config"].get(part) != config[part] for part in MODELS):
        return ""
    head = ("system", *report.COLUMNS, "n")
    rows = [(row["name"], *(report.cell(row["metrics"].get(name)) for name in report.COLUMNS), str(row["n"])) for row in value["rows"]]
    return report.markdown([head, *rows])
