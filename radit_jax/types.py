"""The nouns that pass between the floors of the house, and the legend for shapes in names.

Shape legend, used in names as ``logp_BxK`` and in einsum letters alike:

    B  batch (questions or rows)      T  tokens            D  model width
    K  passages of one question       V  vocabulary        H  heads
    E  embedding of the retriever     N  corpus            L  layers
    C  choices (candidate answers)    S  slots of a KV cache
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

PyTree = Any


@dataclasses.dataclass(frozen=True, slots=True)
class Passage:
    """One retrievable chunk c of the corpus."""

    id: str
    title: str
    text: str

    @property
    def content(self) -> str:
        """What encoders embed and the LM reads: the title in front of the text."""
        return f"{self.title}. {self.text}" if self.title else self.text


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One thing to answer: x (prompt), y (target), and how to look for passages (query)."""

    id: str
    query: str  # what the query encoder sees
    prompt: str  # x with its markers, without the background: "Q: who …\nA:"
    target: str  # y, with the space that follows the prompt: " Paris"
    answers: tuple[str, ...] = ()  # every accepted answer, for metrics
    background: str | None = None  # the example's own context (reading comprehension), if it has one
    retrieve: bool = True  # False: only its own background is used
    exclude: tuple[str, ...] = ()  # passage ids that may not be retrieved for it (they contain y)
    gold_id: str | None = None  # id of the document that answers it, where known
    choices: tuple[str, ...] = ()  # candidate targets of a choice task


@dataclasses.dataclass(frozen=True, slots=True)
class Retrieved:
    """An example with its k passages, best first. rows_K index the passage store and the vectors; scores_K are s(x, c) (Eq. 1)."""

    example: Example
    passages: tuple[Passage, ...]
    rows_K: np.ndarray
    scores_K: np.ndarray


@dataclasses.dataclass(frozen=True, slots=True)
class Instance:
    """One training or scoring row before batching: tokens_T of which tokens_T[target_start:] is the output."""

    id: str
    tokens_T: np.ndarray
    target_start: int


def _batch(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_batch
class LmBatch:
    """Packed rows. segment_ids are 1, 2, … within a row and 0 on padding; positions restart in every segment.

    The P slots of a row hold the positions whose *next* token is an output token: logits are made only there.
    Unused slots have weight 0.
    """

    tokens_BxT: jax.Array  # int32
    positions_BxT: jax.Array  # int32
    segment_ids_BxT: jax.Array  # int32
    slots_BxP: jax.Array  # int32, index into T of the token before the output token
    labels_BxP: jax.Array  # int32, the output token
    weights_BxP: jax.Array  # float32, 1 on real slots
    indices_N: jax.Array | None = None  # int32, of the real tokens where they are read in one line (unpad.Line)
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})  # no segment is longer (attention.Segments)


@_batch
class LsrBatch:
    """Questions with their k candidate passages, their frozen vectors and their stored LM scores, all in one passage order.

    Where the document encoder is trained too, the passages come as tokens, and their stored vectors are not read. A whole batch is of
    parts, (A, B, …), as an LmBatch is of micro-batches.
    """

    query_tokens_BxT: jax.Array  # int32
    query_mask_BxT: jax.Array  # bool
    passages_BxKxE: jax.Array  # float32, frozen E_d(c)
    candidates_BxK: jax.Array  # bool, False on missing candidates
    lm_logp_BxK: jax.Array  # float32, log p_LM(y | c∘x), summed over tokens
    target_lengths_B: jax.Array  # int32, tokens of y
    base_logits_BxK: jax.Array  # float32, scaled s(x, c) of the untuned retriever
    weights_B: jax.Array  # float32, 0 on padding rows
    query_indices_N: jax.Array | None = None  # int32, of the queries' real tokens where they are read in one line
    passage_tokens_BxKxT: jax.Array | None = None  # int32
    passage_mask_BxKxT: jax.Array | None = None  # bool
    passage_indices_N: jax.Array | None = None  # int32, of the passages' real tokens among the B·K·T, as those of the queries


@_batch
class TrainState:
    """What training carries from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32 scalar
    params: PyTree
    opt_state: PyTree
