"""What an ensemble runs on the devices: reading the k prompts of B questions, decoding after them, scoring candidates over their caches.

The LM sees one prompt a row and `vmap` runs it over K (axis 1). A row that has ended may be given another prompt (continuous batching):
rows share the slot they write to, the slots of answers are a ring, and a row has ended before its first token is overwritten.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from radit_jax.models.apart import APART, ApartCache, ApartLM, are_views
from radit_jax.models.attention import Segments, Trees
from radit_jax.models.layers import as_bits, from_bits, platform
from radit_jax.models.lm import LM, KVCache, picked
from radit_jax.models.unpad import Line
from radit_jax.types import PyTree

# Where K is in a cache: after L, for a scan over layers would otherwise transpose the cache in every step; all prompts write the same slot.
CACHE_K = KVCache(k_LxBxGxSxh=1, v_LxBxGxSxh=1, positions_BxS=0, next_slot=None)
APART_K = ApartCache(k_BxGxSxh=0, v_BxGxSxh=0, positions_BxSx1=0, next_slot=None)
Past = ApartCache | None  # the prompts' keys, where decoding looks at them beside those that it writes


def mix_logprobs(logp_KxV: jax.Array, logw_K: jax.Array) -> jax.Array:
    """log Σ_k w_k p_k: probabilities are averaged, never logits (SPEC trap 7)."""
    return jax.nn.logsumexp(logp_KxV + logw_K[:, None], axis=0)


@functools.partial(jax.jit, static_argnums=0)
def prefill(graphdef: nnx.GraphDef, params: PyTree, tokens_BxKxT: jax.Array, lengths_BxK: jax.Array, indices_N=None):
    """Reads the k prompts of each question: log-probs of the next token (B, K, V) and the KV caches, which are full.

    `indices_N` (int32) are of the real tokens among the K·B·T, where those are read in one line.
    """
    lm = nnx.merge(graphdef, params)

    def read(tokens_BxT, lengths_B):
        hidden_BxTxD, cache = lm.prefill(tokens_BxT, lengths_B, indices_N)
        last_BxD = jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return jax.nn.log_softmax(lm.logits(last_BxD)), cache

    if indices_N is None:
        return jax.vmap(read, in_axes=1, out_axes=(1, CACHE_K))(tokens_BxKxT, lengths_BxK)
    # In one line the prompts of all k are rows like any others: what vmap would give each k is a line as long as the longest of them.
    (B, K), T = lengths_BxK.shape, tokens_BxKxT.shape[-1]
    logp_RxV, cache = read(tokens_BxKxT.swapaxes(0, 1).reshape(K * B, T), lengths_BxK.T.reshape(-1))

    def by_prompt(x, axis: int):
        return x.reshape(*x.shape[:axis], K, B, *x.shape[axis + 1 :])

    k, v, positions = by_prompt(cache.k_LxBxGxSxh, 1), by_prompt(cache.v_LxBxGxSxh, 1), by_prompt(cache.positions_BxS, 0)
    return by_prompt(logp_RxV, 0).swapaxes(0, 1), KVCache(k, v, positions, cache.next_slot)


# -- decoding ---------------------------------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Questions in the middle of their answers: R rows each, K (every prompt on its own) or 1 (the mixture)."""

    cache: PyTree  # which decoding writes to, of the K prompts, or of what comes after them; None, before they are `over` one or taken
    lengths_BxK: jax.Array  # tokens of the prompts
    token_BxR: jax.Array  # the next one, chosen and not yet read
    taken_BxR: jax.Array  # tokens of the answer so far
    done_BxR: jax.Array
    logp_BxR: jax.Array  # of the tokens so far with the next one; of the answer and its end, by any stop token, where that is done
    ids_BxRxS: jax.Array  # −1 after the end


def decoder(lm: LM) -> LM | ApartLM:
    """The form of an LM that decodes fastest on this platform. Where it is apart: see ApartLM."""
    return ApartLM(lm) if platform() in APART else lm


@functools.partial(jax.jit, static_argnums=(0, 6))
def decode_each(graphdef, params, last_BxKxV, lengths_BxK, cache, stops_I, new_tokens: int):
    """Greedy decoding of every prompt on its own: (ids_BxKxS with −1 after the end, logp_BxK of the ids and their end).

    `graphdef` and `params` are those of a `decoder`.
    """
    real_B, apart = jnp.ones(len(lengths_BxK), bool), isinstance(nnx.merge(graphdef, params), ApartLM)
    rows, past = over(begin(last_BxKxV, lengths_BxK, stops_I, real_B, new_tokens), cache, apart)
    rows = go(graphdef, params, rows, past, stops_I, lengths_BxK.size)
    return rows.ids_BxRxS, rows.logp_BxR


@functools.partial(jax.jit, static_argnums=4)
def begin(last_BxKxV, lengths_BxK, stops_I, real_B, new_tokens: int) -> Rows:
    """The rows of prompts that were read, without their cache; those of questions that are not real have ended."""
    rows = _rows(lengths_BxK, jnp.broadcast_to(~real_B[:, None], lengths_BxK.shape), new_tokens)
    return _hear(rows, last_BxKxV, stops_I)


def over(rows: Rows, cache: KVCache, apart: bool) -> tuple[Rows, Past]:
    """The rows with a cache to write to, for a decoder that is `apart` or not: a copy of their prompts' with room for answers.

    Where layers of a stack are views, it holds the answers alone, and the prompts' is looked at beside it, where it lies.
    """
    if apart and are_views(cache.k_LxBxGxSxh):
        return _over_nothing(rows, cache), ApartCache.of(cache)
    return _over_copy(rows, cache, apart), None


@jax.jit
def _over_nothing(rows: Rows, prompts: KVCache) -> Rows:
    return dataclasses.replace(rows, cache=ApartCache.empty(prompts, rows.ids_BxRxS.shape[-1]))


@functools.partial(jax.jit, static_argnums=2)
def _over_copy(rows: Rows, prompts: KVCache, apart: bool) -> Rows:
    cache = prompts.with_room(rows.ids_BxRxS.shape[-1])
    return dataclasses.replace(rows, cache=ApartCache.of(cache) if apart else cache)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def go(graphdef, params, rows: Rows, past: Past, stops_I, enough) -> Rows:
    """Decodes every row on its own until `enough` more of them have ended, or all."""
    return _go(_step(nnx.merge(graphdef, params), past), lambda logits_BxKxV: logits_BxKxV, rows, stops_I, enough)


def take(rows: Rows, past: Past, others: Rows, cache: KVCache, to_M: jax.Array, from_M: jax.Array) -> tuple[Rows, Past]:
    """`rows` and `past` with those of numbers to_M replaced by the others' of numbers from_M, b · K + k. The same pair may be there twice.

    `cache` is that of the others' prompts. Arrays that are views are left as they are: what is returned is a copy.
    """
    return _take(rows, past, others, cache if past is None else ApartCache.of(cache), to_M, from_M)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def _take(rows: Rows, past: Past, others: Rows, cache: KVCache | ApartCache, to_M, from_M) -> tuple[Rows, Past]:
    K = rows.lengths_BxK.shape[1]
    (to_b, to_k), (from_b, from_k) = (jnp.divmod(numbers_M, K) for numbers_M in (to_M, from_M))

    def in_front(x, y):  # (B, K, …)
        return x.at[to_b, to_k].set(y[from_b, from_k])

    def in_cache(x, y, axis):
        if axis is None:
            return x  # all rows write where these do
        at, of = ((slice(None),) * axis + (k, b) for k, b in ((to_k, to_b), (from_k, from_b)))
        return from_bits(as_bits(x).at[at].set(as_bits(y)[of]))

    def with_prompts(into):
        axes = CACHE_K if isinstance(into, KVCache) else APART_K
        parts = [[getattr(part, field.name) for field in dataclasses.fields(into)] for part in (into, cache, axes)]
        return type(into)(*(jax.tree.map(functools.partial(in_cache, axis=axis), x, y) for x, y, axis in zip(*parts)))

    if past is None:
        cache = cache.with_room(rows.cache.capacity - cache.capacity)
        cache = cache if isinstance(rows.cache, KVCache) else ApartCache.of(cache)
        written = with_prompts(rows.cache)
    else:
        past = with_prompts(past)
        written = dataclasses.replace(rows.cache, positions_BxSx1=rows.cache.positions_BxSx1.at[to_k, to_b].set(-1))
    rest = {field.name: in_front(getattr(rows, field.name), getattr(others, field.name)) for field in dataclasses.fields(Rows)[1:]}
    return Rows(written, **rest), past


@functools.partial(jax.jit, static_argnums=5)
def begin_mixture(last_BxKxV, lengths_BxK, logw_BxK, stops_I, real_B, new_tokens: int) -> Rows:
    """A row for each question, without a cache, as `begin`."""
    rows = _rows(lengths_BxK, ~real_B[:, None], new_tokens)
    return _hear(rows, _mixed(last_BxKxV, logw_BxK), stops_I)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def go_mixture(graphdef, params, rows: Rows, past: Past, logw_BxK, stops_I) -> Rows:
    """Eq. 2 at every step, until all have ended: the k next-token distributions are mixed, one token is chosen, all k prompts read it."""
    each, k = _step(nnx.merge(graphdef, params), past), logw_BxK.shape[1]

    def step(token_Bx1, positions_BxK, cache):
        return each(jnp.repeat(token_Bx1, k, axis=1), positions_BxK, cache)

    return _go(step, lambda logits_BxKxV: _mixed(logits_BxKxV, logw_BxK), rows, stops_I, len(logw_BxK))


def _mixed(logits_BxKxV: jax.Array, logw_BxK: jax.Array) -> jax.Array:
    """(B, 1, V)."""
    return jax.vmap(mix_logprobs)(jax.nn.log_softmax(logits_BxKxV), logw_BxK)[:, None]


def _rows(lengths_BxK, done_BxR, new_tokens: int) -> Rows:
    """Rows that are still to hear of their first token."""
    none, nothing = jnp.zeros(done_BxR.shape, jnp.int32), jnp.zeros(done_BxR.shape)
    return Rows(None, lengths_BxK, none, none, done_BxR, nothing, jnp.full((*done_BxR.shape, new_tokens), -1, jnp.int32))


def _go(step, answers, rows: Rows, stops_I, enough) -> Rows:
    """`answers` makes the logits of the rows (B, R, V) of those of the prompts."""
    ended = jnp.sum(rows.done_BxR)

    def running(rows: Rows):
        return (jnp.sum(rows.done_BxR) - ended < enough) & ~jnp.all(rows.done_BxR)

    def body(rows: Rows) -> Rows:
        S = rows.ids_BxRxS.shape[-1]
        here_BxRxS = (jnp.arange(S)[None, None] == rows.taken_BxR[..., None]) & ~rows.done_BxR[..., None]
        ids_BxRxS = jnp.where(here_BxRxS, rows.token_BxR[..., None], rows.ids_BxRxS)
        logits_BxKxV, cache = step(rows.token_BxR, rows.lengths_BxK + rows.taken_BxR, rows.cache)
        slot = jnp.where(cache.next_slot < cache.capacity, cache.next_slot, cache.capacity - S)
        cache, taken_BxR = dataclasses.replace(cache, next_slot=slot), rows.taken_BxR + ~rows.done_BxR
        return _hear(dataclasses.replace(rows, cache=cache, taken_BxR=taken_BxR, ids_BxRxS=ids_BxRxS), answers(logits_BxKxV), stops_I)

    return jax.lax.while_loop(running, body, rows)


def _hear(rows: Rows, logits_BxRxV: jax.Array, stops_I) -> Rows:
    """The rows with their next token, the likeliest. One that stops, or has no room, ends: its probability is that of any stop token."""
    norm_BxR = jax.nn.logsumexp(logits_BxRxV, axis=-1)
    token_BxR = jnp.argmax(logits_BxRxV, -1).astype(jnp.int32)
    stops_BxR = jnp.any(token_BxR[..., None] == stops_I[None, None], axis=-1) | (rows.taken_BxR == rows.ids_BxRxS.shape[-1])
    logp_BxR = jnp.where(stops_BxR, _end_logprob(logits_BxRxV, norm_BxR, stops_I), jnp.max(logits_BxRxV, -1) - norm_BxR)
    logp_BxR = rows.logp_BxR + jnp.where(rows.done_BxR, 0.0, logp_BxR)
    return dataclasses.replace(rows, token_BxR=token_BxR, done_BxR=rows.done_BxR | stops_BxR, logp_BxR=logp_BxR)


def _step(model: LM | ApartLM, past: Past) -> Callable:
    """(token_BxK, positions_BxK, cache) → (logits_BxKxV, cache): one more token in every row. An LM that is not apart has no `past`."""
    if isinstance(model, ApartLM):
        apart = jax.vmap(model.decode_step, in_axes=(1, 1, APART_K, APART_K if past else None), out_axes=(1, APART_K))
        return lambda token_BxK, positions_BxK, cache: apart(token_BxK, positions_BxK, cache, past)

    def one(token_B, positions_B, cache):
        hidden_Bx1xD, k, v = model.extend(token_B[:, None], positions_B[:, None], Segments(jnp.ones_like(token_B)[:, None]), cache)
        return model.logits(hidden_Bx1xD[:, 0]), k, v

    def step(token_BxK, positions_BxK, cache):
        logits_BxKxV, k, v = jax.vmap(one, in_axes=(1, 1, CACHE_K), out_axes=1)(token_BxK, positions_BxK, cache)
        # The write stands outside: vmap's rule for it would transpose the whole cache and back.
        return logits_BxKxV, cache.append(k, v, positions_BxK.T[..., None])

    return step


# -- candidates -------------------------------------------------------------------------------------------------------------------------


@jax.jit
def token_logprobs(last_BxKxV: jax.Array, tokens_BxC: jax.Array, stops_I: jax.Array) -> jax.Array:
    """log p of each token as the first after each prompt (B, K, C); below 0 it is the end, by any stop token."""
    tokens_Bx1xC = tokens_BxC[:, None]
    end_BxKx1 = _end_logprob(last_BxKxV, jnp.zeros(()), stops_I)[..., None]
    return jnp.where(tokens_Bx1xC < 0, end_BxKx1, jnp.take_along_axis(last_BxKxV, jnp.maximum(tokens_Bx1xC, 0), axis=-1))


@functools.partial(jax.jit, static_argnums=0)
def score_nodes(
    graphdef, params, last_BxKxV, lengths_BxK, cache, tokens_RxN, depths_RxN, ends_RxN, parents_RxN, stops_I, of_R=None, indices_M=None
):
    """Candidates as R rows of trees of N tokens, read over the caches of the K prompts of a question, the one that `of_R` says.

    `of_R` may be None: then rows are questions. `indices_M` (int32) are of the real tokens among the R·N, where those are read in one line.
    Returns log p of each token after those before it (R, K, N), of the end after each token (R, K, N), and of the end at once (R, K).
    """
    lm = nnx.merge(graphdef, params)
    vocabulary, rows = lm.vocabulary(), Trees(ends_RxN, indices_M)
    line = Line.of(rows.real_BxT, indices_M)

    def read(lengths_B, cache):
        return lm.extend(tokens_RxN, picked(lengths_B, of_R)[:, None] + depths_RxN, rows, cache, of_R)[0]

    hidden_RxKxNxD = jax.vmap(read, in_axes=(1, CACHE_K), out_axes=1)(lengths_BxK, cache)
    # All prompts' nodes together, and of a line its tokens alone: the vocabulary's products have as many rows as there are.
    real_RxKxNxD = jax.vmap(line.unpad, 1, 1)(hidden_RxKxNxD)
    real_QxNxD = real_RxKxNxD.reshape(-1, *real_RxKxNxD.shape[2:])
    norm_QxN = vocabulary.normalizers(real_QxNxD)
    end_QxN = jax.nn.logsumexp(vocabulary.of(stops_I).logits(real_QxNxD), axis=-1) - norm_QxN
    norm_RxKxN, end_RxKxN = (jax.vmap(line.pad, 1, 1)(x.reshape(real_RxKxNxD.shape[:3])) for x in (norm_QxN, end_QxN))
    # A token's logits are those of its parent; a first token's are the prompt's.
    R, K, _ = norm_RxKxN.shape
    tokens_Rx1xN, before_Rx1xN = tokens_RxN[:, None], jnp.maximum(parents_RxN, 0)[:, None]
    of_Rx1x1 = (jnp.arange(R) if of_R is None else of_R)[:, None, None]
    first_RxKxN = last_BxKxV[of_Rx1x1, jnp.arange(K)[None, :, None], tokens_Rx1xN]
    before_RxKxNxD = jnp.take_along_axis(hidden_RxKxNxD, before_Rx1xN[..., None], axis=2)
    after_RxKxN = vocabulary.token_logits(before_RxKxNxD, tokens_Rx1xN) - jnp.take_along_axis(norm_RxKxN, before_Rx1xN, axis=2)
    logp_RxKxN = jnp.where(parents_RxN[:, None] < 0, first_RxKxN, after_RxKxN)
    return logp_RxKxN, end_RxKxN, picked(_end_logprob(last_BxKxV, jnp.zeros(()), stops_I), of_R)


def _end_logprob(logits_xV: jax.Array, norm_x: jax.Array, stops_I: jax.Array) -> jax.Array:
    """log-probability that the answer ends here: of all stop tokens together. `norm_x` is logsumexp(logits)."""
    return jax.nn.logsumexp(jnp.take(logits_xV, stops_I, axis=-1), axis=-1) - norm_x
