"""The two trainings as stages of a pipeline: which examples, in which mixture, with which passages and scores (paper section 2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from radit_jax import distributed
from radit_jax.artifacts import Artifact, digest
from radit_jax.asking import askings
from radit_jax.data import corpus, mixture
from radit_jax.data.card import Card
from radit_jax.data.prompts import completion_example
from radit_jax.data.tokenizer import Tokenizer, load_tokenizer
from radit_jax.errors import InputError
from radit_jax.inputs import listed
from radit_jax.logbook import say
from radit_jax.training import tune
from radit_jax.training.losses import LsrOptions
from radit_jax.types import Example

if TYPE_CHECKING:
    from radit_jax.pipeline import Pipeline


def both(pipeline: Pipeline) -> str:
    """Trains both models where there is nothing to measure them with; returns their folders, a line each."""
    retriever, lm = pipeline.tuned_retriever, pipeline.tuned_lm
    say("no table, for there are no questions to measure with (test.source is empty): these are the tuned models")
    return f"query encoder: {retriever.path}\nLM: {lm.path}"


def lm_ft_sets(pipeline: Pipeline) -> dict[str, tuple[Card, list[Example]]]:
    """The sets that LM-ft learns from."""
    few = pipeline.config.lm_ft.few_shot
    return {name: (card, of_set) for name, (card, of_set) in pipeline.train_sets.items() if card.in_lm_ft or few}


def r_ft_sets(pipeline: Pipeline) -> dict[str, tuple[Card, list[Example]]]:
    """The sets whose questions R-ft learns from."""
    return {name: (card, of_set) for name, (card, of_set) in pipeline.train_sets.items() if card.in_r_ft}


def completes(pipeline: Pipeline) -> bool:
    """Whether R-ft learns from corpus completion: beside questions, or for want of them."""
    return bool(pipeline.config.lsr_ft.completion_share) or not r_ft_sets(pipeline)


# -- LM-ft --------------------------------------------------------------------------------------------------------------------------------


def lm_ft(pipeline: Pipeline) -> Artifact:
    """LM-ft (Eq. 3): every example with its k~ passages by the untuned retriever, beside plain text where the mixture has some."""
    config, c = pipeline.config, pipeline.config.lm_ft
    if c.passages > config.retrieval.k:
        raise InputError(f"lm_ft.passages is {c.passages}, more than the {config.retrieval.k} that retrieval.k retrieves")
    chosen = lm_ft_sets(pipeline)
    if not chosen:
        raise InputError(f"train.source has no set for LM-ft, only {', '.join(pipeline.train_sets)}")
    examples = [example for _, of_set in chosen.values() for example in of_set]
    retrieved, retrieval = pipeline.retrieved("train", examples, config.retrieval.k)
    dialogues = [name for name, (card, _) in chosen.items() if card.category == "dialogue"]
    sizes = {name: len(of_set) for name, (_, of_set) in chosen.items()}
    shares = mixture.lm_ft_shares(sizes, dialogues, cap=c.mixture.cap, dialogue=c.mixture.dialogue_share, text=c.mixture.text_share)
    made_from = {
        "retrieved": retrieved.fingerprint,
        "prompts": digest([(e.id, e.prompt, e.target, e.background) for e in examples]),
        "shares": shares,
        "lm": pipeline.inputs["lm.checkpoint"],
        "options": _that_matter(c),
        "dtype": config.lm.dtype,
        "seed": config.seed,
    }
    texts: corpus.PassageStore | tuple = ()
    if c.mixture.text_share:
        artifact, texts = _texts(pipeline)
        made_from["texts"] = artifact.fingerprint
    develop, made_from["dev"] = _development(pipeline)

    def write(folder: Path) -> dict[str, Any]:
        of_sets = {name: retrieval.of(of_set) for name, (_, of_set) in chosen.items()}
        how = {"mesh": pipeline.mesh, "seed": config.seed, "loggers": listed(config.loggers), "develop": develop}
        return tune.lm(pipeline.trainable_lm(), pipeline.tokenizer, of_sets, texts, shares, folder, c, **how)

    return pipeline.stage("lm_ft", made_from, write)


def _texts(pipeline: Pipeline) -> tuple[Artifact, corpus.PassageStore]:
    """Plain text: lm_ft.mixture.text_source in pieces of text_words words, or the passages of the corpus."""
    c = pipeline.config.lm_ft.mixture
    if not c.text_source:
        return pipeline.passages, pipeline.store
    made_from = {"source": pipeline.inputs["lm_ft.mixture.text_source"], "max_words": c.text_words}

    def write(folder: Path) -> dict[str, Any]:
        documents = pipeline.documents(c.text_source)
        return corpus.build_store(documents, folder, max_words=c.text_words) if distributed.leads() else {}

    artifact = pipeline.stage("texts", made_from, write)
    return artifact, corpus.PassageStore(artifact.path)


def _development(pipeline: Pipeline) -> tuple[Callable[[nnx.Module], dict[str, float]] | None, str | None]:
    """(an LM → the metric of every development task and their "mean", with the untuned retriever; what that hangs on), SPEC section 3."""
    names = listed(pipeline.config.lm_ft.dev_tasks)
    if not names:
        return None, None
    asked = askings(pipeline, names)

    def develop(lm: nnx.Module) -> dict[str, float]:
        found = {}
        for asking in asked:
            ensemble = pipeline.ensemble(lm, max_new_tokens=asking.task.max_new_tokens)
            _, per_question, _ = asking.answer(ensemble, tuned=False)
            found[asking.task.name] = float(np.mean(per_question[asking.task.metric]))
        return {**found, "mean": float(np.mean(list(found.values())))}

    return develop, digest([asking.made_from(tuned=False) for asking in asked])  # and no searching between training steps


# -- R-ft ---------------------------------------------------------------------------------------------------------------------------------


CHANGE_NOTHING = ("checkpoint_every", "log_every")  # fields of a training
SCORERS = {"untuned": False, "tuned": True}  # lsr_ft.scorer: is its LM tuned?


def r_ft(pipeline: Pipeline) -> Artifact:
    """R-ft (Eq. 5): the query encoder alone, or both, from the stored LM scores."""
    config, c = pipeline.config, pipeline.config.lsr_ft
    examples = [example for _, of_set in r_ft_sets(pipeline).values() for example in of_set]
    if completes(pipeline) and not c.completion_examples:
        none = f"train.source has no set for R-ft, only {', '.join(pipeline.train_sets)}"
        why = f"lsr_ft.completion_share is {c.completion_share}" if examples else none
        raise InputError(f"{why}, and lsr_ft.completion_examples is 0")
    if c.scorer not in SCORERS:
        raise InputError(f"lsr_ft.scorer is {c.scorer!r}, expected {' or '.join(SCORERS)}")
    if c.encoders not in tune.ENCODERS:
        raise InputError(f"lsr_ft.encoders is {c.encoders!r}, expected {' or '.join(tune.ENCODERS)}")
    scored = {"train": pipeline.lm_scores("train", examples, SCORERS[c.scorer])} if examples else {}
    if (left_out := {example.id for example in unseen(pipeline)}) and examples:
        artifact, retrieval = scored["train"]
        scored["train"] = artifact, retrieval.of([example for example in retrieval.examples if example.id not in left_out])
    if completes(pipeline):  # of a corpus without questions they are all there is to train on
        scored["completion" if examples else "train"] = pipeline.lm_scores("completion", completion_examples(pipeline), SCORERS[c.scorer])
    made_from = {
        "scores": {name: artifact.fingerprint for name, (artifact, _) in scored.items()},
        "query_encoder": pipeline.inputs["retriever.query_encoder"],
        "options": _that_matter(c),
        "score_scale": config.retriever.score_scale,
        "seed": config.seed,
    }
    if config.retriever.dtype != "float32":  # which it always was before there was a choice
        made_from["computes_in"] = config.retriever.dtype
    both, document = c.encoders == tune.BOTH, config.retriever.document_encoder
    if both:
        made_from |= {"document_encoder": pipeline.inputs["retriever.document_encoder"]}
        made_from |= {key: config.retriever[key] for key in ("pooling", "normalize", "dtype", "max_passage_tokens")}

    def write(folder: Path) -> dict[str, Any]:
        return tune.query_encoder(
            pipeline.trainable_retriever(),
            load_tokenizer(config.retriever.query_encoder),
            {name: (artifact.path, retrieval) for name, (artifact, retrieval) in scored.items()},
            pipeline.searcher,
            pipeline.store,
            folder,
            c,
            options=lsr_options(config),
            max_query_tokens=config.retriever.max_query_tokens,
            mesh=pipeline.mesh,
            seed=config.seed,
            loggers=listed(config.loggers),
            read_passages=passage_reader(load_tokenizer(document), config.retriever.max_passage_tokens) if both else None,
        )

    return pipeline.stage("lsr_ft", made_from, write)


def lsr_options(config: ConfigDict) -> LsrOptions:
    """The fields that R-ft's loss reads. InputError for what is none."""
    c = config.lsr_ft
    return LsrOptions(c.score, c.tau, c.direction, config.retriever.score_scale, c.prior, c.anchor)


def unseen(pipeline: Pipeline) -> list[Example]:
    """The questions that R-ft is not shown: with lsr_ft.fold = "2/5" every fifth, from the second one; without a fold none."""
    fold = pipeline.config.lsr_ft.fold
    if not fold:
        return []
    numbers = re.fullmatch(r"(\d+)/(\d+)", fold)
    if not numbers or not 1 <= int(numbers[1]) <= int(numbers[2]) or int(numbers[2]) < 2:
        raise InputError(f"lsr_ft.fold is {fold!r}, expected a number and how many there are, as 2/5")
    questions = [example for _, of_set in r_ft_sets(pipeline).values() for example in of_set if example.retrieve]
    return questions[int(numbers[1]) - 1 :: int(numbers[2])]


def passage_reader(tokenizer: Tokenizer, width: int) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """texts → (tokens_KxT, mask_KxT) for the document encoder, always `width` tokens wide."""

    def read(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens_KxT, mask_KxT = tokenizer.encode_with_specials(texts, width)
        room = [(0, 0), (0, width - tokens_KxT.shape[1])]
        return np.pad(tokens_KxT, room), np.pad(mask_KxT, room)

    return read


def completion_examples(pipeline: Pipeline) -> list[Example]:
    """Corpus completion for R-ft (paper section 2.4): passages drawn by the seed, each excluded from its own candidates.

    All that are long enough where the corpus has fewer than lsr_ft.completion_examples; InputError where it has none.
    """
    c, store = pipeline.config.lsr_ft, pipeline.store
    half = c.completion_tokens
    made: list[Example] = []
    for row in np.random.default_rng(pipeline.config.seed).permutation(len(store)):
        example = completion_example(store[int(row)], pipeline.tokenizer, n_prompt=half, n_target=half, min_tokens=c.completion_min_tokens)
        if example is not None:
            made.append(example)
        if len(made) == c.completion_examples:
            return made
    found = f"{len(made)} of {len(store):,} passages have lsr_ft.completion_min_tokens = {c.completion_min_tokens} tokens or more"
    if not made:
        raise InputError(f"R-ft has nothing to complete: {found}")
    say(f"lsr_ft: {found}; lsr_ft.completion_examples = {c.completion_examples:,} were asked for")
    return made


def _that_matter(c: ConfigDict) -> dict[str, Any]:
    """The fields of a training config that change its result. What is as it was before there was a choice is left out, so that
    trainings from then are found: no LoRA, the query encoder alone, all questions, a batch in one."""
    fields = {key: value for key, value in c.to_dict().items() if key not in CHANGE_NOTHING}
    as_before = {
        "lora": not fields.get("lora", {}).get("rank"),
        "encoders": fields.get("encoders") == tune.QUERY,
        "fold": not fields.get("fold"),
        "at_once": not fields.get("at_once"),
    }
    return {key: value for key, value in fields.items() if not as_before.get(key)}
