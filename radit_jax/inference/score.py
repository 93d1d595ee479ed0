"""p_LM(y | c∘x): the log-probability of target tokens after a prompt, batched by length (paper Eqs. 2 and 4)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from radit_jax import artifacts, distributed, progress, sharding
from radit_jax.data.instances import InstanceMaker, bucket, pad_rows
from radit_jax.errors import InputError
from radit_jax.training.losses import token_logprobs
from radit_jax.types import Instance, PyTree

SHARD = 200  # examples scored between two writes: what a kill can lose


@functools.partial(jax.jit, static_argnums=0)
def target_logprobs(
    graphdef: nnx.GraphDef, params: PyTree, tokens_BxT: jax.Array, lengths_B: jax.Array, slots_BxP: jax.Array, labels_BxP: jax.Array
) -> jax.Array:
    """Σ_t log p(y_t | y_<t, c∘x) per row, float32 nats. slots point at the token *before* each label; −1 marks an unused slot."""
    lm = nnx.merge(graphdef, params)
    # Into a cache that nobody reads, and that the compiler therefore leaves out: `prefill` is the forward pass without gradients.
    hidden_BxTxD, _ = lm.prefill(tokens_BxT, lengths_B, tokens_BxT.shape[1])
    hidden_BxPxD = jnp.take_along_axis(hidden_BxTxD, jnp.maximum(slots_BxP, 0)[..., None], axis=1)
    logp_BxP = token_logprobs(lm.logits(hidden_BxPxD), labels_BxP)
    return jnp.sum(jnp.where(slots_BxP >= 0, logp_BxP, 0.0), axis=-1)


class Scorer:
    """Scores instances with one LM: sorted by length, padded to a few bucket lengths, about `batch_tokens` tokens a call.

    On a mesh (the one that the LM's parameters lie on) the rows of a call are spread over its data axis. Of several processes all call
    with the same instances, and all get the scores.
    """

    def __init__(self, lm: nnx.Module, *, batch_tokens: int = 2048, mesh: Mesh | None = None):
        self.graphdef, self.params = nnx.split(lm)
        self.batch_tokens = batch_tokens
        self.mesh = sharding.make_mesh(1, 1) if mesh is None else mesh
        self.shapes: set[tuple[int, ...]] = set()  # one compile each
        self.padded = self.real = 0

    def __call__(self, instances: Sequence[Instance], advance: Callable[[int], None] = lambda n: None) -> np.ndarray:
        """logp_N in the order given: natural-log probability of each instance's target tokens."""
        logp_N = np.zeros(len(instances), np.float32)
        for rows, arrays in self._batches(instances):
            self.shapes.add(arrays[0].shape + arrays[2].shape)
            with jax.set_mesh(self.mesh):
                out_B = target_logprobs(self.graphdef, self.params, *(sharding.put_rows(self.mesh, array) for array in arrays))
            logp_N[rows] = distributed.to_host(out_B)[: len(rows)]
            advance(len(rows))
        return logp_N

    def _batches(self, instances: Sequence[Instance]) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
        lengths_N = np.asarray([len(instance.tokens_T) for instance in instances])
        outputs_N = np.asarray([len(instance.tokens_T) - instance.target_start for instance in instances])
        order = np.lexsort((outputs_N, lengths_N))[::-1]  # longest first: the biggest buffers are taken at once
        start = 0
        while start < len(order):
            length = bucket(int(lengths_N[order[start]]))
            size = sharding.whole_rows(self.mesh, self.batch_tokens // length)
            rows = order[start : start + size]
            slots = bucket(int(outputs_N[rows].max()), smallest=8)
            yield rows, self._arrays([instances[row] for row in rows], size, length, slots)
            self.real += int(lengths_N[rows].sum())
            self.padded += size * length
            start += size

    def _arrays(self, chosen: Sequence[Instance], size: int, length: int, slots: int) -> tuple[np.ndarray, ...]:
        filler = [np.zeros(0, np.int32)] * (size - len(chosen))  # the last batch keeps the shape of the others
        tokens_BxT, lengths_B = pad_rows([instance.tokens_T for instance in chosen] + filler, length)
        labels_BxP, _ = pad_rows([instance.tokens_T[instance.target_start :] for instance in chosen] + filler, slots)
        before = [np.arange(instance.target_start - 1, len(instance.tokens_T) - 1) for instance in chosen]
        slots_BxP, _ = pad_rows(before + filler, slots, fill=-1)
        return tokens_BxT, lengths_B, slots_BxP, labels_BxP


def score_retrieval(scorer: Scorer, maker: InstanceMaker, retrieval: Sequence, folder: Path) -> dict:
    """Writes log p_LM(y | c∘x) of every example and each of its passages, once (paper section 2.4), resumable by shard.

    `folder/logp-NNNNN.npy` (examples × K) stands beside the ids it belongs to: `example_ids-NNNNN.npy`, `passage_ids-NNNNN.npy`.
    Of several processes all score and the leader writes. Returns the facts of the stage.
    """
    total = len(retrieval)
    starts = range(0, total, SHARD)
    shards = [folder / f"logp-{start // SHARD:05d}.npy" for start in starts]
    # What the leader sees holds for all: otherwise one process would wait for another in a shard that the other skips.
    there = distributed.gather(np.asarray([shard.exists() for shard in shards]))[0]
    already = sum(min(SHARD, total - start) for start, done in zip(starts, there) if done)
    with progress.bar("score", total, unit="questions", start=already) as advance:
        for start, shard, done in zip(starts, shards, there):
            if not done:
                members = range(start, min(start + SHARD, total))
                _score_shard(scorer, maker, [retrieval[i] for i in members], shard)
                advance(len(members))
    distributed.meet(f"{folder.name} is scored")  # what the leader wrote may be read by all
    return {
        "questions": total,
        "questions_per_s": round(advance.rate, 2),
        "tokens": scorer.real,
        "tokens_per_s": round(scorer.real / max(advance.elapsed, 1e-9)),
        "padding": round(1 - scorer.real / max(scorer.padded, 1), 4),
        "compiles": len(scorer.shapes),
        "truncated": maker.truncations.count,
    }


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
        for name, array in names.items():
            artifacts.save_array(shard.with_name(shard.name.replace("logp", name)), array)
        artifacts.save_array(shard, logp_NxK)  # last: its presence says that the shard is whole


def read_scores(folder: Path) -> dict[str, tuple[list[str], np.ndarray, int]]:
    """What `score_retrieval` wrote: example id → (passage ids, logp_K, tokens of the target)."""
    found = {}
    shards = sorted(Path(folder).glob("logp-*.npy"))
    if not shards:
        raise InputError(f"{folder}: no LM scores here")
    for shard in shards:
        part = {
            name: np.load(shard.with_name(shard.name.replace("logp", name)))
            for name in ("example_ids", "passage_ids", "target_lengths", "logp")
        }
        for row, example_id in enumerate(part["example_ids"]):
            found[str(example_id)] = (part["passage_ids"][row].tolist(), part["logp"][row], int(part["target_lengths"][row]))
    return found
