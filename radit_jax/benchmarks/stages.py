"""Ours against transformers + torch, and against what people install, on the same records in one run (`launch/bench.py`).

Each kind of work is a thing done again and again by the pipeline: `embed` (passages → vectors), `score` (log p_LM(y | c∘x)), `lm_ft` (Eq. 3
steps), `lsr_ft` (Eq. 5 steps from stored scores), `generate` (Eq. 2 answers over k passages). Repetitions of ours and the peers' take turns
in one run, so that a busy machine slows all; a ratio is printed only after both were seen to compute the same. Peers run as processes of
their own Python environment.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from radit_jax import sharding
from radit_jax.benchmarks.contest import Work, compare
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.prompts import background_prompt
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.inference.ensemble import passage_logweights
from radit_jax.inference.score import Scorer, together
from radit_jax.pipeline import Pipeline
from radit_jax.retrieval import embed
from radit_jax.retrieval.encode import encoding
from radit_jax.training import batches, loop, steps
from radit_jax.training.losses import LsrOptions
from radit_jax.training.optim import OptimizerOptions, make_optimizer
from radit_jax.types import Example, Instance, Retrieved
from radit_jax.weights.encoder import load_encoder
from radit_jax.weights.export import export_lm
from radit_jax.weights.hf import resolve
from radit_jax.weights.lm import load_lm

K = 10  # passages per question in `score` and `generate` (paper: 10)
LM_FT_PASSAGES = 3  # k~ (paper: 3)
ADAMW = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0}
LEARNING_RATE = 1e-5


def bench(pipeline: Pipeline, kind: str, *, records: int, repetitions: int, peer_python: str | None) -> dict[str, Any]:
    """Times `kind` on `records` passages, questions or training examples; returns speeds (median, least, most), agreement and ratio.

    The ratio is our speed over the peer's: above 1, ours is faster. InputError for an unknown kind or when the peer does not come up.
    """
    if kind not in KINDS:
        raise InputError(f"bench: kind {kind!r}, expected one of {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        work = KINDS[kind](pipeline, records, Path(folder))
        dtype = dtype_of(kind, pipeline)
        work = dataclasses.replace(work, job=work.job | {"dtype": dtype})
        return compare(kind, work, repetitions=repetitions, peer_python=peer_python) | {"records": records, "dtype": dtype}


def dtype_of(kind: str, pipeline: Pipeline) -> str:
    """What this kind computes in."""
    c = pipeline.config
    return c.retriever.dtype if kind in ("embed", "lsr_ft") else c.lm.dtype


# -- the kinds ---------------------------------------------------------------------------------------------------------------------


def _embed(pipeline: Pipeline, records: int, folder: Path) -> Work:
    """Passages → vectors, tokenization included; in batches of one size on both sides."""
    c = pipeline.config.retriever
    store = pipeline.store
    if records > len(store):
        raise InputError(f"bench embed: {records} passages, the corpus has {len(store)}")
    texts = [passage.content for passage in store.read(range(records))]
    encoder = load_encoder(c.document_encoder, pooling=c.pooling or None, dtype=c.dtype)
    encode, tokenizer = encoding(encoder, sharding.make_mesh(1, 1)), load_tokenizer(c.document_encoder)
    sizes = {"batch_tokens": c.batch_tokens, "max_tokens": c.max_passage_tokens}

    def compare(ours_NxE: np.ndarray, theirs: list) -> dict[str, float]:
        theirs_NxE = np.asarray(theirs, np.float32)
        norms_N = np.linalg.norm(ours_NxE, axis=1) * np.linalg.norm(theirs_NxE, axis=1)
        return {"least_cosine": np.min(np.sum(ours_NxE * theirs_NxE, axis=1) / norms_N)}

    job = {"model": str(resolve(c.document_encoder)), "texts": texts, "pooling": encoder.config.pooling}
    return Work(
        "passages",
        len(texts),
        lambda: embed.embed_queries(encode, tokenizer, texts, **sizes),
        job | sizes | {"normalize": encoder.config.normalize},
        compare,
        lambda found: found["least_cosine"] > (0.99999 if c.dtype == "float32" else 0.999),
        others={"sentence-transformers": "sentence_transformers_peer.py", "fed-rag": "fed_rag_peer.py"},
    )


def _score(pipeline: Pipeline, records: int, folder: Path, *, apart: bool = False) -> Work:
    """log p of the answers of `records` questions after each of their k passages; given as token ids on both sides.

    They are questions that the stage scores together, with what was retrieved for them, for a passage that is given twice is read once.
    `apart`: no two questions have a passage in common.
    """
    c = pipeline.config
    maker = InstanceMaker(pipeline.tokenizer, c.lm.max_tokens)
    members = _questions(pipeline, pipeline.train_examples, records, K, apart=True) if apart else _scored_together(pipeline, records)
    pairs = [(m.example, passage) for m in members for passage in m.passages]
    instances = [maker.instance(e.id, e.prompt, passage.content, e.target, close=False) for e, passage in pairs]
    texts = [(background_prompt(passage.content, e.prompt), e.target) for e, passage in pairs]  # for a peer that tokenizes itself
    _export_lm(pipeline, folder)
    scorer = Scorer(pipeline.lm(tuned=False), batch_tokens=c.scoring.batch_tokens)
    job = {"model": str(folder / "lm"), "instances": [_plain(i) for i in instances], "texts": texts}
    job |= {"batch_tokens": c.scoring.batch_tokens}
    tokens_N = np.asarray([len(i.tokens_T) - i.target_start for i in instances])

    def compare(ours_N: np.ndarray, theirs: list) -> dict[str, float]:
        apart_N = np.abs(ours_N - np.asarray(theirs)) / tokens_N
        return {"mean_nats_apart_per_token": apart_N.mean(), "most_nats_apart_per_token": apart_N.max()}

    bound = 1e-3 if c.lm.dtype == "float32" else 0.1
    return Work(
        "tokens",
        sum(len(i.tokens_T) for i in instances),
        lambda: scorer(instances),
        job,
        compare,
        lambda found: found["mean_nats_apart_per_token"] < bound,
        others={"fed-rag": "fed_rag_peer.py"},
        differs={"fed-rag": "it reads logits one position late, those after the target token that they are to predict"},
    )


def _lm_ft(pipeline: Pipeline, records: int, folder: Path) -> Work:
    """Steps of all weights on `records` examples with their k~ passages: our packed rows; for the peer, the same instances in the same."""
    pipeline = pipeline.variant({"lm_ft.lora.rank": 0})  # the peers have no maps
    c = pipeline.config
    members = _questions(pipeline, pipeline.train_examples, records, LM_FT_PASSAGES)
    maker = InstanceMaker(pipeline.tokenizer, c.lm_ft.row_length)
    source = batches.PassageInstances(
        members, [m.example for m in members], maker, passages=LM_FT_PASSAGES, output_slots=c.lm_ft.output_slots
    )
    how = {"rows": c.lm_ft.rows, "accumulate": c.lm_ft.accumulate, "line": sharding.in_line(pipeline.mesh)}
    found = _whole_epoch(batches.lm_batches(source, **how, seed=c.seed), len(source))
    _export_lm(pipeline, folder)
    place = loop.placer(pipeline.mesh, rows=c.lm_ft.rows)
    model = pipeline.trainable_lm()
    run = _stepping(steps.lm_step, model, [batch for batch, _ in found], place, pipeline.mesh, sharding.LM_RULES)

    instances = [[_unpacked(source[int(n)]) for n in numbers] for _, numbers in found]
    texts = _with_their_passages(source, itertools.chain(*(numbers for _, numbers in found)))
    job = {"model": str(folder / "lm"), "steps": instances, "optimizer": {"lr": LEARNING_RATE, **ADAMW}, "examples": texts}
    bound = 1e-3 if c.lm.dtype == "float32" else 0.03
    return Work(
        "tokens",
        sum(len(instance["tokens"]) for members in instances for instance in members),
        run,
        job | {"template": background_prompt("{context}", "{query}") + "{response}"},
        _losses_apart,
        lambda found: found["most_relative_loss_apart"] < bound,
        others={"fed-rag": "fed_rag_peer.py"},
        differs={"fed-rag": "its loss is over passage and question too, not of the answer alone, and it learns no end"},
    )


def _lsr_ft(pipeline: Pipeline, records: int, folder: Path) -> Work:
    """R-ft steps on `records` questions with k passages each, from LM scores that are drawn: speed hangs on no score."""
    c, rng = pipeline.config, np.random.default_rng(0)
    members = _questions(pipeline, pipeline.train_examples, records, K)
    name = c.retriever.query_encoder
    encoder = load_encoder(name, pooling=c.retriever.pooling or None, dtype=c.retriever.dtype)
    tokenizer = load_tokenizer(name)
    vectors_NxE = rng.standard_normal((len(pipeline.store), encoder.config.width)).astype(np.float32)
    vectors_NxE /= np.linalg.norm(vectors_NxE, axis=1, keepdims=True)
    scores = {m.example.id: ([p.id for p in m.passages], rng.normal(-5, 2, K).astype(np.float32), 4) for m in members}
    tokens, mask = tokenizer.encode_with_specials([m.example.query for m in members], c.retriever.max_query_tokens)
    source = batches.LsrSource(members, scores, vectors_NxE, tokens, mask, c.retriever.score_scale)
    size = min(c.lsr_ft.batch, records)
    line = sharding.in_line(pipeline.mesh)
    data = batches.lsr_batches({"train": source}, shares={"train": 1.0}, batch=size, seed=c.seed, line=line)
    found = [batch for batch, _ in itertools.islice(data, max(1, records // size))]
    fields = {name: c.lsr_ft[name] for name in ("score", "tau", "direction", "prior")} | {"score_scale": c.retriever.score_scale}
    place = loop.placer(pipeline.mesh, rows=size)
    options = LsrOptions(**fields)
    run = _stepping(steps.lsr_step, encoder, found, place, pipeline.mesh, sharding.ENCODER_RULES, options=options)

    told = [
        {
            "ids": [ids[real].tolist() for ids, real in zip(whole.query_tokens_BxT, whole.query_mask_BxT)],
            "passages": whole.passages_BxKxE.tolist(),
            "logp": whole.lm_logp_BxK.tolist(),
            "base": whole.base_logits_BxK.tolist(),
        }
        for whole in (jax.tree.map(lambda leaf: leaf[0], batch) for batch in found)
    ]
    job = {"model": str(resolve(name)), "batches": told, "optimizer": {"lr": LEARNING_RATE, **ADAMW}, **fields}
    job |= {"pooling": encoder.config.pooling, "normalize": encoder.config.normalize}
    why = "its loss does not reach the encoder: the scores become a new leaf; beside sentence-transformers 6.2 it does not start"
    return Work(
        "questions",
        size * len(found),
        run,
        job,
        _losses_apart,
        lambda found: found["most_relative_loss_apart"] < (1e-3 if c.retriever.dtype == "float32" else 0.01),
        cannot={"fed-rag": why},
    )


def _generate(pipeline: Pipeline, records: int, folder: Path) -> Work:
    """Free-text answers of `records` questions over k passages each, at sequence level; prompts given as token ids on both sides."""
    c = pipeline.config
    _export_lm(pipeline, folder)
    ensemble = pipeline.ensemble(False)
    logw_K = passage_logweights(np.linspace(0.7, 0.3, K), c.retriever.score_scale)  # typical scores of unit vectors
    questions = [
        ensemble.prompted(m.example.id, m.example.prompt, [passage.content for passage in m.passages], logw_K)
        for m in _questions(pipeline, pipeline.test_examples, records, K)
    ]

    def run() -> list[dict[str, Any]]:
        return [{"text": answer.text, "logprob": answer.logprob} for answer in ensemble.generate(questions, level="sequence")]

    def compare(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
        same = [a["text"] == b["text"] for a, b in zip(ours, theirs, strict=True)]
        apart = [abs(a["logprob"] - b["logprob"]) for a, b, equal in zip(ours, theirs, same) if equal]
        return {"same_answers": np.mean(same), "mean_nats_apart_where_same": np.mean(apart) if apart else np.inf}

    job = {
        "model": str(folder / "lm"),
        "questions": [{"prompts": [list(map(int, ids)) for ids in q.prompts], "logw": q.logw_K.tolist()} for q in questions],
        "stops": np.asarray(ensemble.stops_I).tolist(),
        "max_new_tokens": ensemble.max_new_tokens,
        "batch_tokens": ensemble.batch_tokens,
    }
    # Greedy decoding in bfloat16 takes another branch where two tokens are as likely.
    least, bound = (0.98, 1e-2) if c.lm.dtype == "float32" else (0.7, 0.3)
    return Work(
        "questions",
        len(questions),
        run,
        job,
        compare,
        lambda found: found["same_answers"] >= least and found["mean_nats_apart_where_same"] < bound,
        others={"transformers.generate": "transformers_generate_peer.py"},
        differs={"transformers.generate": "it gives an answer a passage; these are weighed by p_R alone, not by Eq. 2"},
        cannot={"fed-rag": "it puts all k passages into one prompt and has no mixture over passages"},
    )


KINDS: dict[str, Callable[[Pipeline, int, Path], Work]] = {
    "embed": _embed,
    "score": _score,
    "lm_ft": _lm_ft,
    "lsr_ft": _lsr_ft,
    "generate": _generate,
}


def _stepping(step: Callable, model: nnx.Module, found: Sequence[Any], place: Callable, mesh: Mesh, rules, **static: Any) -> Callable:
    """A function that trains on these batches, going on from where its last call ended, and returns the loss of each."""
    graphdef, params = nnx.split(model)
    tx = make_optimizer(OptimizerOptions(peak_lr=LEARNING_RATE, warmup_steps=0, decay="constant", **ADAMW), steps=1)
    held = {"state": steps.init_state(params, tx)}
    compiled = steps.compile_step(step, graphdef, tx, held["state"], mesh, rules, **static)

    def run() -> list[float]:
        losses = []
        for batch in found:
            held["state"], metrics = compiled(held["state"], place(batch))
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]

    return run


def _losses_apart(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Of the steps that both made: what ships may divide an epoch into fewer."""
    apart = np.max([abs(a - b) / b for a, b in zip(ours, theirs)])  # not a number, if one is
    return {"most_relative_loss_apart": apart, "first_loss": ours[0], "peer_first_loss": theirs[0]}


# -- records ------------------------------------------------------------------------------------------------------------------------


def _scored_together(pipeline: Pipeline, count: int) -> list[Retrieved]:
    """Of the groups of so many training questions that have passages in common, the one that has as many as half of the others."""
    _, retrieval = pipeline.retrieved("train", [example for example in pipeline.train_examples if example.retrieve], K)
    whole = [group for group in together(retrieval.rows_NxK, count) if len(group) == count]
    if not whole:
        raise InputError(f"bench: {count} questions, the set has {len(retrieval)} (config.train.limit)")
    return [retrieval[i] for i in sorted(whole, key=lambda group: len(np.unique(retrieval.rows_NxK[group])))[len(whole) // 2]]


def _questions(pipeline: Pipeline, examples: Sequence[Example], count: int, k: int, *, apart: bool = False) -> list[Retrieved]:
    """Questions with k passages: those of the document that answers, then the ones after it, without a search.

    `apart` leaves out questions with a passage that one before them has.
    """
    members = (_with_passages(pipeline.store, example, i * k, k) for i, example in enumerate(examples))
    found = list(itertools.islice(_apart(members) if apart else members, count))
    if len(found) < count:
        kind = "questions without a passage in common" if apart else "questions"
        raise InputError(f"bench: {count} {kind}, the set has {len(found)} (config.train.limit, config.test.limit)")
    return found


def _apart(members: Iterable[Retrieved]) -> Iterator[Retrieved]:
    seen: set[int] = set()
    for member in members:
        rows = set(member.rows_K.tolist())
        if seen.isdisjoint(rows):
            seen |= rows
            yield member


def _with_passages(store, example: Example, otherwise: int, k: int) -> Retrieved:
    first = int(store.rows_of_document(example.gold_id)[0]) if example.gold_id else otherwise
    rows_K = (first + np.arange(k)) % len(store)
    return Retrieved(example, tuple(store.read(rows_K)), rows_K, np.zeros(k, np.float32))


def _whole_epoch(data: Iterator, instances: int) -> list[tuple[Any, np.ndarray]]:
    """Batches until about every instance was seen once; at least one."""
    counts, found = 0, []
    for batch, numbers in itertools.islice(data, max(1, instances)):
        if found and counts + len(numbers) > instances:
            break
        found.append((batch, numbers))
        counts += len(numbers)
    return found


def _with_their_passages(source: batches.PassageInstances, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """The instances of these numbers as texts, by example: what a peer reads that makes instances of its own."""
    found: dict[int, list[int]] = collections.defaultdict(list)
    for n in numbers:
        i, j = source.pairs[int(n)]
        found[int(i)].append(int(j))
    told = []
    for i, which in found.items():
        example, passages = source.retrieved[i].example, source.retrieved[i].passages
        texts = [example.background if j == batches.OWN_TEXT else passages[j].content for j in which]
        told.append({"query": example.prompt, "response": example.target, "passages": texts})
    return told


def _unpacked(features: dict[str, np.ndarray]) -> dict[str, Any]:
    """A training instance as the peer reads it; the first slot stands before the first target token."""
    return {"tokens": features["tokens"].tolist(), "target_start": int(features["slots"][0]) + 1}


def _plain(instance: Instance) -> dict[str, Any]:
    return {"tokens": instance.tokens_T.tolist(), "target_start": instance.target_start}


def _export_lm(pipeline: Pipeline, folder: Path) -> None:
    """The untuned LM's float32 weights in `folder`/lm, for the peer."""
    export_lm(load_lm(pipeline.config.lm.checkpoint), pipeline.tokenizer, folder / "lm")
