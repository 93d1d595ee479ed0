"""The stages and their artifacts, in order (DESIGN: the flow). A stage that is there already is not done again.

    passages → vectors → index ──┐
    questions → examples → retrieved → LM scores → tuned query encoder ──┐
                               └──→ tuned LM ────────────────────────────┴→ rows of the table

Retrieval and LM scores are computed once, with the untuned models, and then only read (paper sections 2.3 and 2.4).
"""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from radit_jax import artifacts, distributed, inputs, logbook, resident, sharding, trainings
from radit_jax.artifacts import Artifact
from radit_jax.checkpoint import load_params
from radit_jax.data import corpus
from radit_jax.data.card import Card
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.tokenizer import Tokenizer, load_tokenizer
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics
from radit_jax.inference.ensemble import Ensemble
from radit_jax.inference.score import Scorer, score_retrieval
from radit_jax.logbook import say
from radit_jax.models import flash, lora
from radit_jax.models.encoder import DualEncoder
from radit_jax.models.lm import REMAT
from radit_jax.models.lora import LoraOptions
from radit_jax.retrieval import embed, retrieve, scann, search
from radit_jax.retrieval.encode import encoding
from radit_jax.retrieval.vectors import Vectors, open_vectors
from radit_jax.training import loop, tune
from radit_jax.training.optim import OptimizerOptions, make_optimizer
from radit_jax.types import Example, Passage
from radit_jax.weights.encoder import load_encoder
from radit_jax.weights.lm import load_lm

SCANN_FROM = 20_000  # passages from which index = "auto" builds ScaNN


# What a stage is for, as said when it begins; by its name up to the first "-".
PURPOSES = {
    "passages": "documents split into passages, to be read by row",
    "vectors": "every passage by the document encoder, to be searched",
    "index": "so that a search does not go through all vectors",
    "retrieved": "the passages of every question, searched once",
    "lm_scores": "how probable the LM finds every answer after every passage: what R-ft learns from",
    "lsr_ft": "R-ft: the query encoder learns to fetch what the LM finds useful",
    "lm_ft": "LM-ft: the LM learns to use passages, and to ignore bad ones",
    "texts": "plain text for LM-ft's mixture",
    "row": "every question answered by one system",
}


class NotMade(Exception):
    """A dry pipeline was asked for a stage that is not there."""


class Pipeline:
    """Every stage of one config in one workdir. Properties and methods make what they need first, or open what is there.

    A dry one makes nothing and leaves the workdir as it is: NotMade for what is not there. Without `keep` the config does not become the
    workdir's, with which launch scripts open it: for one of many variants.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, *, dry: bool = False, keep: bool = True):
        self.workdir, self.dry = Path(workdir), dry
        self.mesh = sharding.make_mesh(config.mesh.data, config.mesh.model)
        self.config = config = inputs.with_dtypes(config, self.mesh.devices.flat[0].platform)
        if missing := set(range(distributed.count())) - {device.process_index for device in self.mesh.devices.flat}:
            raise InputError(
                f"mesh {self.mesh.shape['data']}×{self.mesh.shape['model']} has no device of process {min(missing)}: with several "
                f"processes it takes all {jax.device_count()} devices (config.mesh.data=-1 takes what config.mesh.model leaves)"
            )
        self.seconds: dict[str, float] = {}
        self._loaded: tuple[bool, nnx.Module] | None = None
        self._searchers: dict[bool, search.Searcher] = {}  # tuned vectors? →
        self.inputs = inputs.claim(config, self.workdir, keep=keep and not dry)

    def variant(self, changes: Mapping[str, Any]) -> Pipeline:
        """The pipeline of the config with these fields ("lm_ft.steps" → value) in the same workdir, whose config it does not become."""
        return Pipeline(inputs.with_fields(self.config, changes), self.workdir, keep=False)

    def check_trainings(self) -> None:
        """InputError where the mesh does not divide a batch, or an option is none: told before hours of retrieval and scores."""
        c = self.config
        logbook.check_loggers(inputs.listed(c.loggers))
        LoraOptions(**c.lm_ft.lora.to_dict())
        trainings.lsr_options(c)
        for part in (c.lm_ft, c.lsr_ft):
            make_optimizer(OptimizerOptions(**part.optimizer.to_dict()), 1)
        if c.lm.remat not in REMAT:
            raise InputError(f"lm.remat is {c.lm.remat!r}, expected {', '.join(REMAT)}")
        sharding.check_rows(self.mesh, c.lm_ft.rows, "lm_ft.rows")
        sharding.check_rows(self.mesh, c.lsr_ft.batch, "lsr_ft.batch")

    # -- corpus, vectors, index ---------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def passages(self) -> Artifact:
        c = self.config.corpus
        made_from = {"source": self.inputs["corpus.source"], "max_words": c.max_words}

        def write(folder: Path) -> dict[str, Any]:
            documents = self.documents(c.source)
            return corpus.build_store(documents, folder, max_words=c.max_words) if distributed.leads() else {}

        return self.stage("passages", made_from, write)

    def documents(self, source: str) -> Iterable[Passage]:
        """A corpus as it is given, before it is split into passages."""
        most_bad = self.config.corpus.max_bad_records
        if source.startswith(inputs.CONTEXTS):
            return inputs.contexts(source, most_bad)
        return inputs.invented(source).corpus() if inputs.is_invented(source) else corpus.documents(source, most_bad)

    @functools.cached_property
    def store(self) -> corpus.PassageStore:
        return corpus.PassageStore(self.passages.path)

    @property
    def vectors(self) -> Vectors:
        return open_vectors(self._vectors_artifact().path, len(self.store))

    def _vectors_artifact(self, tuned: bool = False) -> Artifact:
        c = self.config.retriever
        tuned = self.tunes_documents(tuned)
        encoder = self.tuned_retriever.fingerprint if tuned else self.inputs["retriever.document_encoder"]
        made_from = {"passages": self.passages.fingerprint, "encoder": encoder}
        made_from |= {key: c[key] for key in ("pooling", "normalize", "dtype", "vector_dtype", "max_passage_tokens")}

        def write(folder: Path) -> dict[str, Any]:
            mesh = sharding.local_mesh(self.mesh)
            return embed.embed_passages(
                encoding(self.document_encoder(tuned, c.dtype, mesh), mesh),
                load_tokenizer(c.document_encoder),
                self.store,
                folder,
                batch_tokens=c.batch_tokens,
                max_tokens=c.max_passage_tokens,
                dtype=c.vector_dtype,
                mesh=mesh,
            )

        return self.stage("vectors" + "-tuned" * tuned, made_from, write)

    def tunes_documents(self, tuned: bool) -> bool:
        """Whether the tuned retriever (tuned: is it asked for?) has vectors of its own: in the paper it has not."""
        return tuned and self.config.lsr_ft.encoders == tune.BOTH

    @property
    def searcher(self) -> search.Searcher:
        return self.searcher_of(tuned=False)

    def searcher_of(self, tuned: bool) -> search.Searcher:
        """The index of the untuned or the tuned retriever: the same, unless R-ft tunes both encoders."""
        tuned = self.tunes_documents(tuned)
        if tuned not in self._searchers:
            self._searchers[tuned] = self._open_searcher(tuned)
        return self._searchers[tuned]

    def _open_searcher(self, tuned: bool) -> search.Searcher:
        artifact = self._vectors_artifact(tuned)
        vectors = open_vectors(artifact.path, len(self.store))
        c = self.config.retriever
        kind = c.index
        if kind == "auto":
            kind = "scann" if len(self.store) >= SCANN_FROM else "exact"
        if kind != "scann":
            return search.make_searcher(kind, vectors, mesh=self.mesh, recall=c.approx_recall)
        made_from = {"vectors": artifact.fingerprint, "parts": c.index_parts}
        index = self.stage("index" + "-tuned" * tuned, made_from, lambda folder: scann.build_index(folder, vectors, parts=c.index_parts))
        return scann.ScannSearcher.load(index.path, vectors)

    def depth(self, k: int = 0) -> int:
        """How many passages of a question are looked at: the ensemble's k, and those of recall@10 where the corpus has as many."""
        return max(k, min(metrics.DEPTH, len(self.store)))

    # -- questions → examples → passages --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def train_sets(self) -> dict[str, tuple[Card, list[Example]]]:
        """The sets to learn from, by name, with markers drawn per example. Test splits raise (SPEC trap 8)."""
        found = inputs.sets(self.config, "train")
        return {card.name: (card, card.training_examples(questions, self.config.seed)) for card, questions in found}

    @property
    def train_examples(self) -> list[Example]:
        """Of all these sets."""
        return [example for _, examples in self.train_sets.values() for example in examples]

    @functools.cached_property
    def test_examples(self) -> list[Example]:
        """The questions of the table."""
        return [example for card, questions in inputs.sets(self.config, "test") for example in card.evaluation_examples(questions)]

    def retrieved(self, name: str, examples: Sequence[Example], k: int, tuned: bool = False) -> tuple[Artifact, retrieve.Retrieval]:
        """The k passages of each example, found once by the untuned or the tuned query encoder."""
        made_from = {
            "vectors": self._vectors_artifact(tuned).fingerprint,
            "index": {key: self.config.retriever[key] for key in ("index", "index_parts", "approx_recall")},
            "queries": artifacts.digest([(e.id, e.query, e.exclude) for e in examples]),
            "query_encoder": self.tuned_retriever.fingerprint if tuned else self.inputs["retriever.query_encoder"],
            "max_query_tokens": self.config.retriever.max_query_tokens,
            "k": k,
        }

        def write(folder: Path) -> dict[str, Any]:
            found = retrieve.retrieve(examples, self.embed_queries(tuned), self.searcher_of(tuned), self.store, k)
            return retrieve.write_retrieval(folder, found) if distributed.leads() else {}

        artifact = self.stage(f"retrieved-{name}" + ("-tuned" if tuned else ""), made_from, write)
        return artifact, retrieve.Retrieval(artifact.path, examples, self.store)

    def embed_queries(self, tuned: bool) -> Callable[[list[str]], np.ndarray]:
        """texts → vectors_NxE by the query encoder, in float32."""
        c = self.config.retriever
        encode, tokenizer = encoding(self.query_encoder(tuned), self.mesh), load_tokenizer(c.query_encoder)
        sizes = {"batch_tokens": c.batch_tokens, "max_tokens": c.max_query_tokens}
        return lambda texts: embed.embed_queries(encode, tokenizer, texts, **sizes, mesh=self.mesh)

    # -- scores and training --------------------------------------------------------------------------------------------------------------

    def lm_scores(self, name: str, examples: Sequence[Example], tuned: bool = False) -> tuple[Artifact, retrieve.Retrieval]:
        """log p_LM(y | c∘x) by the untuned LM (the paper's, section 2.4) or the tuned one for every example and its k passages, once."""
        examples = [example for example in examples if example.retrieve]
        retrieved, retrieval = self.retrieved(name, examples, self.config.retrieval.k)
        made_from = {
            "retrieved": retrieved.fingerprint,
            "prompts": artifacts.digest([(e.id, e.prompt, e.target) for e in examples]),
            "lm": self.tuned_lm.fingerprint if tuned else self.inputs["lm.checkpoint"],
            "dtype": self.config.lm.dtype,
            "max_tokens": self.config.lm.max_tokens,
        }

        def write(folder: Path) -> dict[str, Any]:
            scorer = Scorer(self.lm(tuned), batch_tokens=self.config.scoring.batch_tokens, mesh=self.mesh)
            return score_retrieval(scorer, InstanceMaker(self.tokenizer, self.config.lm.max_tokens), retrieval, folder)

        return self.stage(f"lm_scores-{name}" + ("-tuned" if tuned else ""), made_from, write), retrieval

    @functools.cached_property
    def tuned_lm(self) -> Artifact:
        """LM-ft (Eq. 3)."""
        return trainings.lm_ft(self)

    @functools.cached_property
    def tuned_retriever(self) -> Artifact:
        """R-ft (Eq. 5)."""
        return trainings.r_ft(self)

    # -- models ---------------------------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.config.lm.checkpoint)

    def lm(self, tuned: bool, *, full_precision: bool = False) -> nnx.Module:
        """The LM for scoring and answering, stored in the compute dtype (in float32 for export). One is held at a time."""
        if full_precision or self._loaded is None or self._loaded[0] != tuned:
            self._loaded = None
            c = self.config.lm
            dtype = param_dtype = "float32" if full_precision else c.dtype
            if tuned:
                tuned_params = self.tuned_lm.path / tune.PARAMS  # trained first, so that no two LMs are in memory
                if self.config.lm_ft.lora.quantize:
                    param_dtype = c.dtype  # what was quantized
            lm = self._load_lm(dtype, param_dtype=param_dtype)
            if tuned:
                lm = self._adapted(lm)  # as it was trained
                nnx.update(lm, load_params(tuned_params, lora.split(lm)[1]))
                lm = lora.merged(lm, dtype)
            self._loaded = (tuned, lm.as_read())
            jax.block_until_ready(nnx.state(lm))  # what is copied is held until then
            resident.give_back()
        return self._loaded[1]

    def trainable_lm(self) -> nnx.Module:
        """The untuned LM as LM-ft takes it up: float32 parameters, computing in lm.dtype, with remat.

        With LoRA the frozen ones are in lm.dtype, or quantized from there.
        """
        self._loaded = None  # the copy for answering makes room for the one in training
        c = self.config.lm
        kinds = {"param_dtype": c.dtype} if self.config.lm_ft.lora.rank else {}
        return self._adapted(self._load_lm(c.dtype, remat=c.remat, **kinds))

    def _adapted(self, lm: nnx.Module) -> nnx.Module:
        """The LM with the low-rank maps of lm_ft.lora beside its own, if there are to be any."""
        place = sharding.placer(self.mesh, sharding.LM_RULES)
        return lora.adapted(lm, LoraOptions(**self.config.lm_ft.lora.to_dict()), seed=self.config.seed, place=place)

    def query_encoder(self, tuned: bool) -> nnx.Module:
        if self.tunes_documents(tuned):
            return self._tuned_pair("float32").query
        encoder = self._load_encoder(self.config.retriever.query_encoder, "float32", self.mesh)
        if tuned:
            nnx.update(encoder, load_params(self.tuned_retriever.path / tune.PARAMS, nnx.state(encoder)))
        return encoder

    def document_encoder(self, tuned: bool = False, dtype: str = "float32", mesh: Mesh | None = None) -> nnx.Module:
        """Frozen in R-ft, unless lsr_ft.encoders says that both are tuned."""
        mesh = mesh or self.mesh
        if self.tunes_documents(tuned):
            return self._tuned_pair(dtype, mesh).document
        return self._load_encoder(self.config.retriever.document_encoder, dtype, mesh)

    def trainable_retriever(self) -> nnx.Module:
        """What R-ft trains, untuned: the query encoder or both. Parameters are float32, products in retriever.dtype."""
        c = self.config
        if c.lsr_ft.encoders == tune.BOTH:
            return self._pair(c.retriever.dtype, self.mesh)
        return self._load_encoder(c.retriever.query_encoder, c.retriever.dtype, self.mesh)

    def _pair(self, dtype: str, mesh: Mesh) -> DualEncoder:
        """Both untuned encoders. Of passages, k times as many as the queries and longer, a gradient keeps the dots alone."""
        c = self.config.retriever
        query = self._load_encoder(c.query_encoder, dtype, mesh)
        return DualEncoder(query, self._load_encoder(c.document_encoder, dtype, mesh, remat=DualEncoder.REMAT))

    def _tuned_pair(self, dtype: str, mesh: Mesh | None = None) -> DualEncoder:
        pair = self._pair(dtype, mesh or self.mesh)
        nnx.update(pair, load_params(self.tuned_retriever.path / tune.PARAMS, nnx.state(pair)))
        return pair

    def ensemble(self, lm: bool | nnx.Module, max_new_tokens: int | None = None) -> Ensemble:
        """Of the untuned or the tuned LM (lm: tuned?), or of one that is given."""
        c = self.config.evaluate
        maker = InstanceMaker(self.tokenizer, self.config.lm.max_tokens)
        sizes = {"batch_tokens": c.batch_tokens, "max_new_tokens": max_new_tokens or c.max_new_tokens}
        return Ensemble(self.lm(lm) if isinstance(lm, bool) else lm, maker, **sizes, mesh=self.mesh)

    def _load_lm(self, dtype: str, **kinds: str) -> nnx.Module:
        c, mesh = self.config.lm, self.mesh
        attention = flash.kernel_for(mesh.devices.flat[0].platform, c.attention)
        place, check = sharding.placer(mesh, sharding.LM_RULES), functools.partial(sharding.check_lm, mesh)
        return load_lm(c.checkpoint, dtype=dtype, attention=attention, place=place, check=check, **kinds)

    def _load_encoder(self, name: str, dtype: str, mesh: Mesh, remat: str = "none") -> nnx.Module:
        c = self.config.retriever
        if c.normalize not in ("auto", "yes", "no"):
            raise InputError(f"retriever.normalize is {c.normalize!r}, expected auto, yes or no")
        normalize = {"auto": None, "yes": True, "no": False}[c.normalize]
        place, check = sharding.placer(mesh, sharding.ENCODER_RULES), functools.partial(sharding.check_encoder, mesh)
        kinds = {"normalize": normalize, "dtype": dtype, "remat": remat}
        return load_encoder(name, pooling=c.pooling or None, place=place, check=check, **kinds)

    def has(self, training: str) -> bool:
        """Whether this workdir holds what a training ("lm_ft", "lsr_ft") with these settings makes; says if what it holds is of others."""
        was, self.dry = self.dry, True
        try:
            _ = self.tuned_lm if training == "lm_ft" else self.tuned_retriever
            return True
        except NotMade as missing:
            if any((folder / artifacts.MANIFEST).exists() for folder in self.workdir.glob(f"{training}-*") if folder.suffix != ".partial"):
                say(f"{training}: this workdir holds one of other settings ({missing} of these is not there)")
            return False
        finally:
            self.dry = was

    # -- shared ---------------------------------------------------------------------------------------------------------------------------

    def stage(self, name: str, made_from: Mapping[str, Any], write: Callable[[Path], Mapping[str, Any] | None]) -> Artifact:
        """Makes or opens an artifact, says which, and keeps the wall time it took to make."""

        def timed(folder: Path) -> dict[str, Any]:
            purpose = PURPOSES.get(name.partition("-")[0])
            say(f"{name}: making {folder.with_suffix('').name}" + (f" ({purpose})" if purpose else ""))
            began = time.monotonic()
            facts = dict(write(folder) or {})
            # The peak is that of the process so far: of this stage or of one before it.
            return {**facts, "seconds": round(time.monotonic() - began, 1), "peak_memory_mib": resident.peak_mib()}

        if self.dry and not artifacts.there(self.workdir, name, made_from):
            raise NotMade(name)
        artifact = artifacts.make(self.workdir, name, made_from, timed)
        # Only of a whole artifact: a run killed before that goes on from them.
        if distributed.leads() and not self.dry:
            shutil.rmtree(artifact.path / loop.CHECKPOINTS, ignore_errors=True)
        if name not in self.seconds:
            shown = ", ".join(f"{key} {value}" for key, value in artifact.facts.items() if isinstance(value, (int, float, str)))
            say(f"{name}: {'already there, skipped' if artifact.reused else 'done'} ({shown})")
        self.seconds[name] = artifact.facts["seconds"]
        return artifact
