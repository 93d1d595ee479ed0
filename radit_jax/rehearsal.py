"""`train.py --dry-run`: the stages of a run, which of them the workdir holds, and about how long the others take here.

Nothing is written. The times come from a short calibration, one call of the encoder and one of the LM on the corpus' own passages: what a
stage does is counted in tokens that one of the two reads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from radit_jax import table, trainings
from radit_jax.artifacts import MANIFEST
from radit_jax.data import corpus
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.evaluation import report
from radit_jax.inference.score import Scorer
from radit_jax.pipeline import SCANN_FROM, NotMade, Pipeline
from radit_jax.progress import duration
from radit_jax.training import tune
from radit_jax.types import Passage

SAMPLED = 50_000  # documents that are read to count passages
EMBEDDED, SCORED = 128, 24  # passages of the calibration
# Forward passes that other work takes, of a token: a training step reads backwards twice, computes again what remat dropped, and updates;
# an answer costs as much after its prompts as they do. Both as measured on two cores with SmolLM2-135M.
TRAINING, ANSWERING = 4.5, 2.0
INDEX_S, PASSAGE_S = 3e-4, 6e-5  # of a vector in a ScaNN index (README), of a passage in the store
QUESTION = 20  # its tokens, about


@dataclasses.dataclass(frozen=True)
class Planned:
    """A stage of the run: whether it is there, what it does, and about how many seconds that takes."""

    name: str
    there: bool
    work: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Sample:
    """The corpus as far as it was read."""

    passages: list[Passage]
    count: int  # passages in all, or in what was read
    whole: bool

    @property
    def shown(self) -> str:
        return f"{'' if self.whole else 'more than '}{self.count:,} passages"


def rehearse(pipeline: Pipeline) -> list[Planned]:
    """The stages of config.goal in order. `pipeline` is a dry one."""
    there, sample = _there(pipeline), _sample(pipeline)
    costs = list(_costs(pipeline, sample))
    missing = [name for name, *_ in costs if name not in there]
    rates = _calibrate(pipeline, sample.passages) if missing else (1.0, 1.0)
    return [
        Planned(name, name in there, work, 0.0 if name in there else encoder / rates[0] + lm / rates[1] + other)
        for name, work, encoder, lm, other in costs
    ]


def text(stages: Sequence[Planned]) -> str:
    """The stages as people read them."""
    rows = [
        (stage.name, "there" if stage.there else "to do", stage.work, "–" if stage.there else duration(stage.seconds)) for stage in stages
    ]
    left = sum(stage.seconds for stage in stages)
    shown = report.grid("The run, stage by stage", ("stage", "", "what it does", "about"), rows)
    return f"{shown}about {duration(left)} to go, by a short calibration on these devices; compiling comes on top (kept for the next start)"


def _there(pipeline: Pipeline) -> set[str]:
    """Names of the stages whose artifacts are in the workdir for this config."""
    goal = pipeline.config.goal
    ways: list[Callable[[], object]] = [lambda: pipeline.passages, lambda: pipeline.vectors]
    ways += [lambda: pipeline.tuned_retriever] if goal != "lm_ft" else []
    ways += [lambda: pipeline.tuned_lm] if goal != "lsr_ft" else []
    if goal == "radit" and pipeline.config.test.source:
        ways += [lambda name=name: table.row(pipeline, name) for name in table.ROWS]
    for way in ways:
        with contextlib.suppress(NotMade):
            way()
    return set(pipeline.seconds) | ({"index"} if any(pipeline.workdir.glob(f"index-[!t]*/{MANIFEST}")) else set())


def _sample(pipeline: Pipeline) -> _Sample:
    with contextlib.suppress(NotMade):
        store = pipeline.store
        return _Sample(store.read(range(min(len(store), EMBEDDED))), len(store), True)
    documents = iter(pipeline.documents(pipeline.config.corpus.source))
    found = [
        passage for document in itertools.islice(documents, SAMPLED) for passage in corpus.split(document, pipeline.config.corpus.max_words)
    ]
    return _Sample(found[:EMBEDDED], len(found), next(documents, None) is None)


def _costs(pipeline: Pipeline, sample: _Sample) -> Iterator[tuple[str, str, float, float, float]]:
    """(stage, what it does, tokens of the encoder, tokens of the LM, seconds besides) of every stage of the goal."""
    c = pipeline.config
    encoder, lm = load_tokenizer(c.retriever.document_encoder), pipeline.tokenizer
    texts = [passage.content for passage in sample.passages]
    of_encoder, of_lm = (sum(map(len, tokenizer.encode_batch(texts))) / len(texts) for tokenizer in (encoder, lm))
    prompt, k = of_lm + QUESTION, c.retrieval.k
    yield "passages", sample.shown, 0, 0, sample.count * PASSAGE_S
    yield "vectors", sample.shown, sample.count * of_encoder, 0, 0
    if c.retriever.index == "scann" or c.retriever.index == "auto" and sample.count >= SCANN_FROM:
        yield "index", f"ScaNN over {sample.shown}", 0, 0, sample.count * INDEX_S
    learnt = len(pipeline.train_examples)
    yield "retrieved-train", f"{learnt:,} questions, {k} passages each", learnt * QUESTION, 0, 0
    if c.goal != "lm_ft":
        asked = sum(len(examples) for _, examples in trainings.r_ft_sets(pipeline).values())
        completed = c.lsr_ft.completion_examples if trainings.completes(pipeline) else 0
        by_tuned = "-tuned" * trainings.SCORERS[c.lsr_ft.scorer]
        for name, count, tokens in (("train", asked, prompt), ("completion", completed, of_lm + 2 * c.lsr_ft.completion_tokens)):
            if count:
                yield f"lm_scores-{name}{by_tuned}", f"{count * k:,} outputs scored", 0, count * k * tokens, 0
        t = c.lsr_ft
        drawn = t.batch * tune.planned_steps(t, round(asked * (1 - tune.held_out_share(t))), completed)
        both = pipeline.tunes_documents(True)
        read = QUESTION + both * k * of_encoder
        work = f"{drawn:,} questions{f' and {k} passages of each' * both}, with repetition"
        yield "lsr_ft", work, TRAINING * drawn * read, 0, 0
        if both:
            yield "vectors-tuned", sample.shown, sample.count * of_encoder, 0, 0
    if c.goal != "lsr_ft":
        t = c.lm_ft
        tokens = t.steps * t.accumulate * t.rows * t.row_length
        yield "lm_ft", f"{t.steps:,} steps of {t.accumulate * t.rows * t.row_length:,} tokens", 0, TRAINING * tokens, 0
    if c.goal == "radit" and c.test.source:
        tested = len(pipeline.test_examples)
        for name, (_, retriever) in table.ROWS.items():
            passages = 0 if retriever is None else c.evaluate.k
            tokens = tested * (passages * prompt if passages else QUESTION)
            yield f"row-{name.replace(' ', '_')}", f"{tested:,} answers over {passages} passages", 0, ANSWERING * tokens, 0


def _calibrate(pipeline: Pipeline, passages: Sequence[Passage]) -> tuple[float, float]:
    """Tokens a second that the query encoder and the untuned LM read here, once compiled."""
    texts = [passage.content for passage in passages]
    embed, encoder = pipeline.embed_queries(tuned=False), load_tokenizer(pipeline.config.retriever.query_encoder)
    scorer = Scorer(pipeline.lm(tuned=False), batch_tokens=pipeline.config.scoring.batch_tokens, mesh=pipeline.mesh)
    maker = InstanceMaker(pipeline.tokenizer, pipeline.config.lm.max_tokens)
    instances = [maker.instance(p.id, "Q: which?\nA:", p.content, " this", close=False) for p in passages[:SCORED]]
    read = sum(min(len(ids), pipeline.config.retriever.max_query_tokens) for ids in encoder.encode_batch(texts))
    return read / _seconds(lambda: embed(texts)), sum(len(i.tokens_T) for i in instances) / _seconds(lambda: scorer(instances))


def _seconds(call: Callable[[], object]) -> float:
    """Of the second call: the first may compile."""
    call()
    began = time.monotonic()
    call()
    return time.monotonic() - began
