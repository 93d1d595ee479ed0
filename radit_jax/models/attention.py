"""Grouped-query attention over a row's own tokens and, if there is one, a cache of earlier ones: one softmax over both.

Repeated keys and values are never materialised: the R = H / G query heads of a group share theirs inside the contraction.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from radit_jax.models.layers import Linear, RMSNorm, contract, rotate, side_by_side
from radit_jax.models.unpad import Line

UNREACHABLE = -1  # distance of a key that a query may not see
FAR = jnp.iinfo(jnp.int32).max  # a window that reaches everything
MASKED = -1e30  # finite, so that a row of padding gives a uniform softmax and no NaN, in gradients too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Segments:
    """Rows of sequences side by side: a token sees its own segment. Segment 0 is padding, which sees nothing and is seen by none."""

    ids_BxT: jax.Array  # int32
    indices_N: jax.Array | None = None  # of the real tokens (unpad.Line); None: maps read the padding too
    single: bool = dataclasses.field(default=False, metadata={"static": True})  # one segment a row, and padding after it
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})  # no segment is longer, in tokens; None: not known

    @property
    def real_BxT(self) -> jax.Array:
        return self.ids_BxT > 0

    def visible_BxTxT(self) -> jax.Array:
        return (self.ids_BxT[:, :, None] == self.ids_BxT[:, None, :]) & self.real_BxT[:, :, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trees:
    """Rows of token trees in depth-first order (data/trees.py): a token sees itself and those before it whose end it has not passed."""

    ends_BxT: jax.Array  # int32, an index into the row; 0 is padding
    indices_N: jax.Array | None = None  # as in Segments

    @property
    def real_BxT(self) -> jax.Array:
        return self.ends_BxT > 0

    def visible_BxTxT(self) -> jax.Array:
        index_T = jnp.arange(self.ends_BxT.shape[1], dtype=jnp.int32)
        return (index_T[:, None] >= index_T[None])[None] & (index_T[None, :, None] < self.ends_BxT[:, None, :])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
    """Keys and values to look at, heads first (B, G, S, h), and how far back each lies from each query."""

    k_BxGxSxh: jax.Array
    v_BxGxSxh: jax.Array
    distance_BxTxS: jax.Array  # int32; UNREACHABLE where it may not be seen


def distances(positions_BxT: jax.Array, key_positions_BxS: jax.Array, visible_BxTxS: jax.Array) -> jax.Array:
    """Query position minus key position (int32); UNREACHABLE where the key is later or not visible."""
    back = positions_BxT[:, :, None] - key_positions_BxS[:, None, :]
    return jnp.where(visible_BxTxS & (back >= 0), back, UNREACHABLE)


def attend(q_BxGxRxTxh: jax.Array, sources: list[Keys], window: jax.Array, dtype: str) -> jax.Array:
    """softmax(q k / sqrt(h)) v over all sources together, seeing keys less than `window` positions back. (B, G, R, T, h) in `dtype`."""
    B, G, R, T, h = q_BxGxRxTxh.shape
    scores = [_scores(q_BxGxRxTxh, keys, window, dtype) for keys in sources]
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1) if len(scores) > 1 else scores[0], axis=-1).astype(dtype)
    out, start = 0.0, 0
    for keys in sources:
        stop = start + keys.k_BxGxSxh.shape[2]
        weights_BxGxQxS = weights[..., start:stop].reshape(B, G, R * T, stop - start)
        out = out + contract("bgqs,bgsh->bgqh", weights_BxGxQxS, keys.v_BxGxSxh, dtype)
        start = stop
    return out.astype(dtype).reshape(B, G, R, T, h)


def attend_within(q_BxGxRxTxh: jax.Array, keys: Keys, window: jax.Array, dtype: str, block: int, reach: int | None = None) -> jax.Array:
    """`attend` of a row to its own tokens, which see none after them, nor any `reach` tokens before: every `block` queries read the blocks
    of keys up to their own, from the first that one of them can see.

    The same function with 5/8 of the work at four blocks a row, and where `reach` is given, work that grows with the row, not with its
    square; where nothing skips masked scores for us, on CPUs, that is time.
    """
    edges = [*range(0, q_BxGxRxTxh.shape[3], block), q_BxGxRxTxh.shape[3]]
    # Split and joined, so that gradients are joined and split: those of slices would be as many sums over whole rows.
    q = jnp.split(q_BxGxRxTxh, edges[1:-1], axis=3)
    k, v = (jnp.split(states, edges[1:-1], axis=2) for states in (keys.k_BxGxSxh, keys.v_BxGxSxh))
    out = []
    for n, (start, stop) in enumerate(itertools.pairwise(edges)):
        first = 0 if reach is None else max(start - reach + 1, 0) // block
        k_BxGxSxh, v_BxGxSxh = (jnp.concatenate(blocks[first : n + 1], axis=2) for blocks in (k, v))
        distance_BxTxS = keys.distance_BxTxS[:, start:stop, first * block : stop]
        out.append(attend(q[n], [Keys(k_BxGxSxh, v_BxGxSxh, distance_BxTxS)], window, dtype))
    return jnp.concatenate(out, axis=3)


def _scores(q_BxGxRxTxh: jax.Array, keys: Keys, window: jax.Array, dtype: str) -> jax.Array:
    B, G, R, T, h = q_BxGxRxTxh.shape
    # The query heads of a group are rows beside T: one matrix product per group.
    scores_BxGxQxS = contract("bgqh,bgsh->bgqs", q_BxGxRxTxh.reshape(B, G, R * T, h), keys.k_BxGxSxh, dtype) * h**-0.5
    visible_BxTxS = (keys.distance_BxTxS >= 0) & (keys.distance_BxTxS < window)
    return jnp.where(visible_BxTxS[:, None, None], scores_BxGxQxS.reshape(B, G, R, T, -1), MASKED)


class Attention(nnx.Module):
    """Projections, optional norm of q and k per head (Qwen3), rotary positions, attention."""

    def __init__(
        self,
        stack: tuple[int, ...],
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        output_bias: bool,
        qk_norm_eps: float | None,
        dtype: str,
        param_dtype: str,
        rngs: nnx.Rngs,
    ):
        kinds: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.head_dim, self.dtype = head_dim, dtype
        self.q = Linear((*stack, width, heads * head_dim), bias=bias, rngs=rngs, **kinds)
        self.k = Linear((*stack, width, kv_heads * head_dim), bias=bias, rngs=rngs, **kinds)
        self.v = Linear((*stack, width, kv_heads * head_dim), bias=bias, rngs=rngs, **kinds)
        self.o = Linear((*stack, heads * head_dim, width), bias=output_bias, rngs=rngs, **kinds)
        self.q_norm = None if qk_norm_eps is None else RMSNorm((*stack, head_dim), eps=qk_norm_eps, **kinds)
        self.k_norm = None if qk_norm_eps is None else RMSNorm((*stack, head_dim), eps=qk_norm_eps, **kinds)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        read: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        line: Line,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of x, (B, T, D) or a line of its tokens, returns the output in the same form, and the new keys and values (B, G, T, h).

        `read` is the attention itself: of q (B, G, R, T, h) and the new k, v (B, G, T, h), who sees whom being its own matter.
        """
        q, k, v = side_by_side((self.q, self.k, self.v), x)
        q, k, v = (states.reshape(*x.shape[:2], -1, self.head_dim) for states in (q, k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        q, k, v = (line.pad(states).swapaxes(1, 2) for states in (q, k, v))
        B, G, T, _ = k.shape
        out = read(q.reshape(B, G, -1, T, self.head_dim), k, v)
        out_BxTxHxh = out.reshape(q.shape).swapaxes(1, 2)
        return self.o(line.unpad(out_BxTxHxh).reshape(*x.shape[:2], -1)), k, v
