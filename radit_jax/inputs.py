"""What a run is made from: the corpus, questions and checkpoints that a config names, and the workdir that belongs to them."""

from __future__ import annotations

import json
from pathlib import Path

from ml_collections import ConfigDict

from radit_jax import artifacts, distributed
from radit_jax.data import training_sets
from radit_jax.data.invented import Invented
from radit_jax.data.questions import Question
from radit_jax.data.sources import TFDS
from radit_jax.errors import InputError
from radit_jax.weights.encoder import check_pair
from radit_jax.weights.hf import resolve

INVENTED = "invented"
INPUTS_FILE, CONFIG_FILE = "inputs.json", "config.json"


def claim(config: ConfigDict, workdir: Path) -> dict[str, str]:
    """Returns the identity of every input, and keeps them with the config in the workdir.

    A workdir belongs to one set of inputs: another corpus, question file or checkpoint is an InputError that names it.
    """
    data = {"corpus.source": config.corpus.source, "train.source": config.train.source}
    checkpoints = {
        "lm.checkpoint": config.lm.checkpoint,
        "retriever.query_encoder": config.retriever.query_encoder,
        "retriever.document_encoder": config.retriever.document_encoder,
    }
    found = {field: _data_identity(source) for field, source in data.items()}
    found |= {field: artifacts.identity(resolve(name)) for field, name in checkpoints.items()}
    check_pair(config.retriever.query_encoder, config.retriever.document_encoder)
    path = workdir / INPUTS_FILE
    before = json.loads(path.read_text()) if path.exists() else found
    changed = [f"{field} was {before.get(field)}, now {value}" for field, value in found.items() if before.get(field) != value]
    if changed:
        raise InputError(f"{workdir} was made with other inputs ({'; '.join(changed)}): choose another --workdir")
    distributed.meet("the workdir is claimed")  # nobody writes it before all have read it
    if distributed.leads():
        workdir.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, found)
        artifacts.write_json(workdir / CONFIG_FILE, config.to_dict())
    return found


def stored_config(workdir: str | Path, default: ConfigDict) -> ConfigDict:
    """The config that made this workdir, or the default where there is none yet."""
    path = Path(workdir) / CONFIG_FILE
    return ConfigDict(json.loads(path.read_text())).lock() if path.exists() else default


def questions(config: ConfigDict, part: str) -> list[Question]:
    """The questions of config.train or config.test. For training, what may not be trained on raises (SPEC trap 8)."""
    c = config[part]
    if c.source == INVENTED:
        return _invented_questions(config, part)
    load = training_sets.training_questions if part == "train" else training_sets.evaluation_questions
    card = training_sets.card_for(c.source)
    return load(card, split=c.split or None, limit=c.limit or None, max_bad_records=config.corpus.max_bad_records)


def is_invented(corpus_source: str) -> bool:
    return corpus_source.partition(":")[0] == INVENTED


def invented(corpus_source: str) -> Invented:
    """The encyclopedia of `invented:passages=N,seed=S`."""
    try:
        fields = dict(part.split("=") for part in corpus_source.partition(":")[2].split(",") if part)
        numbers = {key: int(value) for key, value in fields.items()}
        encyclopedia = Invented(**numbers)
    except InputError:
        raise
    except (ValueError, TypeError):
        raise InputError(f"corpus.source is {corpus_source!r}, expected invented:passages=N,seed=S") from None
    return encyclopedia


def _invented_questions(config: ConfigDict, part: str) -> list[Question]:
    c = config[part]
    if part == "train" and c.split != "train":
        raise InputError(f"train.split is {c.split!r}: only the train split may be trained on")
    if not is_invented(config.corpus.source):
        raise InputError(f"{part}.source {INVENTED!r} needs the corpus {INVENTED}:passages=N,seed=S, found {config.corpus.source}")
    encyclopedia = invented(config.corpus.source)
    return list(encyclopedia.questions(c.split, c.limit or encyclopedia.count(c.split)))


def _data_identity(source: str) -> str:
    """The name of generated and catalogued data, the content of files."""
    if is_invented(source) or source.startswith(TFDS) or source in training_sets.CARDS:
        return source
    if not Path(source).exists():
        raise InputError(f"{source}: no such file or folder")
    return artifacts.identity(Path(source))
