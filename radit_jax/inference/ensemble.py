"""Eq. 2: p(y | x, C') = Σ_c p_LM(y | c∘x) · p_R(c | x), by `vmap` over the k prompts of a question (paper section 2.1 and SPEC section 5).

`choose` weighs given choices. `generate` is free text: at *sequence* level (the paper's) every prompt decodes on its own and each distinct
answer gets its Eq. 2 probability under all k prompts; at *token* level the k distributions are mixed at every step.

An answer ends where the LM says so, by eos or a new line. Its probability includes that end, so that "Paris" and "Paris, France" compare
fairly.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from radit_jax import distributed, sharding, streams
from radit_jax.data import trees
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.padding import ALIKE, bucket, computed, line_of_call, line_rows, pad_rows, real_indices, whole_line
from radit_jax.errors import InputError
from radit_jax.inference import decode, pruning
from radit_jax.inference.decode import Rows
from radit_jax.models import flash
from radit_jax.models.apart import ApartLM
from radit_jax.models.lm import KVCache
from radit_jax.types import PyTree

T = TypeVar("T")
_Candidate = tuple[Sequence[int], bool]  # ids, and whether the probability that the answer ends after them is part of theirs
_Batch = tuple[list[int], tuple[np.ndarray, np.ndarray, np.ndarray]]  # numbers of the questions; tokens_BxKxT, lengths_BxK, logw_BxK
NARROW = 32  # tokens of a row of candidates, read in one line: attention is over whole rows, with their padding


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
        self.mesh = sharding.mesh_or_one(self.mesh)
        self.shapes: set[tuple[int, ...]] = set()  # of prompts, and of candidates after prompts: a compile each, and one of decoding
        self.read = self.computed = 0  # prompt tokens; with padding
        stops_I = np.flatnonzero(stop_tokens(self.maker.tokenizer, self.lm.config.vocab_size)).astype(np.int32)
        self.stops_I = sharding.put_whole(self.mesh, stops_I)

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
        with jax.set_mesh(self.mesh):
            _ = self._decoder  # made once, before there are threads that would both make it
        for rows, found in self._run(self._sequence_level if level == "sequence" else self._token_level, questions):
            for row, answer in zip(rows, found):
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
        listed = [[(ids, ends) for ids in of_question] for of_question in choices]
        for rows, mixed_BxC in self._run(functools.partial(self._chosen, listed), questions):
            for row, mixed_C in zip(rows, mixed_BxC):
                out[row] = mixed_C[: len(choices[row])]
            advance(len(rows))
        return out

    def _run(self, run: Callable[[list[_Batch]], Iterator[T]], questions: Sequence[Prompted]) -> Iterator[T]:
        """What `run` makes of the batches of these questions, on the mesh: each stream has batches of its own, always the same."""
        batches = list(self._batches(questions))
        count = min(streams.count(self.mesh), len(batches))

        def part(own: list[_Batch]) -> Iterator[T]:
            with jax.set_mesh(self.mesh):
                yield from run(own)

        return streams.merged([part(batches[start::count]) for start in range(count)])

    def _chosen(self, listed: Sequence[Sequence[_Candidate]], batches: Iterable[_Batch]) -> Iterator[tuple[list[int], np.ndarray]]:
        for rows, (tokens_BxKxT, lengths_BxK, logw_BxK) in batches:
            lengths_BxK, last_BxKxV, cache = self.prefill(tokens_BxKxT, lengths_BxK)
            logp_BxKxC = self._candidates([listed[row] for row in rows], last_BxKxV, lengths_BxK, cache)
            yield rows, pruning.mixed(logp_BxKxC, logw_BxK)

    def facts(self) -> dict[str, Any]:
        """`padding` is the share of the computed prompt tokens that were none; `shapes` are of prompts and of candidates after them."""
        return {"padding": round(1 - self.read / max(self.computed, 1), 4), "shapes": len(self.shapes)}

    @functools.cached_property
    def _decoder(self) -> tuple[nnx.GraphDef, PyTree]:
        return nnx.split(self._decoding_lm)

    @functools.cached_property
    def _decoding_lm(self) -> nnx.Module:
        return decode.decoder(self.lm)

    @property
    def _apart(self) -> bool:
        return isinstance(self._decoding_lm, ApartLM)

    def _sequence_level(self, batches: Iterable[_Batch]) -> Iterator[tuple[list[int], list[Answer]]]:
        for _, of_shape in itertools.groupby(batches, lambda batch: batch[1][0].shape):
            for group in self._decoded(collections.deque(of_shape)):
                numbers, answers = group.numbers, self._answers(group)
                del group  # its cache, before the next is made
                yield numbers, answers

    def _decoded(self, batches: collections.deque[_Batch]) -> Iterator[_Group]:
        """The batches, all of one shape, read and decoded: each as soon as the last of its rows has ended.

        Rows decode side by side, as many as the first has; where one has ended, a prompt of the next batch takes its place.
        """
        first, waiting = self._read(batches.popleft()), None
        rows, past = decode.over(first.begun, first.cache, self._apart)
        count, K = first.own_BxK.size, first.own_BxK.shape[1]
        placed = {at: (first, at) for at in first.waiting}  # row here → whose it is, and its number there
        first.waiting.clear()
        del first  # a group is held, with its cache, until it is answered
        some = max(count // 4, 1)  # rows that are waited for before they are replaced
        while placed:
            rows = decode.go(*self._decoder, rows, past, self.stops_I, some if waiting or batches else count)
            done_BxK, ids_BxKxS, logp_BxK = map(distributed.to_host, (rows.done_BxR, rows.ids_BxRxS, rows.logp_BxR))
            for at in [at for at in placed if done_BxK[divmod(at, K)]]:
                group, source = placed.pop(at)
                if group.hear(source, ids_BxKxS[divmod(at, K)], logp_BxK[divmod(at, K)]):
                    if not (placed or waiting or batches):
                        rows = past = None  # nothing decodes any more: their cache makes room for the candidates
                    yield group
                del group
            free = [at for at in range(count) if at not in placed]
            while free and (waiting or batches):
                waiting = waiting or self._read(batches.popleft())
                moved = [(free.pop(), waiting.waiting.popleft()) for _ in range(min(some, len(free), len(waiting.waiting)))]
                placed |= {at: (waiting, source) for at, source in moved}
                to_M, from_M = np.asarray(moved + moved[-1:] * (some - len(moved)), np.int32).T
                rows, past = decode.take(rows, past, waiting.begun, waiting.cache, to_M, from_M)
                waiting = waiting if waiting.waiting else None

    def _read(self, batch: _Batch) -> _Group:
        numbers, (tokens_BxKxT, lengths_BxK, logw_BxK) = batch
        lengths_BxK, last_BxKxV, cache = self.prefill(tokens_BxKxT, lengths_BxK)
        real_B = self._real(numbers, logw_BxK)
        begun = decode.begin(last_BxKxV, lengths_BxK, self.stops_I, real_B, self.max_new_tokens)
        return _Group(numbers, logw_BxK, lengths_BxK, last_BxKxV, cache, begun)

    def _real(self, numbers: Sequence[int], logw_BxK: np.ndarray) -> jax.Array:
        """Which rows of a batch are questions, real_B on the mesh."""
        return sharding.put_rows(self.mesh, np.arange(len(logw_BxK)) < len(numbers))

    def _answers(self, group: _Group) -> list[Answer]:
        """Each distinct answer of a question gets its probability by Eq. 2; the best is it."""
        found = [self.distinct(ids_KxS) for ids_KxS in group.ids_BxKxS]
        answers = [list(texts.values()) for texts, _, _ in found]
        first_BxKxC = self._first(answers, group.last_BxKxV)
        contests = [
            pruning.Contest(of_question, own_ids, own_K, first_KxC[:, : len(of_question)], logw_K)
            for of_question, (_, _, own_ids), own_K, first_KxC, logw_K in zip(answers, found, group.own_BxK, first_BxKxC, group.logw_BxK)
        ]
        while any(asked := [contest.to_read() for contest in contests]):
            listed = [
                [(ids[c][:count], count == len(ids[c])) for c, count in of_question.items()] for ids, of_question in zip(answers, asked)
            ]
            logp_BxKxC = self._candidates(listed, group.last_BxKxV, group.lengths_BxK, group.cache)
            for contest, of_question, logp_KxC in zip(contests, asked, logp_BxKxC):
                contest.hear(of_question, logp_KxC)
        best = [contest.best() for contest in contests]
        return [
            Answer(list(texts)[at], logprob, tuple(own), tuple(map(float, own_K)))
            for (texts, own, _), (at, logprob), own_K in zip(found, best, group.own_BxK)
        ]

    def _token_level(self, batches: Iterable[_Batch]) -> Iterator[tuple[list[int], list[Answer]]]:
        for numbers, (tokens_BxKxT, lengths_BxK, logw_BxK) in batches:
            lengths_BxK, last_BxKxV, cache = self.prefill(tokens_BxKxT, lengths_BxK)
            real_B, logw_BxK = self._real(numbers, logw_BxK), sharding.put_rows(self.mesh, logw_BxK)
            begun = decode.begin_mixture(last_BxKxV, lengths_BxK, logw_BxK, self.stops_I, real_B, self.max_new_tokens)
            rows, past = decode.over(begun, cache, self._apart)
            rows = decode.go_mixture(*self._decoder, rows, past, logw_BxK, self.stops_I)
            ids_Bx1xS, logp_Bx1 = map(distributed.to_host, (rows.ids_BxRxS, rows.logp_BxR))
            yield numbers, [Answer(self.said(ids_1xS[0])[0], float(logp), (), ()) for ids_1xS, (logp,) in zip(ids_Bx1xS, logp_Bx1)]

    def prefill(self, tokens_BxKxT: np.ndarray, lengths_BxK: np.ndarray) -> tuple[jax.Array, jax.Array, KVCache]:
        """The lengths on the mesh, and what `prefill` returns."""
        indices_N = self._line(tokens_BxKxT, lengths_BxK)
        self.shapes.add(tokens_BxKxT.shape + np.shape(indices_N))
        tokens_BxKxT, lengths_BxK = (sharding.put_rows(self.mesh, array) for array in (tokens_BxKxT, lengths_BxK))
        return lengths_BxK, *decode.prefill(self.graphdef, self.params, tokens_BxKxT, lengths_BxK, indices_N)

    def _line(self, tokens_BxKxT: np.ndarray, lengths_BxK: np.ndarray) -> np.ndarray | None:
        """Of the real tokens among the K·B·T, where prompts are read in one line."""
        T = tokens_BxKxT.shape[-1]
        return real_indices((np.arange(T) < lengths_BxK.T[..., None]).reshape(-1, T)) if sharding.in_line(self.mesh) else None

    def width(self, longest: int) -> int:
        """Tokens to which the prompts are padded of questions whose longest prompt has so many."""
        width = bucket(longest, smallest=32)
        return width if self.lm.config.attention == flash.REFERENCE else flash.whole_blocks(width)

    def distinct(self, ids_KxS: np.ndarray) -> tuple[dict[str, list[int]], list[str], list[list[int]]]:
        """{text: ids} of the distinct answers in passage order, and the answer of each passage, its text and its ids."""
        own = [self.said(ids_S) for ids_S in ids_KxS]
        texts: dict[str, list[int]] = {}
        for text, ids in own:
            texts.setdefault(text, ids)
        return texts, [text for text, _ in own], [ids for _, ids in own]

    def said(self, ids_S: Sequence[int] | np.ndarray) -> tuple[str, list[int]]:
        """The answer that was decoded, up to the end of its line, and its ids; −1 among them is nothing."""
        ids = [int(i) for i in ids_S if i >= 0]
        return self.maker.tokenizer.decode(ids).split("\n")[0].strip(), ids

    def _first(self, answers: Sequence[Sequence[Sequence[int]]], last_BxKxV: jax.Array) -> np.ndarray:
        """log p of the first token of each question's answers, or of an end at once, under each of its prompts (B, K, K), on the host."""
        B, K, _ = last_BxKxV.shape
        tokens_BxK = np.full((B, K), -1, np.int32)  # no prompt says two answers
        for b, of_question in enumerate(answers):
            tokens_BxK[b, : len(of_question)] = [ids[0] if len(ids) else -1 for ids in of_question]
        return distributed.to_host(decode.token_logprobs(last_BxKxV, sharding.put_rows(self.mesh, tokens_BxK), self.stops_I))

    def _candidates(self, listed: Sequence[Sequence[_Candidate]], last_BxKxV, lengths_BxK, cache) -> np.ndarray:
        """logp_BxKxC of the listed candidates of each question, on the host; a candidate that is not there has −inf."""
        B, K = lengths_BxK.shape
        in_line = sharding.in_line(self.mesh)
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        steps = {"smallest": 8} if on_cpu else {"smallest": 64, "parts": 1}  # fewer compiles there
        texts = [[ids for ids, _ in candidates] for candidates in listed]
        grown = [trees.grow(of_question, worth=1, most=NARROW if in_line else None) for of_question in texts]
        rows = [(b, row) for b, of_question in enumerate(grown) for row in (trees.pack(of_question, NARROW) if in_line else [of_question])]
        left = sorted((row for row in rows if row[1]), key=lambda row: -trees.total(row[1]))
        logp_BxKxC = np.full((B, K, max(map(len, listed))), -np.inf, np.float32)
        while left:
            width, taken, count = bucket(trees.total(left[0][1]), **steps), B, B
            if in_line:
                taken, count, _ = line_of_call([K * trees.total(row) for _, row in left], B)
            asked, left = left[:taken], left[taken:]
            of_R, row_of = None, dict(asked)
            if count == B and len(row_of) == len(asked):
                asked = [(b, row_of.get(b, ())) for b in range(len(listed))]  # rows are questions: no cache is moved
            else:
                at = [b for b, _ in asked]
                of_R = np.asarray(at + at[-1:] * (count - len(at)), np.int32)
            forests = [trees.plant(texts[b], [row], width) for b, row in asked]
            for (b, row), forest in zip(asked, forests):
                _leave_out_last(forest, [(forest.paths[c], listed[b][c][1]) for tree in row for c in tree.members])
            found = self._nodes(forests + [trees.plant((), [()], width)] * (count - len(asked)), of_R, last_BxKxV, lengths_BxK, cache)
            for (b, row), forest, logp_KxN, end_KxN, end_K in zip(asked, forests, *found):
                for c in itertools.chain.from_iterable(tree.members for tree in row):
                    path, ends = forest.paths[c], listed[b][c][1]
                    logp_BxKxC[b, :, c] = logp_KxN[:, path].sum(-1)
                    if ends:
                        logp_BxKxC[b, :, c] += end_KxN[:, path[-1]] if len(path) else end_K
        return logp_BxKxC

    def _nodes(self, forests: Sequence[trees.Forest], of_R: np.ndarray | None, last_BxKxV, lengths_BxK, cache) -> Iterator[np.ndarray]:
        """What `decode.score_nodes` finds of rows of trees, each of the question that `of_R` says (None: a row for each), on the host."""
        rows = zip(*((forest.tokens_RxT, forest.positions_RxT, forest.ends_RxT, forest.parents_RxT()) for forest in forests))
        tokens_RxN, depths_RxN, ends_RxN, parents_RxN = map(np.concatenate, rows)
        indices_M = None
        if sharding.in_line(self.mesh):
            indices_M = real_indices(ends_RxN > 0, bucket(np.count_nonzero(ends_RxN), smallest=32))  # K times as many are read
        self.shapes.add((*lengths_BxK.shape, cache.capacity, *tokens_RxN.shape, *np.shape(of_R), *np.shape(indices_M)))
        nodes = (sharding.put_rows(self.mesh, array) for array in (tokens_RxN, depths_RxN, ends_RxN, parents_RxN))
        found = decode.score_nodes(self.graphdef, self.params, last_BxKxV, lengths_BxK, cache, *nodes, self.stops_I, of_R, indices_M)
        return map(distributed.to_host, found)

    def _batches(self, questions: Sequence[Prompted]) -> Iterator[_Batch]:
        """Longest first: which questions, and their (tokens_BxKxT, lengths_BxK, logw_BxK)."""
        longest = [max(len(ids) for ids in question.prompts) for question in questions]
        order = sorted(range(len(questions)), key=lambda i: -longest[i])
        start = 0
        while start < len(order):
            width = self.width(longest[order[start]])
            waiting = [questions[row].prompts for row in order[start : start + self.batch_tokens]]  # no fewer than can be taken
            taken, size = self._size(waiting, width)
            rows = order[start : start + taken]
            chosen = [questions[row] for row in rows]
            # The last batch keeps the shape of the others: questions that are none have prompts of a token.
            none = dataclasses.replace(chosen[-1], prompts=tuple(ids[:1] for ids in chosen[-1].prompts))
            filled = chosen + [none] * (size - len(chosen))
            tokens_BxKxT, lengths_BxK = map(np.stack, zip(*(pad_rows(question.prompts, width) for question in filled)))
            self.read += sum(len(ids) for question in chosen for ids in question.prompts)
            self.computed += computed(tokens_BxKxT, self._line(tokens_BxKxT, lengths_BxK))
            yield rows, (tokens_BxKxT, lengths_BxK, np.stack([question.logw_K for question in filled]))
            start += taken

    def _size(self, prompts_NxK: Sequence[Sequence[Sequence[int]]], width: int) -> tuple[int, int]:
        """How many of the questions that wait, longest first, are read at once, and in how many rows of prompts so wide."""
        K = len(prompts_NxK[0])
        if not sharding.in_line(self.mesh):
            size = sharding.whole_rows(self.mesh, self.batch_tokens // (K * width))
            return size, size
        line = whole_line(max(self.batch_tokens, K * width))
        rows = line_rows(int(ALIKE * K * width), line)
        totals = [sum(map(len, prompts)) for prompts in prompts_NxK[:rows]]
        return line_of_call(totals, rows, line - K * rows)[:2]  # questions that are none have K tokens


@dataclasses.dataclass(eq=False)
class _Group:
    """A batch of questions whose prompts were read: what of it waits to be decoded, and what came out. Its rows are numbered b · K + k."""

    numbers: list[int]  # of the questions
    logw_BxK: np.ndarray
    lengths_BxK: jax.Array
    last_BxKxV: jax.Array
    cache: KVCache
    begun: Rows  # as they wait to be decoded

    def __post_init__(self):
        B, K = self.logw_BxK.shape
        self.waiting = collections.deque(range(len(self.numbers) * K))
        self.left = len(self.waiting)
        self.ids_BxKxS = np.full(self.begun.ids_BxRxS.shape, -1, np.int32)
        self.own_BxK = np.zeros((B, K), np.float32)

    def hear(self, at: int, ids_S: np.ndarray, logp: float) -> bool:
        """What a row of it has said, and how probable that was; returns whether it was the last."""
        b, k = divmod(at, self.own_BxK.shape[1])
        self.ids_BxKxS[b, k], self.own_BxK[b, k] = ids_S, logp
        self.left -= 1
        return not self.left


def _leave_out_last(forest: trees.Forest, paths: Sequence[tuple[np.ndarray, bool]]) -> None:
    """Makes padding of the tokens after which nothing is asked, no token and not the end (True): those before say how likely they are."""
    asked_T = np.zeros(forest.ends_RxT.shape[1], bool)
    for path, ends in paths:
        asked_T[path if ends else path[:-1]] = True
    forest.ends_RxT[0, ~asked_T] = 0


def stop_tokens(tokenizer, vocab_size: int) -> np.ndarray:
    """stops_V: True for eos and every token whose text begins with a new line."""
    stops_V = np.zeros(vocab_size, bool)
    stops_V[tokenizer.eos_id] = True
    for i in range(min(tokenizer.vocab_size, vocab_size)):
        stops_V[i] |= tokenizer.decode([i]).startswith("\n")
    return stops_V
