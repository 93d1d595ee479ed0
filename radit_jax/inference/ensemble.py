"""Eq. 2: p(y | x, C') = Σ_c p_LM(y | c∘x) · p_R(c | x), by `vmap` over the k prompts of a question (paper section 2.1 and SPEC section 5).

`choose` weighs given choices. `generate` is free text: at *sequence* level (the paper's) every prompt decodes on its own and each distinct
answer gets its Eq. 2 probability under all k prompts; at *token* level the k distributions are mixed at every step.

An answer ends where the LM says so, by eos or a new line. Its probability includes that end, so that "Paris" and "Paris, France" compare
fairly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from radit_jax import distributed, sharding
from radit_jax.data import trees
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.padding import bucket, pad_rows
from radit_jax.errors import InputError
from radit_jax.models import flash
from radit_jax.models.apart import APART, ApartCache, ApartLM
from radit_jax.models.attention import Segments, Trees
from radit_jax.models.layers import platform
from radit_jax.models.lm import LM, KVCache
from radit_jax.types import PyTree

LOOK = 3  # tokens of every answer that are read under all prompts before most are dropped
ROUNDING = 1e-3  # nats by which two ways of computing a log-probability may differ


def mix_logprobs(logp_KxV: jax.Array, logw_K: jax.Array) -> jax.Array:
    """log Σ_k w_k p_k: probabilities are averaged, never logits (SPEC trap 7)."""
    return jax.nn.logsumexp(logp_KxV + logw_K[:, None], axis=0)


def passage_logweights(scores_K: np.ndarray, score_scale: float) -> np.ndarray:
    """log p_R(c | x): log softmax of the scaled scores over the k retrieved passages only."""
    scaled_K = np.asarray(scores_K, np.float64) * score_scale
    shifted_K = scaled_K - scaled_K.max()
    return (shifted_K - np.log(np.exp(shifted_K).sum())).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Prompted:
    """A question ready for the ensemble: the ids of its k prompts and the log-weights of their passages."""

    id: str
    prompts: tuple[Sequence[int], ...]
    logw_K: np.ndarray


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the ensemble says: `text`, its log-probability by Eq. 2, and what each prompt said on its own (empty at token level)."""

    text: str
    logprob: float
    own_texts: tuple[str, ...]
    own_logprobs: tuple[float, ...]


@dataclasses.dataclass
class Ensemble:
    """An LM with its tokenizer, answering questions over k prompts each. About `batch_tokens` prompt tokens run at once.

    On a mesh (the one that the LM's parameters lie on) the questions that run at once are spread over its data axis, the k prompts of one
    stay together. Of several processes all ask the same questions in the same order, and all get the answers.
    """

    lm: nnx.Module
    maker: InstanceMaker
    batch_tokens: int = 4096
    max_new_tokens: int = 16
    mesh: Mesh | None = None

    def __post_init__(self):
        self.graphdef, self.params = nnx.split(self.lm)
        self.mesh = sharding.make_mesh(1, 1) if self.mesh is None else self.mesh
        self.shapes: set[tuple[int, ...]] = set()  # of prompts, and of candidates after prompts: a compile each, and one of decoding
        self.read = self.computed = 0  # prompt tokens; with padding
        stops_I = np.flatnonzero(stop_tokens(self.maker.tokenizer, self.lm.config.vocab_size)).astype(np.int32)
        self.stops_I = jax.make_array_from_callback(stops_I.shape, sharding.replicated(self.mesh), lambda index: stops_I[index])

    def prompted(
        self, example_id: str, prompt: str, backgrounds: Sequence[str | None], logw_K: np.ndarray, *, before: Sequence[str] = ()
    ) -> Prompted:
        """One prompt per passage, `Background: {passage}\\n\\n{prompt}`, `before` it in-context examples.

        (None,) and log-weight 0 is the closed book.
        """
        how = {"before": before, "room_for": self.max_new_tokens, "example_id": example_id}
        ids = tuple(self.maker.prompt_ids(prompt, background, **how) for background in backgrounds)
        return Prompted(example_id, ids, np.asarray(logw_K, np.float32))

    def generate(
        self,
        questions: Sequence[Prompted],
        *,
        level: Literal["sequence", "token"] = "sequence",
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[Answer]:
        """Greedy free-text answers in the order given."""
        if level not in ("sequence", "token"):
            raise InputError(f"ensemble level is {level!r}, expected sequence or token")
        answers: list[Answer | None] = [None] * len(questions)
        run = self._sequence_level if level == "sequence" else self._token_level
        for rows, (tokens_BxKxT, lengths_BxK, logw_BxK) in self._batches(questions):
            with jax.set_mesh(self.mesh):
                for row, answer in zip(rows, run(tokens_BxKxT, lengths_BxK, logw_BxK)):
                    answers[row] = answer
            advance(len(rows))
        return answers

    def choose(
        self,
        questions: Sequence[Prompted],
        choices: Sequence[Sequence[Sequence[int]]],
        *,
        ends: bool = False,
        advance: Callable[[int], None] = lambda n: None,
    ) -> list[np.ndarray]:
        """log p(choice) by Eq. 2 for every choice (token ids) of every question: the best is the argmax.

        `ends` counts the end of the answer as part of it.
        """
        out: list[np.ndarray | None] = [None] * len(questions)
        for rows, (tokens_BxKxT, lengths_BxK, logw_BxK) in self._batches(questions):
            listed = [choices[row] for row in rows] + [choices[rows[-1]]] * (len(tokens_BxKxT) - len(rows))
            with jax.set_mesh(self.mesh):
                lengths_BxK, last_BxKxV, cache = self._prefill(tokens_BxKxT, lengths_BxK, 0)
                logp_BxKxC = self._candidates(listed, last_BxKxV, lengths_BxK, cache, ends)
            mixed_BxC = _mixed(logp_BxKxC, logw_BxK)
            for b, row in enumerate(rows):
                out[row] = mixed_BxC[b, : len(choices[row])]
            advance(len(rows))
        return out

    def facts(self) -> dict[str, Any]:
        """`padding` is the share of the computed prompt tokens that were none; `shapes` are of prompts and of candidates after them."""
        return {"padding": round(1 - self.read / max(self.computed, 1), 4), "shapes": len(self.shapes)}

    def _sequence_level(self, tokens_BxKxT, lengths_BxK, logw_BxK) -> Iterator[Answer]:
        lengths_BxK, last_BxKxV, cache = self._prefill(tokens_BxKxT, lengths_BxK, self.max_new_tokens)
        decoded = decode_each(self.graphdef, self.params, last_BxKxV, lengths_BxK, cache, self.stops_I, self.max_new_tokens)
        ids_BxKxS, own_BxK = map(distributed.to_host, decoded)
        found = [self._distinct(ids_KxS) for ids_KxS in ids_BxKxS]
        heard = zip(found, own_BxK, logw_BxK)
        said = [_Said(list(texts.values()), own_ids, own_K, logw_K) for (texts, _, own_ids), own_K, logw_K in heard]
        # The likeliest answer alone, before the others: after it most others are out of the question.
        for depth, most in ((LOOK, None), (self.max_new_tokens, 1), (self.max_new_tokens, None)):
            asked = [of.doubtful()[:most] for of in said]
            if not any(asked):
                break
            whole = depth >= self.max_new_tokens
            listed = [[of.answers[c][:depth] for c in of_question] for of, of_question in zip(said, asked)]
            logp_BxKxC = self._candidates(listed, last_BxKxV, lengths_BxK, cache, ends=whole)
            for of, of_question, logp_KxC in zip(said, asked, logp_BxKxC):
                of.hear(of_question, logp_KxC, whole)
        for (texts, own, _), of, own_K in zip(found, said, own_BxK):
            best, logprob = of.best()
            yield Answer(list(texts)[best], logprob, tuple(own), tuple(map(float, own_K)))

    def _token_level(self, tokens_BxKxT, lengths_BxK, logw_BxK) -> Iterator[Answer]:
        lengths_BxK, last_BxKxV, cache = self._prefill(tokens_BxKxT, lengths_BxK, self.max_new_tokens)
        logw_BxK = sharding.put_rows(self.mesh, logw_BxK)
        ids_BxS, logp_B = decode_mixture(
            self.graphdef, self.params, last_BxKxV, lengths_BxK, cache, logw_BxK, self.stops_I, self.max_new_tokens
        )
        for ids_S, logp in zip(distributed.to_host(ids_BxS), distributed.to_host(logp_B)):
            yield Answer(self._text(ids_S)[0], float(logp), (), ())

    def _prefill(self, tokens_BxKxT: np.ndarray, lengths_BxK: np.ndarray, new_tokens: int) -> tuple[jax.Array, jax.Array, KVCache]:
        """The lengths on the mesh, and what `prefill` returns."""
        self.shapes.add(tokens_BxKxT.shape)
        self.computed += tokens_BxKxT.size
        lengths_BxK = sharding.put_rows(self.mesh, lengths_BxK)
        return lengths_BxK, *prefill(self.graphdef, self.params, sharding.put_rows(self.mesh, tokens_BxKxT), lengths_BxK, new_tokens)

    def _distinct(self, ids_KxS: np.ndarray) -> tuple[dict[str, list[int]], list[str], list[list[int]]]:
        """{text: ids} of the distinct answers in passage order, and the answer of each passage, its text and its ids."""
        own = [self._text(ids_S) for ids_S in ids_KxS]
        texts: dict[str, list[int]] = {}
        for text, ids in own:
            texts.setdefault(text, ids)
        return texts, [text for text, _ in own], [ids for _, ids in own]

    def _text(self, ids_S: np.ndarray) -> tuple[str, list[int]]:
        ids = [int(i) for i in ids_S if i >= 0]
        return self.maker.tokenizer.decode(ids).split("\n")[0].strip(), ids

    def _candidates(self, listed: Sequence[Sequence[Sequence[int]]], last_BxKxV, lengths_BxK, cache, ends: bool) -> np.ndarray:
        """logp_BxKxC of the listed candidates (ids) of each question, on the host; a candidate that is not there has −inf.

        With `ends` the probability that the answer ends there is part of it.
        """
        grown = [trees.grow(choices, worth=1) for choices in listed]
        steps = {"smallest": 8} if self.mesh.devices.flat[0].platform == "cpu" else {"smallest": 64, "parts": 1}  # fewer compiles there
        width = bucket(max(sum(tree.size for tree in row) for row in grown), **steps)
        forests = [trees.plant(choices, [row], width) for choices, row in zip(listed, grown)]
        nodes = zip(*((forest.tokens_RxT, forest.positions_RxT, forest.ends_RxT, forest.parents_RxT()) for forest in forests))
        self.shapes.add((*last_BxKxV.shape[:2], cache.positions_BxS.shape[-1], width))
        on_mesh = (sharding.put_rows(self.mesh, np.concatenate(rows)) for rows in nodes)
        found = score_nodes(self.graphdef, self.params, last_BxKxV, lengths_BxK, cache, *on_mesh, self.stops_I)
        logp_BxKxN, end_BxKxN, end_BxK = map(distributed.to_host, found)
        logp_BxKxC = np.full((*end_BxK.shape, max(map(len, listed))), -np.inf, np.float32)
        for b, forest in enumerate(forests):
            for c, path in enumerate(forest.paths):
                logp_BxKxC[b, :, c] = logp_BxKxN[b][:, path].sum(-1)
                if ends:
                    logp_BxKxC[b, :, c] += end_BxKxN[b, :, path[-1]] if len(path) else end_BxK[b]
        return logp_BxKxC

    def _batches(self, questions: Sequence[Prompted]) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """Longest first: which questions, and their (tokens_BxKxT, lengths_BxK, logw_BxK)."""
        longest = [max(len(ids) for ids in question.prompts) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: -longest[i])
        start = 0
        while start < len(order):
            width = bucket(longest[order[start]], smallest=32)
            width = width if self.lm.config.attention == flash.REFERENCE else flash.whole_blocks(width)
            size = sharding.whole_rows(self.mesh, self.batch_tokens // (width * len(questions[order[start]].prompts)))
            rows = order[start : start + size]
            chosen = [questions[row] for row in rows]
            self.read += sum(len(ids) for question in chosen for ids in question.prompts)
            filled = chosen + [chosen[-1]] * (size - len(chosen))  # the last batch keeps the shape of the others
            padded = [pad_rows(question.prompts, width) for question in filled]
            yield rows, tuple(np.stack(part) for part in (*zip(*padded), [question.logw_K for question in filled]))
            start += size


class _Said:
    """The distinct answers to one question, of which the most likely by Eq. 2 is looked for, and what is known of log p(answer | prompt).

    A prompt's own answer has the probability it was decoded with. Of another's there is an upper bound, that of its first tokens: most
    answers are out of the question after few.
    """

    def __init__(self, answers: Sequence[list[int]], own_ids: Sequence[list[int]], own_K: np.ndarray, logw_K: np.ndarray):
        self.answers, self.logw_K = answers, logw_K
        self.known_KxC = np.asarray([[ids == own for ids in answers] for own in own_ids])
        self.upper_KxC = np.where(self.known_KxC, own_K[:, None], 0.0)

    def doubtful(self) -> list[int]:
        """Which answers may be the best and are not known under all prompts, the likeliest first."""
        least = np.max(_mixed(np.where(self.known_KxC, self.upper_KxC, -np.inf), self.logw_K))
        most_C = _mixed(self.upper_KxC, self.logw_K)
        may_be_C = (most_C >= least - ROUNDING) & ~self.known_KxC.all(axis=0)
        return [int(c) for c in np.argsort(-most_C, kind="stable") if may_be_C[c]]

    def hear(self, asked: Sequence[int], logp_KxC: np.ndarray, whole: bool) -> None:
        """log p of the answers that were asked about, or, if it is not of the whole answers, upper bounds of it."""
        for i, c in enumerate(asked):
            self.upper_KxC[:, c] = np.where(self.known_KxC[:, c], self.upper_KxC[:, c], logp_KxC[:, i])
            self.known_KxC[:, c] |= whole

    def best(self) -> tuple[int, float]:
        """Which it is, and its log-probability. What is not known is below it by its upper bound."""
        mixed_C = np.where(self.known_KxC.all(axis=0), _mixed(self.upper_KxC, self.logw_K), -np.inf)
        best = int(np.argmax(mixed_C))
        return best, float(mixed_C[best])


def _mixed(logp_xKxC: np.ndarray, logw_xK: np.ndarray) -> np.ndarray:
    """Eq. 2 for each candidate, (…, C): log Σ_k w_k p_k."""
    return np.logaddexp.reduce(logp_xKxC + logw_xK[..., None], axis=-2)


def stop_tokens(tokenizer, vocab_size: int) -> np.ndarray:
    """stops_V: True for eos and every token whose text begins with a new line."""
    stops_V = np.zeros(vocab_size, bool)
    stops_V[tokenizer.eos_id] = True
    for i in range(min(tokenizer.vocab_size, vocab_size)):
        stops_V[i] |= tokenizer.decode([i]).startswith("\n")
    return stops_V


# The device functions. B is the batch of questions, K their prompts; the LM sees one prompt per row and `vmap` runs it over K (axis 1).

# Where K is in a cache: after L, for a scan over layers would otherwise transpose the cache in every step; all prompts write the same slot.
CACHE_K = KVCache(k_LxBxGxSxh=1, v_LxBxGxSxh=1, positions_BxS=0, next_slot=None)
APART_K = ApartCache(k_BxGxSxh=0, v_BxGxSxh=0, positions_BxSx1=0, next_slot=None)


@functools.partial(jax.jit, static_argnums=(0, 4))
def prefill(graphdef: nnx.GraphDef, params: PyTree, tokens_BxKxT: jax.Array, lengths_BxK: jax.Array, new_tokens: int):
    """Reads the k prompts of each question: log-probs of the next token (B, K, V) and the KV caches, with room for `new_tokens`."""
    lm = nnx.merge(graphdef, params)

    def one(tokens_BxT, lengths_B):
        hidden_BxTxD, cache = lm.prefill(tokens_BxT, lengths_B, tokens_BxT.shape[1] + new_tokens)
        last_BxD = jnp.take_along_axis(hidden_BxTxD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return jax.nn.log_softmax(lm.logits(last_BxD)), cache

    return jax.vmap(one, in_axes=(1, 1), out_axes=(1, CACHE_K))(tokens_BxKxT, lengths_BxK)


@functools.partial(jax.jit, static_argnums=(0, 6))
def decode_each(graphdef, params, last_BxKxV, lengths_BxK, cache, stops_I, new_tokens: int):
    """Greedy decoding of every prompt on its own: (ids_BxKxS with −1 after the end, logp_BxK of the ids and their end)."""
    step, cache = _step(nnx.merge(graphdef, params), cache)
    return _decode(step, lambda logits_BxKxV: logits_BxKxV, last_BxKxV, lengths_BxK, cache, stops_I, new_tokens)


@functools.partial(jax.jit, static_argnums=(0, 7))
def decode_mixture(graphdef, params, last_BxKxV, lengths_BxK, cache, logw_BxK, stops_I, new_tokens: int):
    """Eq. 2 at every step: the k next-token distributions are mixed, one token is chosen, all k prompts read it: (ids_BxS, logp_B)."""
    each, cache = _step(nnx.merge(graphdef, params), cache)
    k = lengths_BxK.shape[1]

    def mixed(logits_BxKxV):
        return jax.vmap(mix_logprobs)(jax.nn.log_softmax(logits_BxKxV), logw_BxK)[:, None]

    def step(token_Bx1, positions_BxK, cache):
        return each(jnp.repeat(token_Bx1, k, axis=1), positions_BxK, cache)

    ids_Bx1xS, logp_Bx1 = _decode(step, mixed, last_BxKxV, lengths_BxK, cache, stops_I, new_tokens)
    return ids_Bx1xS[:, 0], logp_Bx1[:, 0]


def _step(lm: LM, cache: KVCache) -> tuple[Callable, PyTree]:
    """(token_BxK, positions_BxK, cache) → (logits_BxKxV, cache): one more token in every row; and the cache in the form that it takes."""
    if platform() in APART:
        return jax.vmap(ApartLM(lm).decode_step, in_axes=(1, 1, APART_K), out_axes=(1, APART_K)), ApartCache.of(cache)

    def one(token_B, positions_B, cache):
        hidden_Bx1xD, k, v = lm.extend(token_B[:, None], positions_B[:, None], Segments(jnp.ones_like(token_B)[:, None]), cache)
        return lm.logits(hidden_Bx1xD[:, 0]), k, v

    def step(token_BxK, positions_BxK, cache):
        logits_BxKxV, k, v = jax.vmap(one, in_axes=(1, 1, CACHE_K), out_axes=1)(token_BxK, positions_BxK, cache)
        # The write stands outside: vmap's rule for it would transpose the whole cache and back.
        return logits_BxKxV, cache.append(k, v, positions_BxK.T[..., None])

    return step, cache


def _decode(step, answers, last_BxKxV, lengths_BxK, cache, stops_I, new_tokens: int):
    """The loop both levels share; it ends when every row has ended. R rows per question: K (each on its own) or 1 (the mixture).

    `answers` makes the rows' logits (B, R, V) from the prompts'. An answer's probability has that of its end in it, by any stop token,
    also where it is cut for want of tokens.
    """

    def choose(logits_BxKxV):
        """(the likeliest token, its log-probability or that of the end if it is a stop token, the log-probability of the end)."""
        logits_BxRxV = answers(logits_BxKxV)
        norm_BxR = jax.nn.logsumexp(logits_BxRxV, axis=-1)
        token_BxR = jnp.argmax(logits_BxRxV, -1).astype(jnp.int32)
        end_BxR = _end_logprob(logits_BxRxV, norm_BxR, stops_I)
        stops_BxR = jnp.any(token_BxR[..., None] == stops_I[None, None], axis=-1)
        return token_BxR, jnp.where(stops_BxR, end_BxR, jnp.max(logits_BxRxV, -1) - norm_BxR), end_BxR, stops_BxR

    def running(carry):
        s, _, done_BxR, *_ = carry
        return (s < new_tokens) & ~jnp.all(done_BxR)

    def body(carry):
        s, (token_BxR, logp_BxR, _, stops_BxR), done_BxR, total_BxR, ids_BxRxS, cache = carry
        total_BxR = total_BxR + jnp.where(done_BxR, 0.0, logp_BxR)
        done_BxR = done_BxR | stops_BxR
        ids_BxRxS = ids_BxRxS.at[:, :, s].set(jnp.where(done_BxR, -1, token_BxR))
        logits_BxKxV, cache = step(token_BxR, lengths_BxK + s, cache)
        return s + 1, choose(logits_BxKxV), done_BxR, total_BxR, ids_BxRxS, cache

    chosen = choose(last_BxKxV)
    rows = chosen[0].shape
    carry = (jnp.int32(0), chosen, jnp.zeros(rows, bool), jnp.zeros(rows), jnp.full((*rows, new_tokens), -1, jnp.int32), cache)
    _, (_, _, end_BxR, _), done_BxR, total_BxR, ids_BxRxS, _ = jax.lax.while_loop(running, body, carry)
    return ids_BxRxS, total_BxR + jnp.where(done_BxR, 0.0, end_BxR)


@functools.partial(jax.jit, static_argnums=0)
def score_nodes(graphdef, params, last_BxKxV, lengths_BxK, cache, tokens_BxN, depths_BxN, ends_BxN, parents_BxN, stops_I):
    """Candidates of each question as trees of N tokens, read over the caches of its K prompts.

    Returns log p of each token after those before it (B, K, N), of the end after each token (B, K, N), and of the end at once (B, K).
    """
    lm = nnx.merge(graphdef, params)
    vocabulary = lm.vocabulary()

    def read(lengths_B, cache):
        return lm.extend(tokens_BxN, lengths_B[:, None] + depths_BxN, Trees(ends_BxN), cache)[0]

    def one(args):
        last_BxV, hidden_BxNxD = args
        norm_BxN = vocabulary.normalizers(hidden_BxNxD)
        # A token's logits are those of its parent; a first token's are the prompt's.
        b_Bx1, before_BxN = jnp.arange(len(tokens_BxN))[:, None], jnp.maximum(parents_BxN, 0)
        after_BxN = vocabulary.token_logits(hidden_BxNxD[b_Bx1, before_BxN], tokens_BxN) - norm_BxN[b_Bx1, before_BxN]
        logp_BxN = jnp.where(parents_BxN < 0, jnp.take_along_axis(last_BxV, tokens_BxN, axis=-1), after_BxN)
        end_BxN = jax.nn.logsumexp(vocabulary.of(stops_I).logits(hidden_BxNxD), axis=-1) - norm_BxN
        return logp_BxN, end_BxN, _end_logprob(last_BxV, jnp.zeros(()), stops_I)

    hidden_KxBxNxD = jax.vmap(read, in_axes=(1, CACHE_K))(lengths_BxK, cache)
    found = jax.lax.map(one, (jnp.swapaxes(last_BxKxV, 0, 1), hidden_KxBxNxD))
    return tuple(jnp.swapaxes(part, 0, 1) for part in found)


def _end_logprob(logits_xV: jax.Array, norm_x: jax.Array, stops_I: jax.Array) -> jax.Array:
    """log-probability that the answer ends here: of all stop tokens together. `norm_x` is logsumexp(logits)."""
    return jax.nn.logsumexp(jnp.take(logits_xV, stops_I, axis=-1), axis=-1) - norm_x
