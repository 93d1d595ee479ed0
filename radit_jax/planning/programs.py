"""The programs of a run, as they are compiled there, on a mesh of devices that need not exist: shapes and shardings, no arrays.

Each builder makes one from the config with the library's own functions (steps.compile_step, score.target_logprobs, decode.prefill …).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from radit_jax import sharding, trainings
from radit_jax.errors import InputError
from radit_jax.inference import decode as decoding
from radit_jax.inference import score
from radit_jax.inputs import with_dtypes
from radit_jax.models import flash, lora
from radit_jax.models.attention import Segments, Trees
from radit_jax.models.encoder import DualEncoder
from radit_jax.models.lm import LM, LmConfig
from radit_jax.models.lora import LoraOptions
from radit_jax.planning import flops, shapes
from radit_jax.retrieval import encode, exact
from radit_jax.retrieval.candidates import QUERIES
from radit_jax.sharding import DATA, MODEL
from radit_jax.training import optim, steps, tune
from radit_jax.types import LmBatch, LsrBatch, PyTree
from radit_jax.weights.encoder import abstract_encoder
from radit_jax.weights.lm import abstract_lm

TARGET = 64  # tokens of a scored target: slots of a row in scoring
STOPS = 100  # tokens that end an answer, about


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a plan needs beside the config."""

    attention: str = "auto"  # auto: what config.lm.attention says | reference
    corpus: int = 0  # passages to embed and search; 0: not said
    dim: int = 768  # of their vectors


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function with the shapes and shardings of its arguments, and what one call of it does."""

    name: str
    mesh: Mesh
    function: Any  # jitted; static arguments first in `arguments` or by position
    arguments: tuple[Any, ...]
    amount: int  # of `unit`, done by one call
    unit: str  # tokens, questions, passages, queries
    calls: int | None = None  # of the configured run, where the config says how many
    endless: int = 1  # trips of its loop that ends by what it computes
    asked: int = 0  # operations that the task asks for (flops.asked), where they are counted
    note: str = ""

    def trace(self) -> Any:
        """The traced program; lower() of it is what the device is given."""
        with jax.set_mesh(self.mesh):
            return self.function.trace(*self.arguments)


def build(name: str, c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """The program of this name. InputError for a mesh that does not divide what it has to."""
    return BUILDERS[name](with_dtypes(c, mesh.devices.flat[0].platform), mesh, settings)


# -- the builders -----------------------------------------------------------------------------------------------------------------------


def lm_step(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """One update of LM-ft on the configured batch: what learns and its AdamW state in float32, products and what is frozen in lm.dtype."""
    options = LoraOptions(**c.lm_ft.lora.to_dict())
    param_dtype = c.lm.dtype if options.rank else "float32"
    config = _lm(c, mesh, settings, rows=c.lm_ft.row_length, param_dtype=param_dtype, remat=c.lm.remat)
    A, B, T, slots = c.lm_ft.accumulate, c.lm_ft.rows, c.lm_ft.row_length, c.lm_ft.output_slots
    sharding.check_rows(mesh, B, "lm_ft.rows")
    ints, floats = _rows(mesh, jnp.int32, lead=1), _rows(mesh, jnp.float32, lead=1)
    batch = LmBatch(*(ints(A, B, T) for _ in range(3)), ints(A, B, slots), ints(A, B, slots), floats(A, B, slots))
    model = nnx.eval_shape(lambda: lora.adapted(LM(config, rngs=nnx.Rngs(0)), options))
    step, *arguments = _step(steps.lm_step, lora.split(model), c.lm_ft.optimizer, c.lm_ft.steps, mesh, sharding.LM_RULES)
    asked = _asked(config, A * B, T, slots, flops.FROZEN if options.rank else flops.TRAINING)
    return Program("lm_step", mesh, step, (arguments[0], batch, *arguments[1:]), A * B * T, "tokens", c.lm_ft.steps, **asked)


def lsr_step(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """One update of R-ft: of the query encoder or of both, in float32 with products in retriever.dtype."""
    r, t = c.retriever, c.lsr_ft
    model = query = _encoder(c, mesh, r.query_encoder, r.dtype)
    A, T, K, E = tune.lsr_parts(t, mesh), r.max_query_tokens, c.retrieval.k, query.config.width
    B = t.batch // A
    ints, floats, bools = (functools.partial(_rows(mesh, dtype, lead=1), A) for dtype in (jnp.int32, jnp.float32, jnp.bool_))
    batch = LsrBatch(ints(B, T), bools(B, T), floats(B, K, E), bools(B, K), floats(B, K), ints(B), floats(B, K), floats(B))
    if t.encoders == tune.BOTH:
        model = DualEncoder(query, _encoder(c, mesh, r.document_encoder, r.dtype, remat=DualEncoder.REMAT))
        passages = B, K, r.max_passage_tokens
        batch = dataclasses.replace(batch, passage_tokens_BxKxT=ints(*passages), passage_mask_BxKxT=bools(*passages))
    calls = _lsr_calls(c)
    how = {"options": trainings.lsr_options(c)}
    step, state = _step(steps.lsr_step, nnx.split(model), t.optimizer, calls or 1, mesh, sharding.ENCODER_RULES, **how)
    return Program("lsr_step", mesh, step, (state, batch), t.batch, "questions", calls)


def scoring(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """log p_LM(y | c∘x) of one batch of the longest rows."""
    config = _lm(c, mesh, settings, rows=c.lm.max_tokens, param_dtype=c.lm.dtype)
    T = c.lm.max_tokens
    B = sharding.whole_rows(mesh, c.scoring.batch_tokens // T)
    ints = _rows(mesh, jnp.int32)
    graphdef, params = _placed(abstract_lm(config), mesh, sharding.LM_RULES)
    # A kernel reads rows of several instances, the reference rows of instances that share their beginning.
    rows = (Trees if config.attention == flash.REFERENCE else Segments)(ints(B, T))
    parts = mesh.shape[DATA]
    slots = ints(parts, B // parts * TARGET)
    arguments = (graphdef, params, ints(B, T), ints(B, T), rows, slots, slots)
    return Program("score", mesh, score.target_logprobs, arguments, B * T, "tokens", **_asked(config, B, T, TARGET, flops.FORWARD))


def embed(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """Vectors of one batch of the longest passages, on the chips of one host: each process embeds passages of its own."""
    r = c.retriever
    local = sharding.local_mesh(mesh, min(device.process_index for device in mesh.devices.flat))
    encoder = _encoder(c, local, r.document_encoder, r.dtype)
    T = min(r.max_passage_tokens, encoder.config.max_positions)
    B = sharding.whole_rows(local, r.batch_tokens // T)
    with jax.sharding.use_abstract_mesh(local.abstract_mesh):  # kernels are as the mesh's platform reads them
        encoder = nnx.eval_shape(lambda encoder: encoder.as_read(), encoder)
    graphdef, params = _placed(encoder, local, sharding.ENCODER_RULES)
    run = encode.program(graphdef, local)
    arguments = (params, _rows(local, jnp.int32)(B, T), _rows(local, jnp.bool_)(B, T), None)
    hosts = mesh.size // local.size
    calls = -(-settings.corpus // (B * hosts)) if settings.corpus else None
    return Program("embed", local, run, arguments, B * hosts, "passages", calls, note=f"on each of {hosts} hosts")


def prefill(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """Reading the k prompts of a batch of questions, the longest that there may be."""
    config, graphdef, params, (B, K, T) = _ensemble(c, mesh, settings)
    ints = _rows(mesh, jnp.int32)
    arguments = (graphdef, params, ints(B, K, T), ints(B, K))
    return Program("prefill", mesh, decoding.prefill, arguments, B, "questions")


def decode(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """Generating max_new_tokens tokens after every one of their prompts, from log-probs and caches as `prefill` leaves them on the mesh."""
    config, graphdef, params, (B, K, T) = _ensemble(c, mesh, settings)
    new = c.evaluate.max_new_tokens
    last, cache = prefill(c, mesh, settings).trace().out_info
    rows, heads = _data(mesh, B), _axis(mesh, MODEL, config.kv_heads)
    by_rank = {6: P(None, None, rows, heads), 3: P(None, rows), 0: P()}  # keys and values (L, K, B, G, S, h), positions (K, B, S)
    cache = jax.tree.map(lambda x: _put(mesh, x, by_rank[x.ndim]), cache)
    stops = jax.ShapeDtypeStruct((STOPS,), jnp.int32, sharding=sharding.replicated(mesh))
    last = _put(mesh, last, P(rows, None, _axis(mesh, MODEL, config.vocab_size)))
    arguments = (graphdef, params, last, _rows(mesh, jnp.int32)(B, K), cache, stops, new)
    return Program("decode", mesh, decoding.decode_each, arguments, B, "questions", endless=new, note=f"{new} tokens after each prompt")


def search(c: ConfigDict, mesh: Mesh, settings: Settings) -> Program:
    """Exact (or approx) search of one batch of queries over the whole corpus, its vectors in the dtype that they are stored in."""
    if not settings.corpus:
        raise InputError("search: how many passages? (--corpus=399000000)")
    layout = exact.Layout.of(settings.corpus, mesh.size)
    recall = c.retriever.approx_recall if c.retriever.index == "approx" else 0.0
    run = exact.top_k_program(mesh, layout, k=c.retrieval.k, recall=recall)
    queries = jax.ShapeDtypeStruct((QUERIES, settings.dim), jnp.float32)
    vectors = jax.ShapeDtypeStruct((layout.padded, settings.dim), jnp.dtype(c.retriever.vector_dtype))
    note = f"{settings.corpus:,} × {settings.dim} {c.retriever.vector_dtype}, k = {c.retrieval.k}"
    return Program("search", mesh, run, (queries, vectors), QUERIES, "queries", note=note)


BUILDERS: Mapping[str, Callable[[ConfigDict, Mesh, Settings], Program]] = {
    "embed": embed,
    "search": search,
    "score": scoring,
    "lm_step": lm_step,
    "lsr_step": lsr_step,
    "prefill": prefill,
    "decode": decode,
}


# -- their parts ------------------------------------------------------------------------------------------------------------------------


def _lm(c: ConfigDict, mesh: Mesh, settings: Settings, *, rows: int, param_dtype: str, remat: str = "none") -> LmConfig:
    """The decoder with the attention that reads rows of this length on this platform."""
    config = shapes.lm_config(c.lm.checkpoint, dtype=c.lm.dtype, param_dtype=param_dtype, remat=remat)
    sharding.check_lm(mesh, config)
    wanted = c.lm.attention if settings.attention == "auto" else settings.attention
    kernel = flash.kernel_for(mesh.devices.flat[0].platform, wanted)
    return dataclasses.replace(config, attention=flash.choose(kernel, config, rows, mesh.shape[MODEL]))


def _asked(config: LmConfig, rows: int, row_length: int, outputs: int, times: flops.Times) -> dict[str, Any]:
    """Of whole rows, each one instance with so many outputs."""
    pairs = rows * row_length * (row_length + 1) // 2
    asked = flops.asked(config, rows * row_length, rows * outputs, pairs, times)
    return {"asked": asked, "note": f"{config.attention} attention"}


def _encoder(c: ConfigDict, mesh: Mesh, name: str, dtype: str, remat: str = "none") -> nnx.Module:
    """The encoder of a name. Pooling changes no shape, so where the config leaves it to the checkpoint, that is not asked."""
    pooling = {"pooling": c.retriever.pooling or "mean", "normalize": c.retriever.normalize == "yes"}
    config = shapes.encoder_config(name, **pooling, dtype=dtype, param_dtype="float32", remat=remat)
    sharding.check_encoder(mesh, config)
    return abstract_encoder(config)


def _step(step: Callable, parts: tuple[Any, ...], o: ConfigDict, total: int, mesh: Mesh, rules, **static: Any) -> tuple[Any, ...]:
    """(the compiled step of a model, its abstract state, what is frozen beside it). `parts`: graphdef, what learns and what is frozen."""
    graphdef, params, *frozen = parts
    tx = optim.make_optimizer(optim.OptimizerOptions(**o.to_dict()), total)
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), params)
    return steps.compile_step(step, graphdef, tx, state, mesh, rules, frozen=frozen, **static), state, *frozen


def _placed(model: nnx.Module, mesh: Mesh, rules) -> tuple[nnx.GraphDef, PyTree]:
    graphdef, params = nnx.split(model)
    return graphdef, placed(params, mesh, rules)


def placed(tree: PyTree, mesh: Mesh, rules) -> PyTree:
    """Shapes with the places that the rule table gives them."""
    places = sharding.shardings(tree, rules, mesh)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def _ensemble(c: ConfigDict, mesh: Mesh, settings: Settings) -> tuple[LmConfig, nnx.GraphDef, PyTree, tuple[int, int, int]]:
    """The decoder in its compute dtype, and B questions of K prompts of T tokens."""
    config = _lm(c, mesh, settings, rows=c.lm.max_tokens, param_dtype=c.lm.dtype)
    K, T = c.evaluate.k, c.lm.max_tokens - c.evaluate.max_new_tokens
    B = sharding.whole_rows(mesh, c.evaluate.batch_tokens // (T * K))
    return config, *_placed(abstract_lm(config), mesh, sharding.LM_RULES), (B, K, T)


def _lsr_calls(c: ConfigDict) -> int | None:
    """Updates of R-ft on one set; None where the number of its questions is known only when they are read."""
    t = c.lsr_ft
    if t.completion_share < 1 and not c.train.limit:
        return None
    return tune.planned_steps(t, round(c.train.limit * (1 - tune.held_out_share(t))), t.completion_examples)


def _rows(mesh: Mesh, dtype: Any, lead: int = 0) -> Callable[..., jax.ShapeDtypeStruct]:
    """shape → an array whose rows, after `lead` axes, lie over "data"."""
    return lambda *shape: _put(mesh, jax.ShapeDtypeStruct(shape, dtype), P(*[None] * lead, _data(mesh, shape[lead])))


def _put(mesh: Mesh, x: Any, spec: P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


def _data(mesh: Mesh, rows: int) -> str | None:
    return _axis(mesh, DATA, rows)


def _axis(mesh: Mesh, axis: str, size: int) -> str | None:
    """The axis, if it divides the size."""
    return axis if size % mesh.shape[axis] == 0 else None
