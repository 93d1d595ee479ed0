"""What a run is made from: the corpus, questions and checkpoints that a config names, and the workdir that belongs to them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from radit_jax import artifacts, distributed, processor
from radit_jax.data import training_sets
from radit_jax.data.card import Card
from radit_jax.data.invented import Invented
from radit_jax.data.questions import Question
from radit_jax.data.sets import generated
from radit_jax.data.sets.own import own
from radit_jax.data.sources import HUB, TFDS
from radit_jax.errors import InputError
from radit_jax.paths import named
from radit_jax.types import Passage
from radit_jax.weights.encoder import check_pair
from radit_jax.weights.hf import read_json, resolve

INVENTED = "invented"
CONTEXTS = "contexts:"  # contexts:SET is the corpus of the texts that a set's questions are asked about
INPUTS_FILE, CONFIG_FILE = "inputs.json", "config.json"


def claim(config: ConfigDict, workdir: Path, *, keep: bool = True) -> dict[str, str]:
    """Returns the identity of every input, and (`keep`) writes them with the config into the workdir.

    A workdir belongs to one set of inputs: another corpus, question file or checkpoint is an InputError that names it.
    """
    corpora = {"corpus.source": config.corpus.source}
    checkpoints = {
        "lm.checkpoint": config.lm.checkpoint,
        "retriever.query_encoder": config.retriever.query_encoder,
        "retriever.document_encoder": config.retriever.document_encoder,
    }
    if config.lm_ft.mixture.text_source:
        corpora["lm_ft.mixture.text_source"] = config.lm_ft.mixture.text_source
    found = {field: _corpus_identity(source) for field, source in corpora.items()}
    found["train.source"] = _questions_identity(config.train.source)
    found |= {field: artifacts.identity(resolve(name)) for field, name in checkpoints.items()}
    check_pair(config.retriever.query_encoder, config.retriever.document_encoder)
    path = workdir / INPUTS_FILE
    before = read_json(path) if path.exists() else found
    changed = [f"{field} was {before[field]}, now {value}" for field, value in found.items() if before.get(field, value) != value]
    if changed:
        raise InputError(f"{workdir} was made with other inputs ({'; '.join(changed)}): choose another --workdir")
    distributed.meet("the workdir is claimed")  # nobody writes it before all have read it
    if keep and distributed.leads():
        workdir.mkdir(parents=True, exist_ok=True)
        artifacts.write_json(path, before | found)
        artifacts.write_json(workdir / CONFIG_FILE, config.to_dict())
    return found


def stored_config(workdir: str | Path, default: ConfigDict, overrides: Mapping[str, Any]) -> ConfigDict:
    """The config that made this workdir with `overrides` ({"lm_ft.steps": 60}) on top; without one yet, the default, which has them.

    Fields that the workdir's config did not know are the default's.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        return default
    config = ConfigDict(default.to_dict(), type_safe=False)
    try:
        config.update(read_json(path))
        config.update_from_flattened_dict(overrides)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the config of a run ({error})") from error
    return config.lock()


def with_dtypes(config: ConfigDict, platform: str) -> ConfigDict:
    """The config with compute dtypes in place of "auto", so that a workdir goes on with what it began with, on whatever machine."""
    config = copy.deepcopy(config)
    for part in ("lm", "retriever"):
        config[part].dtype = processor.dtype(config[part].dtype, platform, f"{part}.dtype")
    return config


def with_fields(config: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
    """The config with some fields, by their dotted names, replaced."""
    changed = copy.deepcopy(config)
    changed.update_from_flattened_dict(fields)
    return changed


def sets(config: ConfigDict, part: str) -> list[tuple[Card, list[Question]]]:
    """The sets that config.train or config.test names, separated by commas, with their questions: at most `limit` of each.

    For training, what may not be trained on raises (SPEC trap 8). Ids of several sets begin with the set's name.
    invented:passages=N among them is reading comprehension on an encyclopedia of its own, for a corpus without questions.
    """
    c = config[part]
    if c.source == INVENTED:
        return [(Card(INVENTED, INVENTED, own, "open_qa", in_lm_ft=True, in_r_ft=True), _invented_questions(config, part))]
    load = training_sets.evaluation_questions
    if part == "train":
        load = functools.partial(training_sets.training_questions, few=config.lm_ft.few_shot)
    found = []
    if not listed(c.source):
        raise InputError(f"{part}.source is empty, expected questions (a jsonl file, tfds:…) or {INVENTED}:passages=N")
    for source in listed(c.source):
        if is_invented(source):
            found.append((generated.card(), generated.questions(invented(source, f"{part}.source"), _split_of(c, part), c.limit or None)))
            continue
        card = training_sets.card_for(source)
        how = {"split": card.split_of(c.split), "limit": c.limit or None, "max_bad_records": config.corpus.max_bad_records}
        questions = load(card, **how)
        found.append(_open_book(card, questions) if _holds_texts_of(config.corpus.source, card) else (card, questions))
    if len(found) == 1:
        return found
    if repeated := twice(card.name for card, _ in found):
        raise InputError(f"{part}.source names {repeated[0]} twice")
    named = ((card, [dataclasses.replace(q, id=f"{card.name}/{q.id}") for q in questions]) for card, questions in found)
    return list(named)


def contexts(source: str, max_bad_records: int) -> list[Passage]:
    """The corpus `contexts:SET`: a document for every question of the set, with the question's id. InputError if it has no texts."""
    card = training_sets.card_for(_of_contexts(source))
    questions = training_sets.load_questions(card, split=card.split_of(""), max_bad_records=max_bad_records)
    found = [Passage(question.id, "", question.context) for question in questions if question.context]
    if not found:
        raise InputError(f"{source}: the questions of {card.name} have no texts that they are asked about")
    return found


def _open_book(card: Card, questions: list[Question]) -> tuple[Card, list[Question]]:
    """The questions without their texts, which are in the corpus now, and are to be found there."""
    asked = [dataclasses.replace(question, context=None, gold_id=question.id) for question in questions]
    return dataclasses.replace(card, retrieval="passages"), asked


def _holds_texts_of(corpus_source: str, card: Card) -> bool:
    return corpus_source.startswith(CONTEXTS) and training_sets.card_for(_of_contexts(corpus_source)).name == card.name


def _of_contexts(corpus_source: str) -> str:
    return corpus_source.removeprefix(CONTEXTS)


def listed(source: str) -> list[str]:
    """The names in a list separated by commas."""
    return [name.strip() for name in source.split(",") if name.strip()]


def twice(names: Iterable[str]) -> list[str]:
    """Those that are there more than once."""
    return [name for name, count in collections.Counter(names).items() if count > 1]


def is_invented(corpus_source: str) -> bool:
    return corpus_source.partition(":")[0] == INVENTED


def invented(source: str, field: str = "corpus.source") -> Invented:
    """The encyclopedia of `invented:passages=N,seed=S`."""
    try:
        fields = dict(part.split("=") for part in source.partition(":")[2].split(",") if part)
        numbers = {key: int(value) for key, value in fields.items()}
        encyclopedia = Invented(**numbers)
    except InputError:
        raise
    except (ValueError, TypeError):
        raise InputError(f"{field} is {source!r}, expected invented:passages=N,seed=S") from None
    return encyclopedia


def _invented_questions(config: ConfigDict, part: str) -> list[Question]:
    c = config[part]
    split = _split_of(c, part)
    if not is_invented(config.corpus.source):
        raise InputError(f"{part}.source {INVENTED!r} needs the corpus {INVENTED}:passages=N,seed=S, found {config.corpus.source}")
    encyclopedia = invented(config.corpus.source)
    return list(encyclopedia.questions(split, c.limit or encyclopedia.count(split)))


def _split_of(c: ConfigDict, part: str) -> str:
    """The split of generated questions; of them, too, only the train split may be trained on."""
    split = c.split or part
    if part == "train" and split != "train":
        raise InputError(f"train.split is {split!r}: only the train split may be trained on")
    return split


def _questions_identity(source: str) -> str:
    """The name of generated and catalogued sets, the content of files."""
    return ", ".join(source if is_invented(source) else _set_identity(source) for source in listed(source))


def _set_identity(source: str) -> str:
    card = training_sets.card_for(source)
    if card.source.startswith((TFDS, HUB)):
        return card.source
    part = "" if card.part == (None, None) else f"[{card.part[0]}:{card.part[1]}]"
    return _file_identity(card.source) + part


def _corpus_identity(source: str) -> str:
    if not source:
        raise InputError("corpus.source is empty, expected --config.corpus.source=FOLDER (or a jsonl file)")
    if source.startswith(CONTEXTS):
        return CONTEXTS + _set_identity(_of_contexts(source))
    return source if is_invented(source) else _file_identity(source)


def _file_identity(source: str) -> str:
    path = named(source)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    return artifacts.identity(path)
