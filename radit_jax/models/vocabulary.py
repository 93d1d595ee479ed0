"""The LM's last map, from hidden states to the vocabulary: logits, and what is wanted of them without all of them ever being there.

Over many positions the logits have V in front: XLA's CPU code makes (V, P) three times as fast as (P, V), whose rows are long and few.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from radit_jax.models.layers import contract, dot, for_cpu
from radit_jax.sharding import DATA

# Logits that a device holds at once. A CPU keeps them near its caches, 64 positions of 49,152 (80 fill its vectors worse: 281 GFLOP/s, not
# 318); an accelerator reads the whole head for every block.
CPU_LOGITS, LOGITS = 3 << 20, 1 << 27


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Head:
    """logits = hidden @ kernel, in `dtype` with float32 sums; a pytree of its kernel."""

    kernel: jax.Array  # (D, V), or the embedding (V, D) if `transposed`
    transposed: bool = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})

    @property
    def letters(self) -> str:
        return "vd" if self.transposed else "dv"

    @property
    def vocab_size(self) -> int:
        return self.kernel.shape[self.letters.index("v")]

    def of(self, tokens_I: jax.Array) -> Head:
        """The head of these tokens alone: their logits, in their order."""
        return dataclasses.replace(self, kernel=jnp.take(self.kernel, tokens_I, axis=self.letters.index("v")))

    def logits(self, hidden_xD: jax.Array) -> jax.Array:
        """(…, V) float32."""
        return dot(hidden_xD, self.kernel, self.dtype, transposed=self.transposed)

    def logits_in_front(self, hidden_BxPxD: jax.Array) -> jax.Array:
        """(V, B, P) float32."""
        return contract(f"{self.letters},bpd->vbp", self.kernel, hidden_BxPxD, self.dtype)

    def token_logits(self, hidden_xD: jax.Array, tokens_x: jax.Array) -> jax.Array:
        """The logit of one token at each position, float32. The shape of `tokens_x` is that of the positions, or broadcasts to it."""
        kernel_xD = jnp.take(self.kernel, tokens_x, axis=self.letters.index("v"))
        if not self.transposed:
            kernel_xD = jnp.moveaxis(kernel_xD, 0, -1)
        hidden_xD, kernel_xD = (x.astype(self.dtype).astype(jnp.float32) for x in (hidden_xD, kernel_xD))
        return jnp.sum(hidden_xD * kernel_xD, axis=-1)

    def normalizers(self, hidden_BxPxD: jax.Array) -> jax.Array:
        """logsumexp of the logits at each position (B, P), by blocks of positions. No gradient is meant to pass."""
        B, P, D = hidden_BxPxD.shape
        hidden_MxPxD = hidden_BxPxD.reshape(_parts(), -1, D)  # a device's rows are one: blocks are of the size that is wanted
        M, positions, _ = hidden_MxPxD.shape
        blocks = in_blocks(hidden_MxPxD, self.block(M, positions))
        norms = jax.lax.map(lambda hidden: jax.nn.logsumexp(self.logits_in_front(hidden), axis=0), blocks)
        return out_of_blocks(norms, positions).reshape(B, P)

    def block(self, rows: int, positions: int) -> int:
        """Positions of each row whose logits are there at once."""
        rows = max(rows // _parts(), 1)  # on each device
        most = CPU_LOGITS if for_cpu() else LOGITS
        return min(positions, max(most // (rows * self.vocab_size) // 8 * 8, 8))


def _parts() -> int:
    """Devices that rows are spread over."""
    return jax.sharding.get_abstract_mesh().shape.get(DATA, 1)


def in_blocks(array_BxPx: jax.Array, block: int) -> jax.Array:
    """(B, P, …) → (P / block, B, block, …), with zeros after the end."""
    B, P, *rest = array_BxPx.shape
    padded = jnp.pad(array_BxPx, [(0, 0), (0, -P % block), *[(0, 0)] * len(rest)])
    return jnp.moveaxis(padded.reshape(B, -1, block, *rest), 1, 0)


def out_of_blocks(blocks_NxBxpx: jax.Array, positions: int) -> jax.Array:
    """What `in_blocks` was given, (B, P, …), of its blocks or of as many results."""
    rows_BxNxpx = jnp.moveaxis(blocks_NxBxpx, 0, 1)
    return rows_BxNxpx.reshape(len(rows_BxNxpx), -1, *rows_BxNxpx.shape[3:])[:, :positions]
