"""Rows without their padding: what is done to a token alone is done to the real tokens of all rows in one line, attention sees rows.

A matrix product costs on padding what it costs on tokens. Where nothing else fills a row (segments, for a flash kernel) and all rows lie on
one device, the N real tokens of (B, T) rows go through the maps as (1, N), and are put into their rows for attention alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Line:
    """Which places of (B, T) rows are in the line, and where in the line each place is. Without indices the rows stay as they are."""

    indices_N: jax.Array | None  # int32, into B·T; B·T where the line is longer than the tokens are many
    numbers_M: jax.Array | None = None  # int32, of the place's token in the line, for all M = B·T places; N for padding
    rows: int = dataclasses.field(default=0, metadata={"static": True})  # B

    @classmethod
    def of(cls, real_BxT: jax.Array, indices_N: jax.Array | None) -> Line:
        """`indices_N` are those of all real tokens in ascending order (data.padding.real_indices), or None."""
        if indices_N is None:
            return cls(None)
        real_M = real_BxT.reshape(-1)
        return cls(indices_N, jnp.where(real_M, jnp.cumsum(real_M, dtype=jnp.int32) - 1, len(indices_N)), len(real_BxT))

    def unpad(self, x: jax.Array) -> jax.Array:
        """(B, T, …) → (1, N, …), 0 where no token is."""
        if self.indices_N is None:
            return x
        return _pick(x.reshape(-1, *x.shape[2:]), self.indices_N, self.numbers_M)[None]

    def pad(self, x: jax.Array) -> jax.Array:
        """(1, N, …) → (B, T, …), 0 on padding."""
        if self.indices_N is None:
            return x
        return _pick(x[0], self.numbers_M, self.indices_N).reshape(self.rows, -1, *x.shape[2:])


@jax.custom_vjp
def _pick(x: jax.Array, indices: jax.Array, back: jax.Array) -> jax.Array:
    """x[indices], 0 where an index is len(x). `back` are the indices that undo it: the gradient gathers by them, it need not scatter."""
    return jnp.take(x, indices, axis=0, mode="fill", fill_value=0)


_pick.defvjp(
    lambda x, indices, back: (_pick(x, indices, back), (indices, back)),
    lambda ways, cotangent: (_pick(cotangent, *ways[::-1]), None, None),
)
