"""The two trainings of RA-DIT, assembled: examples with passages and scores in, tuned parameters in a folder out."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from radit_jax import artifacts, distributed, sharding
from radit_jax.checkpoint import save_params
from radit_jax.data import mixture
from radit_jax.data.corpus import PassageStore
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.tokenizer import Tokenizer
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics
from radit_jax.inference.score import read_scores
from radit_jax.logbook import say
from radit_jax.models import flash, lora
from radit_jax.retrieval import embed, encode
from radit_jax.retrieval.retrieve import Retrieval
from radit_jax.retrieval.search import Searcher
from radit_jax.training import batches, loop, steps
from radit_jax.training.losses import LsrOptions
from radit_jax.training.optim import OptimizerOptions, make_optimizer
from radit_jax.types import Example, Passage, PyTree, Retrieved

PARAMS = "params"  # folder of the tuned parameters inside the artifact
BEST = "best"  # folder of the best parameters so far, while R-ft runs
BEST_FOUND = "best.json"  # and how good they are
VALIDATION_TOKENS = 8192  # of one embedding call
ENCODERS = QUERY, BOTH = "query", "both"  # lsr_ft.encoders: what R-ft trains


def lm(
    model: nnx.Module,
    tokenizer: Tokenizer,
    sets: Mapping[str, Retrieval],
    texts: Sequence[Passage],
    shares: Mapping[str, float],
    folder: Path,
    c: ConfigDict,
    *,
    mesh: Mesh,
    seed: int,
    loggers: Sequence[str] = (),
    develop: Callable[[nnx.Module], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """LM-ft (paper section 2.2, Eq. 3): trains all weights on packed rows and writes them to `folder`/params. Returns the facts.

    Of an adapted LM (models/lora.py) the low-rank maps alone are trained and written.

    `sets` are the examples with their passages by set, `texts` plain text (mixture.TEXT among the `shares`). `develop` measures an LM on
    the development tasks, every `c.validate_every` steps: the parameters of the best "mean" are kept (SPEC section 3), else the last.
    """
    maker = InstanceMaker(tokenizer, c.row_length)
    fitting = {name: _fitting(name, of_set, maker, c.output_slots) for name, of_set in sets.items()}
    sources: dict[str, Any] = {
        name: batches.PassageInstances(of_set, of_set.examples, maker, passages=c.passages, output_slots=c.output_slots)
        for name, of_set in fitting.items()
    }
    if len(texts):
        sources[mixture.TEXT] = batches.TextInstances(texts, maker, output_slots=c.output_slots)
    source = batches.MixedInstances(sources, shares)
    say(_mixture_table(source, {name: len(of_set) for name, of_set in fitting.items()}, c))
    here, line = sharding.rows_here(mesh, c.rows), sharding.in_line(mesh)
    data = batches.lm_batches(source, rows=c.rows, accumulate=c.accumulate, seed=seed, here=here, line=line)
    graphdef, params, *frozen = lora.split(model)
    tx = make_optimizer(OptimizerOptions(**c.optimizer.to_dict()), c.steps)
    state, step = steps.begin(steps.lm_step, graphdef, tx, params, mesh, sharding.LM_RULES, frozen=frozen)
    say(sharding.table(state))
    if frozen:
        say(f"lm_ft: {lora.summary(state.params, frozen)}")
    reads = (model.config.attention, model.config, c.row_length, mesh.shape[sharding.MODEL])
    if flash.choose(*reads) == flash.REFERENCE and (why := flash.obstacle(*reads)):
        say(f"lm_ft: attention without the flash kernel: {why}")
    best = Best(folder, by="mean") if develop else None

    def validate(params: PyTree, at: int) -> dict[str, float]:
        found = develop(lora.merged(nnx.merge(graphdef, params, *frozen)))
        best.keep(found, params, at)
        return {f"dev_{key}": value for key, value in found.items()}

    state, facts = loop.run(
        "lm_ft",
        step,
        state,
        data,
        folder,
        _loop_options(c, c.steps, loggers, evaluate_every=c.validate_every if develop else 0),
        place=loop.placer(mesh, rows=c.rows),
        evaluate=validate if develop else None,
        describe=source.describe,
        enough=lambda at: best is not None and best.is_past(at, c.patience, c.validate_every),
    )
    if best is None:
        save_params(folder / PARAMS, state.params)
    else:
        facts |= best.result()
    return {**facts, "steps": int(state.step), "instances": len(source), "truncated": maker.truncations.count}


def query_encoder(
    model: nnx.Module,
    tokenizer: Tokenizer,
    scored: Mapping[str, tuple[Path, Sequence[Retrieved]]],
    searcher: Searcher,
    store: PassageStore,
    folder: Path,
    c: ConfigDict,
    *,
    options: LsrOptions,
    max_query_tokens: int,
    mesh: Mesh,
    seed: int,
    loggers: Sequence[str] = (),
    read_passages: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]] | None = None,
) -> dict[str, Any]:
    """R-ft (paper section 2.3, Eqs. 4 and 5): trains the query encoder from stored scores and writes the best of it to `folder`/params.

    The best is the one of highest MRR on the held-out questions.

    `scored` names the sources: "train" (questions, of which a share is held out) and, in a mixture, "completion"; with a completion_share
    of 1 the questions only tell which is the best.
    `model` may be a DualEncoder: then both encoders are trained, on passages as `read_passages` reads their texts, and the last step's are
    written, for every look at held-out questions would need the whole corpus embedded anew.
    """
    held_out, train_members = _split(scored["train"][1], held_out_share(c), seed)
    members = {"train": train_members, **{name: list(retrieval) for name, (_, retrieval) in scored.items() if name != "train"}}
    shares = {"train": 1.0} if len(scored) == 1 else {"train": 1.0 - c.completion_share, "completion": c.completion_share}
    members = {name: chosen for name, chosen in members.items() if shares[name]}
    sources = {
        name: _lsr_source(chosen, read_scores(scored[name][0]), searcher, tokenizer, options.score_scale, max_query_tokens, read_passages)
        for name, chosen in members.items()
    }
    counted = next(iter(members))  # the questions, unless completion is all
    total = lsr_steps(c.epochs, len(members[counted]), shares[counted], c.batch)
    for name, chosen in members.items():
        epochs = total * c.batch * shares[name] / len(chosen)
        say(f"lsr_ft: {name}: {len(chosen):,} examples, share {shares[name]:.4f}, {epochs:.2f} epochs")
    parts = lsr_parts(c, mesh)
    here, line = sharding.rows_here(mesh, c.batch // parts), sharding.in_line(mesh)
    data = batches.lsr_batches(sources, shares=shares, batch=c.batch, parts=parts, seed=seed, here=here, line=line)
    graphdef, params = nnx.split(model)
    tx = make_optimizer(OptimizerOptions(**c.optimizer.to_dict()), total)
    state, step = steps.begin(steps.lsr_step, graphdef, tx, params, mesh, sharding.ENCODER_RULES, options=options)
    say(sharding.table(state))
    validate = _Validation(graphdef, tokenizer, held_out, searcher, store, max_query_tokens, folder, mesh) if held_out else None
    if validate:
        say("lsr_ft: untuned " + " ".join(f"{key} {value:.4f}" for key, value in validate.measure(state.params).items()))
    state, facts = loop.run(
        "lsr_ft",
        step,
        state,
        data,
        folder,
        _loop_options(c, total, loggers, evaluate_every=c.validate_every if validate else 0),
        place=loop.placer(mesh, rows=c.batch // parts),
        evaluate=validate,
        enough=lambda at: validate is not None and validate.best.is_past(at, c.patience, c.validate_every),
        describe=lambda numbers: sources[counted].describe(numbers) if len(sources) == 1 else str(numbers[:8]),
    )
    if validate:
        facts |= validate.best.result()
    else:
        save_params(folder / PARAMS, state.params)
    return {
        **facts,
        "steps": int(state.step),
        "planned_steps": total,
        "questions": len(members.get("train", ())),
        "held_out": len(held_out),
    }


def _fitting(name: str, of_set: Retrieval, maker: InstanceMaker, output_slots: int) -> Retrieval:
    """The examples whose prompt and answer fit a row even without a passage; says which are left out. InputError if none fits."""
    fits = [_fits(example, maker, output_slots) for example in of_set.examples]
    if all(fits):
        return of_set
    kept, left_out = list(itertools.compress(of_set.examples, fits)), fits.count(False)
    room = f"a row of {maker.max_tokens} tokens with {output_slots} output slots (lm_ft.row_length, lm_ft.output_slots)"
    if not kept:
        raise InputError(f"{name}: none of {left_out} examples fits {room}")
    first = of_set.examples[fits.index(False)].id
    say(f"lm_ft: {name}: {left_out} of {len(of_set.examples)} examples left out, which do not fit {room} (first: {first})")
    return of_set.of(kept)


def _fits(example: Example, maker: InstanceMaker, output_slots: int) -> bool:
    outputs = len(maker.target_ids(example.target)) + 1  # and the end
    return outputs <= output_slots and len(maker.bare_prompt_ids(example.prompt)) + outputs <= maker.max_tokens


def _mixture_table(source: batches.MixedInstances, examples: Mapping[str, int], c: ConfigDict) -> str:
    """Sets, sizes, caps, shares and epochs of LM-ft. Epochs go by the mean length of some instances, and by rows that are full."""
    lengths = {name: np.mean([len(part[int(n)]["tokens"]) for n in _some(part)]) for name, part in source.sources.items()}
    drawn = c.steps * c.rows * c.accumulate * c.row_length / sum(source.shares[name] * length for name, length in lengths.items())
    rows = [("set", "examples", "counted as", "instances", "tokens each", "share", "epochs")]
    for name, part in source.sources.items():
        size, share = examples.get(name, len(part)), source.shares[name]
        counted = "–" if name == mixture.TEXT else f"{min(size, c.mixture.cap):,}"
        shown = f"{len(part):,}", f"{lengths[name]:.0f}", f"{share:.4f}", f"{drawn * share / len(part):.2f}"
        rows.append((name, f"{size:,}", counted, *shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(f"lm_ft: {row[0].ljust(widths[0])}  " + "  ".join(map(str.rjust, row[1:], widths[1:])) for row in rows)


def _some(part: Sequence[Any], count: int = 50) -> np.ndarray:
    """Numbers of instances, evenly over all of them."""
    return np.unique(np.linspace(0, len(part) - 1, count).astype(int))


class Best:
    """The best parameters of a run so far, by one measure: in `folder`/best, with how good they are in best.json."""

    def __init__(self, folder: Path, by: str):
        self.folder, self.by = folder, by
        path = folder / BEST_FOUND
        self.found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}  # the same on every process
        distributed.meet("best so far is read")

    def keep(self, found: Mapping[str, float], params: PyTree, step: int) -> None:
        """Takes the parameters if they are better than all before."""
        if found[self.by] > self.found.get(self.by, -math.inf):
            self.found = {**found, "step": step}
            save_params(self.folder / BEST, params)
            if distributed.leads():
                artifacts.write_json(self.folder / BEST_FOUND, self.found)

    def is_past(self, step: int, validations: int, every: int) -> bool:
        """Whether so many validations since brought nothing better (0: never)."""
        return bool(validations) and step - self.found.get("step", step) >= validations * every

    def result(self) -> dict[str, float]:
        """Makes them the result of the run; returns the facts."""
        if distributed.leads() and (self.folder / BEST).exists():  # a run killed after this line has renamed it already
            (self.folder / BEST).replace(self.folder / PARAMS)
        return {f"best_{key}": value for key, value in self.found.items()}


def held_out_share(c: ConfigDict) -> float:
    """Share of the questions that R-ft looks at and does not learn from: none where both encoders learn (see `query_encoder`)."""
    return 0.0 if c.encoders == BOTH else c.validation


def lsr_parts(c: ConfigDict, mesh: Mesh) -> int:
    """How many equal parts a batch of R-ft is read in: as few as have no more than `c.at_once` questions, or one a device."""
    sharding.check_rows(mesh, c.batch, "lsr_ft.batch")
    data = mesh.shape[sharding.DATA]
    most = max(c.at_once or c.batch, data)
    return c.batch // next(rows for rows in range(most, 0, -1) if c.batch % rows == 0 and rows % data == 0)


def lsr_steps(epochs: float, counted: int, share: float, batch: int) -> int:
    """Steps of R-ft. An epoch is one pass over what is counted (questions, or completions alone), which has this share of the mixture."""
    return max(1, round(epochs * counted / share / batch))


def planned_steps(c: ConfigDict, questions: int, completions: int) -> int:
    """Steps of R-ft by its config, before it is begun. `questions` are those that it learns from."""
    by_questions = questions and c.completion_share < 1
    counted, share = (questions, 1.0 - c.completion_share) if by_questions else (completions, 1.0)
    return lsr_steps(c.epochs, counted, share, c.batch)


class _Validation:
    """MRR and recall@1 ("the passage holds an answer") on held-out questions; keeps the parameters of the best MRR."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        tokenizer: Tokenizer,
        held_out: Sequence[Retrieved],
        searcher: Searcher,
        store: PassageStore,
        max_tokens: int,
        folder: Path,
        mesh: Mesh,
    ):
        self.examples = [member.example for member in held_out]
        self.tokenizer, self.searcher, self.max_tokens, self.store = tokenizer, searcher, max_tokens, store
        self.encode, self.mesh = encode.on_mesh(graphdef, mesh), mesh
        self.best = Best(folder, by="mrr")

    def __call__(self, params: PyTree, step: int) -> dict[str, float]:
        found = self.measure(params)
        self.best.keep(found, params, step)
        return {f"validation_{key}": value for key, value in found.items()}

    def measure(self, params: PyTree) -> dict[str, float]:
        """The metrics of these parameters; nothing is kept."""
        queries_NxE = embed.embed_queries(
            functools.partial(self.encode, params),
            self.tokenizer,
            [example.query for example in self.examples],
            batch_tokens=VALIDATION_TOKENS,
            max_tokens=self.max_tokens,
            mesh=self.mesh,
        )
        rows_NxK, _ = self.searcher.search(queries_NxE, min(metrics.DEPTH, len(self.store)))
        hits = [metrics.first_right(self.store.read(rows_K), example) for example, rows_K in zip(self.examples, rows_NxK)]
        found = [metrics.retrieval_metrics(hit, ks=(1,)) for hit in hits]
        return {key: float(np.mean([row[key] for row in found])) for key in found[0]}


def _split(retrieval: Sequence[Retrieved], share: float, seed: int) -> tuple[list[Retrieved], list[Retrieved]]:
    """(held out, trained on): a random share of the questions that have answers to look for."""
    members = [member for member in retrieval if member.example.retrieve]
    order = np.random.default_rng(seed).permutation(len(members))
    count = int(share * sum(bool(member.example.answers) for member in members))  # completions have none
    if len(members) - count < 1:
        raise InputError(f"R-ft has no training questions ({len(members)} questions, {count} held out for validation)")
    return [members[i] for i in order[:count]], [members[i] for i in order[count:]]


def _lsr_source(
    members, scores, searcher: Searcher, tokenizer: Tokenizer, score_scale: float, max_query_tokens: int, read_passages
) -> batches.LsrSource:
    tokens, mask = tokenizer.encode_with_specials([member.example.query for member in members], max_query_tokens)
    return batches.LsrSource(members, scores, searcher.vectors, tokens, mask, score_scale, read_passages)


def _loop_options(c: ConfigDict, total: int, loggers: Sequence[str], evaluate_every: int) -> loop.LoopOptions:
    return loop.LoopOptions(total, c.checkpoint_every, c.log_every, evaluate_every, loggers=tuple(loggers))
