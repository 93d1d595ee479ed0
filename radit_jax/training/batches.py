"""What the two trainings read, as Grain data sets whose iterator state goes into the checkpoint: examples with passages in, batches out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from radit_jax.data import mixture, packing
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.padding import bucket, real_indices
from radit_jax.errors import InputError
from radit_jax.types import Example, Instance, LmBatch, LsrBatch, Passage, Retrieved

OWN_TEXT, NO_TEXT = -1, -2  # in place of a passage number: the example's own background; none
LEAST_WIDTH = 32  # tokens to which queries are padded at least, or to the longest of all


class PassageInstances:
    """LM-ft instances as a random-access source: each of an example's first k~ passages its own instance (Eq. 3).

    An example with a text of its own gets one instance with that text as background, before those of its passages (SPEC section 3).
    With no passages at all an example is asked alone: instruction tuning without retrieval, the paper's "IT".
    """

    def __init__(
        self, retrieved: Sequence[Retrieved], examples: Sequence[Example], maker: InstanceMaker, *, passages: int, output_slots: int
    ):
        self.retrieved, self.maker, self.output_slots = retrieved, maker, output_slots
        own = [(i, OWN_TEXT) for i, example in enumerate(examples) if example.background is not None]
        found = [(i, j) for i, example in enumerate(examples) if example.retrieve for j in (range(passages) if passages else (NO_TEXT,))]
        self.pairs = np.asarray(sorted(own + found), np.int32).reshape(-1, 2)
        self.ids = [example.id for example in examples]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        i, j = (int(x) for x in self.pairs[int(n)])
        member = self.retrieved[i]
        example = member.example
        background = None if j == NO_TEXT else example.background if j == OWN_TEXT else member.passages[j].content
        instance = self.maker.instance(example.id, example.prompt, background, example.target, close=True)
        return packing.features(instance, int(n), self.maker.max_tokens, self.output_slots)

    def describe(self, numbers: np.ndarray) -> str:
        """The example ids of a batch, for messages."""
        return ", ".join(sorted({self.ids[self.pairs[int(n), 0]] for n in numbers})[:8])


class TextInstances:
    """Plain text to go on with (unsupervised, SPEC section 3): the first tokens of each text are one output, as many as a row can hold."""

    def __init__(self, texts: Sequence[Passage], maker: InstanceMaker, *, output_slots: int):
        self.texts, self.maker, self.output_slots = texts, maker, output_slots
        self.room = min(output_slots, maker.max_tokens - 1) - 1  # for bos before them and eos after them

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        passage, tokenizer = self.texts[int(n)], self.maker.tokenizer
        ids = tokenizer.encode(passage.content)
        cut = len(ids) > self.room
        before = self.maker.prompt_ids("", None)
        tokens = [*before, *ids[: self.room], *([] if cut else [tokenizer.eos_id])]
        instance = Instance(passage.id, np.asarray(tokens, np.int32), len(before))
        return packing.features(instance, int(n), self.maker.max_tokens, self.output_slots)

    def describe(self, numbers: np.ndarray) -> str:
        return ", ".join(sorted({self.texts[int(n)].id for n in numbers})[:8])


class MixedInstances:
    """Several sources side by side, numbered through: `parts` with their `shares` are what a mixture draws from."""

    def __init__(self, sources: Mapping[str, PassageInstances | TextInstances], shares: Mapping[str, float]):
        self.sources, self.shares = {name: source for name, source in sources.items() if shares[name] > 0}, dict(shares)
        for name, source in self.sources.items():
            if not len(source):
                raise InputError(f"LM-ft has no training examples in {name}")
        self.firsts = np.cumsum([0, *(len(source) for source in self.sources.values())])
        self.parts = [_Numbered(source, int(first)) for source, first in zip(self.sources.values(), self.firsts)]
        one = next(iter(self.sources.values()))
        self.maker, self.output_slots = one.maker, one.output_slots

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        at = int(np.searchsorted(self.firsts, n, side="right")) - 1
        return self.parts[at][n - int(self.firsts[at])]

    def describe(self, numbers: np.ndarray) -> str:
        """Some examples of a batch, for messages."""
        at = np.searchsorted(self.firsts, numbers, side="right") - 1
        parts = zip(self.sources.values(), (numbers[at == i] - self.firsts[i] for i in range(len(self.sources))))
        return ", ".join(source.describe(own) for source, own in parts if len(own))


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """A source whose instances are numbered from `first`."""

    source: PassageInstances | TextInstances
    first: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        features = self.source[int(n)]
        return {**features, "index": features["index"] + np.int32(self.first)}


class Batches:
    """A Grain iterator whose batches are mapped on the way out; its state is the Grain iterator's (JSON)."""

    def __init__(self, dataset: grain.IterDataset, finish: Callable[[Any], Any]):
        self._iterator, self._finish = iter(dataset), finish

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._finish(next(self._iterator))

    def get_state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._iterator.set_state(state)


def lm_batches(
    source: PassageInstances | MixedInstances,
    *,
    rows: int,
    accumulate: int,
    seed: int,
    here: np.ndarray | None = None,
    line: bool = False,
) -> Batches:
    """Endless packed batches for lm_step, leaves (accumulate, rows, …), with the instance numbers in each.

    Every process packs the same rows, since what fits a row hangs on all before it, and keeps those of its own devices (`here`, of `rows`;
    None: all). So the iterator's state says nothing of how many processes there were. `line`: as in `lsr_batches`; the program is also told
    how long instances are where that spares it work (packing.reach).
    """
    mixed = source if isinstance(source, MixedInstances) else MixedInstances({"train": source}, {"train": 1.0})
    parts = [grain.MapDataset.source(part) for part in mixed.parts]
    instances = mixture.mix(parts, [mixed.shares[name] for name in mixed.sources], seed=seed)
    packed = packing.pack(
        instances, row_length=source.maker.max_tokens, output_slots=source.output_slots, rows=rows * accumulate, seed=seed
    )

    def finish(item: tuple[LmBatch, np.ndarray]) -> tuple[LmBatch, np.ndarray]:
        batch, numbers = item
        batch = jax.tree.map(lambda leaf: leaf.reshape(accumulate, rows, *leaf.shape[1:]), batch)
        batch = batch if here is None else jax.tree.map(lambda leaf: leaf[:, here], batch)
        if line:
            batch = dataclasses.replace(batch, indices_N=real_indices(batch.segment_ids_BxT > 0, parts=8), reach=packing.reach(batch))
        return batch, numbers

    return Batches(packed, finish)


@dataclasses.dataclass(frozen=True)
class LsrSource:
    """R-ft examples as a random-access source: retrieved passages and LM scores are joined by example and passage id, never by position."""

    retrieved: Sequence[Retrieved]
    scores: Mapping[str, tuple[Sequence[str], np.ndarray, int]]  # inference.score.read_scores
    vectors: Any  # retrieval.vectors.Vectors: rows → (N, E)
    query_tokens: np.ndarray  # (N, T) int32
    query_mask: np.ndarray  # (N, T) bool
    score_scale: float
    read_passages: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]] | None = None  # texts → tokens_KxT, mask_KxT of one width

    def __len__(self) -> int:
        return len(self.retrieved)

    def __getitem__(self, n: int) -> dict[str, np.ndarray]:
        member = self.retrieved[int(n)]
        logp_K, length = align(member, self.scores)
        read = {}
        if self.read_passages is not None:
            read = dict(zip(("passage_tokens", "passage_mask"), self.read_passages([passage.content for passage in member.passages])))
        return read | {
            "query_tokens": self.query_tokens[int(n)],
            "query_mask": self.query_mask[int(n)],
            "passages": np.asarray(self.vectors[member.rows_K], np.float32),
            "lm_logp": logp_K,
            "target_length": np.int32(length),
            "base_logits": (member.scores_K * self.score_scale).astype(np.float32),
        }

    def padded(self, width: int) -> LsrSource:
        """The same, with queries of `width` tokens: sources that share a batch need one width."""
        room = [(0, 0), (0, width - self.query_tokens.shape[1])]
        return dataclasses.replace(self, query_tokens=np.pad(self.query_tokens, room), query_mask=np.pad(self.query_mask, room))

    def describe(self, numbers: np.ndarray) -> str:
        return ", ".join(self.retrieved[int(n)].example.id for n in numbers[:8])


def align(member: Retrieved, scores: Mapping[str, tuple[Sequence[str], np.ndarray, int]]) -> tuple[np.ndarray, int]:
    """LM scores of an example in the order of its retrieved passages (SPEC trap 6). InputError where a score is missing."""
    try:
        passage_ids, logp_K, length = scores[member.example.id]
        by_id = dict(zip(passage_ids, logp_K))
        return np.asarray([by_id[passage.id] for passage in member.passages], np.float32), length
    except KeyError as error:
        raise InputError(f"no LM score for {error} of example {member.example.id}: the scores were made from another retrieval") from None


def lsr_batches(
    sources: Mapping[str, LsrSource],
    *,
    shares: Mapping[str, float],
    batch: int,
    seed: int,
    parts: int = 1,
    here: np.ndarray | None = None,
    line: bool = False,
) -> Batches:
    """Endless batches for lsr_step from a mixture of sources, leaves (parts, batch / parts, …), with the example numbers in each.

    Numbers are drawn for the whole batch; the examples of `here` (rows of a part; None: all) are read, which are those of this process.
    `line`: the queries of a part are read in one line (sharding.in_line).
    """
    names = [name for name in sources if shares[name] > 0]
    width = max(sources[name].query_tokens.shape[1] for name in names)
    padded = [sources[name].padded(width) for name in names]
    sets = [grain.MapDataset.source(_Keys(i, len(source))) for i, source in enumerate(padded)]

    def read(keys_Bx2: np.ndarray) -> tuple[LsrBatch, np.ndarray]:
        own_AxBx2 = keys_Bx2.reshape(parts, -1, 2)[:, slice(None) if here is None else here]
        items = [padded[i][n] for i, n in own_AxBx2.reshape(-1, 2)]
        stacked = {key: np.stack([item[key] for item in items]) for key in items[0]}
        # As wide as the longest query of the whole batch, whichever process holds it. Few widths, for each is a program.
        longest = bucket(max(int(padded[i].query_mask[n].sum()) for i, n in keys_Bx2), smallest=LEAST_WIDTH)
        stacked |= {key: stacked[key][:, :longest] for key in ("query_tokens", "query_mask")}
        alone = len(items) == batch  # of several processes none knows the longest passage of the others
        if alone and "passage_mask" in stacked:
            longest = bucket(int(stacked["passage_mask"].sum(-1).max()), smallest=16)
            stacked |= {key: stacked[key][..., :longest] for key in ("passage_tokens", "passage_mask")}
        return lsr_batch(stacked, parts, line), keys_Bx2[:, 1]

    drawn = mixture.mix(sets, [shares[name] for name in names], seed=seed).batch(batch, drop_remainder=True).map(read)
    return Batches(drawn.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)), lambda item: item)


@dataclasses.dataclass(frozen=True)
class _Keys:
    """(source, example) pairs of one source: what a batch is drawn from before anything is read."""

    source: int
    length: int

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> np.ndarray:
        return np.asarray([self.source, int(n)], np.int32)


def lsr_batch(item: Mapping[str, np.ndarray], parts: int, line: bool) -> LsrBatch:
    """Stacked elements of an LsrSource → LsrBatch of so many equal parts; every candidate and every row is real."""
    item = {key: rows.reshape(parts, -1, *rows.shape[1:]) for key, rows in item.items()}
    mask_BxKxT = item.get("passage_mask")
    return LsrBatch(
        query_tokens_BxT=item["query_tokens"],
        query_mask_BxT=item["query_mask"],
        passages_BxKxE=item["passages"],
        candidates_BxK=np.ones(item["lm_logp"].shape, bool),
        lm_logp_BxK=item["lm_logp"],
        target_lengths_B=item["target_length"],
        base_logits_BxK=item["base_logits"],
        weights_B=np.ones(item["target_length"].shape, np.float32),
        query_indices_N=_line(item["query_mask"]) if line else None,
        passage_tokens_BxKxT=item.get("passage_tokens"),
        passage_mask_BxKxT=mask_BxKxT,
        passage_indices_N=_line(mask_BxKxT) if line and mask_BxKxT is not None else None,
    )


def _line(mask: np.ndarray) -> np.ndarray | None:
    """Of the real tokens of each part's rows, mask (A, …, T)."""
    return real_indices(mask.reshape(len(mask), -1, mask.shape[-1]), parts=8)
