"""p_LM(y | c∘x): the log-probability of target tokens after a prompt, several instances to a row (paper Eqs. 2 and 4)."""

from __future__ import annotations

import collections
import functools
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from radit_jax import artifacts, distributed, progress, sharding, streams
from radit_jax.data import trees
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.padding import ALIKE, bucket, computed, line_of_call, line_rows, pad_rows, real_indices, rows_of_call
from radit_jax.data.trees import Forest, Tree
from radit_jax.errors import InputError
from radit_jax.models import flash
from radit_jax.models.attention import Segments, Trees
from radit_jax.retrieval.retrieve import Retrieval
from radit_jax.types import Instance, PyTree

SHARD = 200  # examples scored between two writes: what a kill can lose
PACKED = 512  # tokens of a row, where rows are filled
LARGEST_TREE = 192  # tokens of instances that share a row, where one alone is no longer: attention costs as the square
_Call = tuple[list[int], Forest, np.ndarray, np.ndarray | None]  # members; where they stand; place_RxT, indices_N


@functools.partial(jax.jit, static_argnums=0)
def target_logprobs(
    graphdef: nnx.GraphDef,
    params: PyTree,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    rows: Segments | Trees,
    slots_MxP: jax.Array,
    labels_MxP: jax.Array,
) -> jax.Array:
    """log p(label) at every slot, (M, P) float32 nats, of the M equal parts that the rows are spread in.

    A slot is the token *before* its label, an index into the tokens of all rows of its part; −1 marks an unused one, which gets 0.
    """
    lm = nnx.merge(graphdef, params)
    hidden_BxTxD = lm.read(tokens_BxT, positions_BxT, rows)
    hidden_MxTxD = hidden_BxTxD.reshape(len(slots_MxP), -1, hidden_BxTxD.shape[-1])
    hidden_MxPxD = jnp.take_along_axis(hidden_MxTxD, jnp.maximum(slots_MxP, 0)[..., None], axis=1)
    vocabulary = lm.vocabulary()
    logp_MxP = vocabulary.token_logits(hidden_MxPxD, labels_MxP) - vocabulary.normalizers(hidden_MxPxD)
    return jnp.where(slots_MxP >= 0, logp_MxP, 0.0)


class Scorer:
    """Scores instances with one LM: those that begin alike share a row and what they share is read once; `batch_tokens` tokens a call.

    On a mesh (the one that the LM's parameters lie on) the rows are spread over its data axis. Of several processes all call with the same
    instances, and all get the scores.
    """

    def __init__(self, lm: nnx.Module, *, batch_tokens: int = 2048, mesh: Mesh | None = None):
        self.graphdef, self.params = nnx.split(lm)
        self.batch_tokens = batch_tokens
        self.mesh = sharding.mesh_or_one(mesh)
        # A flash kernel knows segments alone: there no two instances share a token.
        self.share = lm.config.attention == flash.REFERENCE
        self.platform = self.mesh.devices.flat[0].platform
        self.shapes: set[tuple[int, ...]] = set()  # one compile each
        self.tokens = self.read = self.computed = 0  # of the instances; without what they share; with padding

    def __call__(self, instances: Sequence[Instance], advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """logp_N in the order given: natural-log probability of each instance's target tokens."""
        logp_N = np.zeros(len(instances), np.float64)
        # The last token is a label and nothing more.
        sequences = [instance.tokens_T[:-1] for instance in instances]
        calls = streams.Shared(self._calls(sequences))
        for members, owners, logp in streams.merged([self._scored(instances, calls) for _ in range(streams.count(self.mesh))]):
            np.add.at(logp_N, owners, logp)
            advance(len(members))
        return logp_N.astype(np.float32)

    def _calls(self, sequences: Sequence[np.ndarray]) -> Iterator[_Call]:
        """What each call reads, counted as it is made: by one thread at a time, which running the calls is not."""
        for rows, size, length, line in self._batches(sequences):
            forest = trees.plant(sequences, rows + [[]] * (size - len(rows)), length)
            place_RxT = forest.ends_RxT if self.share else forest.segment_ids_RxT
            indices_N = real_indices(place_RxT > 0, line) if line else None
            members = [n for row in rows for tree in row for n in tree.members]
            self.tokens += sum(len(forest.paths[n]) for n in members)
            self.read += forest.nodes
            self.computed += computed(forest.tokens_RxT, indices_N)
            yield members, forest, place_RxT, indices_N

    def _batches(self, sequences: Sequence[np.ndarray]) -> Iterator[tuple[list[list[Tree]], int, int, int]]:
        """(the trees of each row, rows of the call, tokens of a row, places of the line or 0), longest rows first, for memory's sake.

        A flash kernel skips what is between trees: its rows are filled. The reference does not: there a tree has a row for itself.
        """
        longest = max(map(len, sequences), default=0)
        packed = max(flash.whole_blocks(longest), PACKED)
        if self.share:
            grown = trees.grow(sequences, most=max(longest, LARGEST_TREE))
            rows = [[tree] for tree in sorted(grown, key=lambda tree: -tree.size)]
        else:
            rows = trees.pack(trees.grow(sequences, share=False), packed)
        sizes = [trees.total(row) for row in rows]
        while rows:
            length = bucket(rows[0][0].size, parts=8) if self.share else packed
            if sharding.in_line(self.mesh):
                taken, size, line = line_of_call(sizes, line_rows(int(ALIKE * length), self.batch_tokens), self.batch_tokens)
            else:
                taken = size = sharding.whole_rows(self.mesh, rows_of_call(sizes, length, self.batch_tokens // length, self.platform))
                line = 0
            yield rows[:taken], size, length, line
            rows, sizes = rows[taken:], sizes[taken:]

    def _scored(self, instances: Sequence[Instance], calls: Iterable[_Call]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """The members of each call, whose every target token is, and its log-probability."""
        for members, *call in calls:
            yield members, *self._score(instances, members, *call)

    def _score(
        self, instances: Sequence[Instance], members: Sequence[int], forest: Forest, place_RxT: np.ndarray, indices_N: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        size, length = forest.tokens_RxT.shape
        parts = self.mesh.shape[sharding.DATA]  # each device's rows
        slots: list[list[int]] = [[] for _ in range(parts)]
        labels: list[list[int]] = [[] for _ in range(parts)]
        owners: list[list[int]] = [[] for _ in range(parts)]
        for n in members:
            instance = instances[n]
            part, row = divmod(int(forest.row_N[n]), size // parts)
            slots[part].extend(row * length + forest.paths[n][instance.target_start - 1 :])
            labels[part].extend(instance.tokens_T[instance.target_start :])
            owners[part].extend([n] * (len(instance.tokens_T) - instance.target_start))
        width = bucket(max(map(len, slots)), smallest=8)
        slots_MxP, labels_MxP = pad_rows(slots, width, fill=-1)[0], pad_rows(labels, width)[0]
        logp_MxP = self._run(forest.tokens_RxT, forest.positions_RxT, place_RxT, slots_MxP, labels_MxP, indices_N)
        logp = np.concatenate([logp_P[: len(of_part)] for of_part, logp_P in zip(owners, logp_MxP)])
        return np.fromiter(itertools.chain(*owners), np.int64, len(logp)), logp

    def _run(self, tokens_BxT, positions_BxT, place_BxT, slots_MxP, labels_MxP, indices_N) -> np.ndarray:
        self.shapes.add(tokens_BxT.shape + slots_MxP.shape + np.shape(indices_N))
        arrays = (tokens_BxT, positions_BxT, place_BxT, slots_MxP, labels_MxP)
        tokens, positions, place, slots, labels = (sharding.put_rows(self.mesh, array) for array in arrays)
        with jax.set_mesh(self.mesh):
            rows = (Trees if self.share else Segments)(place, indices_N)
            return distributed.to_host(target_logprobs(self.graphdef, self.params, tokens, positions, rows, slots, labels))

    def facts(self) -> dict[str, Any]:
        """What was read and what was not: `shared` is the share of tokens that another instance had already, `padding` that of nothing."""
        return {
            "tokens": self.tokens,
            "shared": round(1 - self.read / max(self.tokens, 1), 4),
            "padding": round(1 - self.read / max(self.computed, 1), 4),
            "compiles": len(self.shapes),
        }


def together(rows_NxK: np.ndarray, size: int) -> list[list[int]]:
    """The numbers of all N questions in groups of `size`, those that have passages in common in the same one as far as they can be.

    A group begins with the first question that is left, and takes the one of most passages that it has already, until it is full.
    """
    owners = collections.defaultdict(list)
    for n, row_K in enumerate(rows_NxK.tolist()):
        for row in row_K:
            owners[row].append(n)
    groups: list[list[int]] = []
    placed, first = np.zeros(len(rows_NxK), bool), 0
    for start in range(0, len(rows_NxK), size):
        group, held, common_N = [], set(), collections.Counter()
        likeliest: list[tuple[int, int]] = []  # (−passages in common, question); what it had before is there too, behind
        while len(group) < min(size, len(rows_NxK) - start):
            while likeliest and placed[likeliest[0][1]]:
                heapq.heappop(likeliest)
            while placed[first]:
                first += 1
            n = heapq.heappop(likeliest)[1] if likeliest else first
            placed[n] = True
            group.append(n)
            new = set(rows_NxK[n].tolist()) - held
            held |= new
            for other in (other for row in sorted(new) for other in owners[row] if not placed[other]):
                common_N[other] += 1
                heapq.heappush(likeliest, (-common_N[other], other))
        groups.append(group)
    return groups


def score_retrieval(scorer: Scorer, maker: InstanceMaker, retrieval: Retrieval, folder: Path) -> dict:
    """Writes log p_LM(y | c∘x) of every example and each of its passages, once (paper section 2.4), resumable by shard.

    `folder/logp-NNNNN.npy` (examples × K) stands beside the ids it belongs to: `example_ids-NNNNN.npy`, `passage_ids-NNNNN.npy`.
    The examples of a shard are such that have passages in common: one that several were given is read once.
    Of several processes all score and the leader writes. Returns the facts of the stage.
    """
    total, groups = len(retrieval), together(retrieval.rows_NxK, SHARD)
    shards = [folder / f"logp-{n:05d}.npy" for n in range(len(groups))]
    # What the leader sees holds for all: otherwise one process would wait for another in a shard that the other skips.
    there = distributed.gather(np.asarray([_is_of(shard, retrieval, group) for shard, group in zip(shards, groups)]))[0]
    already = sum(len(group) for group, done in zip(groups, there) if done)
    with progress.bar("score", total, unit="questions", start=already) as advance:
        for group, shard, done in zip(groups, shards, there):
            if not done:
                _score_shard(scorer, maker, [retrieval[i] for i in group], shard)
                advance(len(group))
    distributed.meet(f"{folder.name} is scored")  # what the leader wrote may be read by all
    return {
        "questions": total,
        "questions_per_s": round(advance.rate, 2),
        **scorer.facts(),
        "tokens_per_s": round(scorer.tokens / max(advance.elapsed, 1e-9)),
        "truncated": maker.truncations.count,
    }


def _is_of(shard: Path, retrieval: Retrieval, group: Sequence[int]) -> bool:
    """Whether the shard is there, and of these examples."""
    if not shard.exists():
        return False
    ids = np.load(_beside(shard, "example_ids"), allow_pickle=False)
    return ids.tolist() == [retrieval.examples[i].id for i in group]


def _beside(shard: Path, name: str) -> Path:
    return shard.with_name(shard.name.replace("logp", name))


def _score_shard(scorer: Scorer, maker: InstanceMaker, members: Sequence, shard: Path) -> None:
    instances = [
        maker.instance(member.example.id, member.example.prompt, passage.content, member.example.target, close=False)
        for member in members
        for passage in member.passages
    ]
    lengths_NxK = np.asarray([len(i.tokens_T) - i.target_start for i in instances], np.int32).reshape(len(members), -1)
    names = {
        "example_ids": np.asarray([member.example.id for member in members]),
        "passage_ids": np.asarray([[passage.id for passage in member.passages] for member in members]),
        "target_lengths": lengths_NxK[:, 0],
    }
    logp_NxK = scorer(instances).reshape(len(members), -1)
    if distributed.leads():
        shard.unlink(missing_ok=True)  # of other examples: it must not outlive their ids
        for name, array in names.items():
            artifacts.save_array(_beside(shard, name), array)
        artifacts.save_array(shard, logp_NxK)  # last: its presence says that the shard is whole


def read_scores(folder: Path) -> dict[str, tuple[list[str], np.ndarray, int]]:
    """What `score_retrieval` wrote: example id → (passage ids, logp_K, tokens of the target)."""
    found = {}
    shards = sorted(Path(folder).glob("logp-*.npy"))
    if not shards:
        raise InputError(f"{folder}: no LM scores here")
    for shard in shards:
        part = {name: np.load(_beside(shard, name)) for name in ("example_ids", "passage_ids", "target_lengths", "logp")}
        for row, example_id in enumerate(part["example_ids"]):
            found[str(example_id)] = (part["passage_ids"][row].tolist(), part["logp"][row], int(part["target_lengths"][row]))
    return found
