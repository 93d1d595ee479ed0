"""One question, answered as it is heard: tokens of the mixture as they are chosen, or what each passage says as its row ends.

`Ensemble.generate` answers many questions at once and is silent until the end; a person who waits for one answer wants to see it come.
The answers are the same. On one device only: `possible` says whether that is so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radit_jax import sharding
from radit_jax.data.padding import pad_rows
from radit_jax.inference import decode
from radit_jax.inference.ensemble import Answer, Ensemble, Prompted


def possible(ensemble: Ensemble) -> bool:
    """Whether one device holds the whole LM."""
    return ensemble.mesh.size == 1


def by_token(ensemble: Ensemble, question: Prompted, heard: Callable[[str, float], None]) -> Answer:
    """Eq. 2 at every step. `heard` is given the text so far and its log-probability after each token.

    Unlike `generate` it also tells what each prompt says on its own, which is decoded after the answer.
    """
    stops_I, ids, logp = np.asarray(ensemble.stops_I), [], 0.0
    logw_K = jnp.asarray(question.logw_K)
    with jax.set_mesh(ensemble.mesh):
        read = lengths_1xK, last_1xKxV, cache = _read(ensemble, question)
        cache = cache.with_room(ensemble.max_new_tokens)
        mixed_V = np.asarray(jax.vmap(decode.mix_logprobs)(last_1xKxV, logw_K[None])[0])
        while len(ids) < ensemble.max_new_tokens and (token := int(mixed_V.argmax())) not in stops_I:
            logp += float(mixed_V[token])
            places_1xK = lengths_1xK + len(ids)
            mixed_V, cache = _next(ensemble.graphdef, ensemble.params, jnp.full_like(lengths_1xK, token), places_1xK, cache, logw_K)
            mixed_V = np.asarray(mixed_V)
            ids.append(token)
            heard(ensemble.said(ids)[0], logp)
        lengths_1xK, last_1xKxV, cache = read
        sizes = (ensemble.stops_I, ensemble.max_new_tokens)
        ids_1xKxS, own_1xK = decode.decode_each(ensemble.graphdef, ensemble.params, last_1xKxV, lengths_1xK, cache, *sizes)
    own = tuple(ensemble.said(ids_S)[0] for ids_S in np.asarray(ids_1xKxS)[0])
    end = float(np.logaddexp.reduce(mixed_V[stops_I]))
    return Answer(ensemble.said(ids)[0], logp + end, own, tuple(map(float, np.asarray(own_1xK)[0])))


def by_passage(ensemble: Ensemble, question: Prompted, heard: Callable[[int, str, float], None]) -> Answer:
    """Each prompt on its own, then Eq. 2 over their answers. `heard` is given a prompt's number, its answer and how probable it found that.

    The prompts are read twice: once to decode them, once to weigh the answers.
    """
    told: set[int] = set()
    with jax.set_mesh(ensemble.mesh):
        lengths_1xK, last_1xKxV, cache = _read(ensemble, question)
        real_1 = sharding.put_rows(ensemble.mesh, np.ones(1, bool))
        rows = decode.begin(last_1xKxV, lengths_1xK, ensemble.stops_I, real_1, ensemble.max_new_tokens)
        rows, past = decode.over(rows, cache, apart=False)
        while True:
            ended_K, ids_KxS, logp_K = (np.asarray(part[0]) for part in (rows.done_BxR, rows.ids_BxRxS, rows.logp_BxR))
            for k in sorted(set(map(int, np.flatnonzero(ended_K))) - told):
                told.add(k)
                heard(k, ensemble.said(ids_KxS[k])[0], float(logp_K[k]))
            if ended_K.all():
                break
            rows = decode.go(ensemble.graphdef, ensemble.params, rows, past, ensemble.stops_I, 1)
    distinct, own, _ = ensemble.distinct(ids_KxS)
    logp_C = ensemble.choose([question], [list(distinct.values())], ends=True)[0]
    best = int(np.argmax(logp_C))
    return Answer(list(distinct)[best], float(logp_C[best]), tuple(own), tuple(map(float, logp_K)))


def _read(ensemble: Ensemble, question: Prompted) -> tuple[jax.Array, jax.Array, decode.KVCache]:
    """lengths_1xK, log-probs of the next token (1, K, V), and the prompts' cache."""
    width = ensemble.width(max(map(len, question.prompts)))
    return ensemble.prefill(*(part[None] for part in pad_rows(question.prompts, width)))


@functools.partial(jax.jit, static_argnums=0)
def _next(graphdef: nnx.GraphDef, params, token_1xK, places_1xK, cache, logw_K):
    """The mixture's log-probs (V) of what follows `token`, read after every prompt, and the cache with it."""
    step = jax.vmap(nnx.merge(graphdef, params).decode_step, in_axes=(1, 1, decode.CACHE_K), out_axes=(1, decode.CACHE_K))
    logits_1xKxV, cache = step(token_1xK, places_1xK, cache)
    return decode.mix_logprobs(jax.nn.log_softmax(logits_1xKxV[0]), logw_K), cache
