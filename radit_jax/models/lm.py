"""The decoder LM: the Llama architecture and its near relatives, one code path with config fields.

Layers are stacked (parameters have a leading L axis) and scanned, so that compile time does not grow with depth. `hidden`, `prefill`,
`extend` and `decode_step` are the same forward pass with and without a cache. The modules know no mesh: parameter paths
(``blocks/attention/q/kernel`` …) are what the sharding rules match.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from radit_jax.models import flash, lora
from radit_jax.models.attention import FAR, Attention, Keys, Segments, Trees, attend, attend_within, distances
from radit_jax.models.layers import (
    DOT,
    Embed,
    GatedMlp,
    Linear,
    RMSNorm,
    RopeScaling,
    as_bits,
    for_cpu,
    from_bits,
    kept,
    rope_frequencies,
    rope_tables,
    rows_apart,
)
from radit_jax.models.unpad import Line
from radit_jax.models.vocabulary import Head

# What the backward pass keeps from the forward pass of a layer, and so what it computes twice.
REMAT = {
    "none": None,  # keeps everything
    "full": jax.checkpoint_policies.nothing_saveable,  # keeps the layer's input only
    "dots": jax.checkpoint_policies.save_only_these_names(DOT),  # keeps the outputs of linear maps
}

CPU_BLOCK = 64  # queries that a CPU attends for at once


@dataclasses.dataclass(frozen=True)
class LmConfig:
    """The shape of a decoder and its differences between families. Hashable: it is static under jit."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False  # the head is the transposed embedding
    attention_bias: bool = False  # on q, k, v (Qwen2)
    output_bias: bool = False  # on o
    mlp_bias: bool = False
    qk_norm: bool = False  # per head, before the rotation (Qwen3)
    windows: tuple[int | None, ...] = ()  # sliding window of each layer in tokens, None = unlimited; () = none anywhere
    max_positions: int = 2048  # context the checkpoint was trained for, in tokens
    dtype: str = "float32"  # compute dtype; sums, norms and the softmax are float32 in any case
    param_dtype: str = "float32"
    remat: str = "none"  # none | full | dots
    attention: str = flash.REFERENCE  # who reads whole rows: the reference or a flash kernel (flash.KINDS); a cache is the reference's

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")
        if self.windows and len(self.windows) != self.layers:
            raise ValueError(f"windows has {len(self.windows)} entries, expected one per layer ({self.layers})")
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}, expected one of {', '.join(REMAT)}")
        if self.attention not in flash.KINDS:
            raise ValueError(f"attention is {self.attention!r}, expected one of {', '.join(flash.KINDS)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens read so far, heads first, as bits (layers.as_bits).

    Rows share the slot index; what a slot means is its position, -1 = empty.
    """

    k_LxBxGxSxh: jax.Array
    v_LxBxGxSxh: jax.Array
    positions_BxS: jax.Array  # int32
    next_slot: jax.Array  # int32 scalar: where the next token of every row goes

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.positions_BxS.shape[-1]

    def with_room(self, slots: int) -> KVCache:
        """A copy with so many slots more, empty, behind the others."""

        def widened(x: jax.Array, axis: int, fill: int) -> jax.Array:
            return jnp.pad(x, [(0, slots if n == axis else 0) for n in range(x.ndim)], constant_values=fill)

        k, v = (widened(x, x.ndim - 2, 0) for x in (self.k_LxBxGxSxh, self.v_LxBxGxSxh))
        return KVCache(k, v, widened(self.positions_BxS, self.positions_BxS.ndim - 1, -1), self.next_slot)

    def append(self, k_LxBxGxTxh: jax.Array, v_LxBxGxTxh: jax.Array, positions_BxT: jax.Array) -> KVCache:
        """Writes T new tokens, as bits too, at `next_slot`. Past the capacity the last slots are overwritten: make room for them first.

        Any axes more (of prompts side by side) stand before the named ones or after L, alike in the cache and in what is written.
        """

        def write(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new, self.next_slot, axis)

        return KVCache(
            write(self.k_LxBxGxSxh, k_LxBxGxTxh, -2),
            write(self.v_LxBxGxSxh, v_LxBxGxTxh, -2),
            write(self.positions_BxS, positions_BxT, -1),
            self.next_slot + positions_BxT.shape[-1],
        )


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LmConfig, *, rngs: nnx.Rngs):
        c, stack = config, (config.layers,)
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        self.attention_norm = RMSNorm((*stack, c.width), eps=c.norm_eps, **kinds)
        self.attention = Attention(
            stack, c.width, c.heads, c.kv_heads, c.head_dim,
            bias=c.attention_bias, output_bias=c.output_bias, qk_norm_eps=c.norm_eps if c.qk_norm else None, rngs=rngs, **kinds,
        )  # fmt: skip
        self.mlp_norm = RMSNorm((*stack, c.width), eps=c.norm_eps, **kinds)
        self.mlp = GatedMlp(stack, c.width, c.mlp_width, bias=c.mlp_bias, rngs=rngs, **kinds)

    def __call__(self, x, rope, read, line: Line):
        with jax.named_scope("attention"):
            out, k, v = self.attention(self.attention_norm(x), rope, read, line)
            x = x + out
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x)), k, v


def picked(x_BxY: jax.Array, of_R: jax.Array | None) -> jax.Array:
    """The rows of x that `of_R` (R,) names; None: x as it is."""
    return x_BxY if of_R is None else jnp.take(x_BxY, of_R, axis=0, mode="clip")


class LM(nnx.Module):
    """p(next token | tokens). See LmConfig for the families."""

    def __init__(self, config: LmConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        kinds = {"dtype": c.dtype, "param_dtype": c.param_dtype}
        self.embed = Embed((c.vocab_size, c.width), rngs=rngs, **kinds)
        self.blocks = Block(c, rngs=rngs)
        self.final_norm = RMSNorm((c.width,), eps=c.norm_eps, **kinds)
        self.head = None if c.tied else Linear((c.width, c.vocab_size), rngs=rngs, **kinds)

    def __call__(self, tokens_BxT: jax.Array) -> jax.Array:
        """Logits (B, T, V) float32 of whole rows without padding."""
        positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1])[None], tokens_BxT.shape)
        return self.logits(self.hidden(tokens_BxT, positions_BxT, jnp.ones_like(tokens_BxT)))

    def hidden(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array,
        segment_ids_BxT: jax.Array,
        indices_N: jax.Array | None = None,
        reach: int | None = None,
    ) -> jax.Array:
        """Hidden states (B, T, D) after the final norm.

        A token sees the tokens of its own segment at its own position or before. Segment 0 is padding: seen by none, finite.
        `indices_N`, `reach`: as in Segments.
        """
        rows = Segments(segment_ids_BxT, indices_N, reach=reach)
        return self._forward(tokens_BxT, positions_BxT, rows, None, collect=False)[0]

    def read(self, tokens_BxT: jax.Array, positions_BxT: jax.Array, rows: Segments | Trees) -> jax.Array:
        """Hidden states (B, T, D) of packed rows, as `hidden`, but no gradient passes: faster where weights are bfloat16 on a CPU."""
        # Keys and values that nobody asks for are left out by the compiler.
        return self._forward(tokens_BxT, positions_BxT, rows, None, collect=True)[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Logits (..., V) float32 of hidden states (..., D): separate, because losses and scores need them at few positions."""
        with jax.named_scope("logits"):
            return self.vocabulary().logits(hidden)

    def vocabulary(self) -> Head:
        """What makes logits of hidden states: the head, or the embedding where they are tied."""
        kernel = self.embed.embedding if self.head is None else self.head.kernel
        return Head(kernel[...], self.head is None, self.config.dtype)

    def prefill(self, tokens_BxT: jax.Array, lengths_B: jax.Array, indices_N: jax.Array | None = None) -> tuple[jax.Array, KVCache]:
        """Reads right-padded prompts into a new cache of T slots, which is full. `indices_N`: as in Segments."""
        B, T = tokens_BxT.shape
        positions_BxT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
        read_BxT = positions_BxT < lengths_B[:, None]
        rows = Segments(read_BxT.astype(jnp.int32), indices_N, single=True)
        hidden, k, v = self._forward(tokens_BxT, positions_BxT, rows, None, collect=True)
        return hidden, KVCache(k, v, jnp.where(read_BxT, positions_BxT, -1), jnp.int32(T))

    def extend(
        self, tokens_BxT: jax.Array, positions_BxT: jax.Array, rows: Segments | Trees, cache: KVCache, of_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Hidden states (B, T, D) of new tokens that see the cache and their own among the new, and their keys and values as bits.

        Several continuations of one prefix are several segments, or trees, or several rows, `of_B` being the row of the cache that each
        sees; None: its own. The cache is not written: KVCache.append does that.
        """
        return self._forward(tokens_BxT, positions_BxT, rows, cache, of_B, collect=True)

    def decode_step(self, tokens_B: jax.Array, positions_B: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Logits (B, V) after one more token in every row, and the cache with it."""
        tokens, positions = tokens_B[:, None], positions_B[:, None]
        hidden, k, v = self.extend(tokens, positions, Segments(jnp.ones_like(tokens)), cache)
        return self.logits(hidden[:, 0]), cache.append(k, v, positions)

    def as_read(self) -> LM:
        """This LM with its layers' weights as bits from here on: for `read`, `prefill`, `extend`, which else make them in every call."""
        nnx.update(self.blocks, jax.tree.map(as_bits, nnx.state(self.blocks)))
        return self

    def _forward(self, tokens_BxT, positions_BxT, rows: Segments | Trees, cache, of_B=None, *, collect: bool):
        """The one forward pass. Keys and values of the new tokens (L, B, G, T, h) are returned, as bits, only if `collect`."""
        c = self.config
        line = Line.of(rows.real_BxT, rows.indices_N)
        rope = rope_tables(line.unpad(positions_BxT), rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        kernel = flash.reader(c, rows) if cache is None and isinstance(rows, Segments) else None
        own_BxTxT = past_BxTxS = None
        if kernel is None:
            own_BxTxT = distances(positions_BxT, positions_BxT, rows.visible_BxTxT())
        reach = rows.reach if isinstance(rows, Segments) else None
        if cache is not None:
            past_positions_BxS = picked(cache.positions_BxS, of_B)
            there = rows.real_BxT[:, :, None] & (past_positions_BxS >= 0)[:, None, :]
            past_BxTxS = distances(positions_BxT, past_positions_BxS, there)
        graphdef, stacked = nnx.split(self.blocks)

        # Reading into a cache has no gradient, nor have frozen weights (those that learn are float32): slices can be taken of bits.
        sliced = as_bits if collect or lora.is_adapted(self.blocks) else lambda x: x

        def layer(x, inputs):
            params, window, k_BxGxSxh, v_BxGxSxh = inputs
            x = kept(x)  # the layer's input is there for the backward pass in any case: this way as bits
            past = [] if cache is None else [Keys(*(from_bits(picked(x, of_B)) for x in (k_BxGxSxh, v_BxGxSxh)), past_BxTxS)]

            def read(q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh):
                own = Keys(k_BxGxTxh, v_BxGxTxh, own_BxTxT)
                if not past and for_cpu() and q_BxGxRxTxh.shape[3] > CPU_BLOCK:
                    return attend_within(q_BxGxRxTxh, own, window, c.dtype, CPU_BLOCK, reach)
                return attend(q_BxGxRxTxh, [*past, own], window, c.dtype)

            x, k, v = nnx.merge(graphdef, jax.tree.map(from_bits, params))(x, rope, kernel or read, line)
            return rows_apart(x), tuple(as_bits(y) if collect else None for y in (k, v))

        if c.remat != "none":
            # Inside a scan the compiler cannot undo the rematerialisation, so its costly guard is left out.
            layer = jax.checkpoint(layer, policy=REMAT[c.remat], prevent_cse=False)
        windows_L = jnp.asarray([FAR if w is None else w for w in c.windows or (None,) * c.layers], jnp.int32)
        past_k, past_v = (None, None) if cache is None else (cache.k_LxBxGxSxh, cache.v_LxBxGxSxh)
        inputs = (jax.tree.map(sliced, stacked), windows_L, past_k, past_v)
        x, (k, v) = jax.lax.scan(layer, rows_apart(self.embed(line.unpad(tokens_BxT))), inputs)
        return line.pad(self.final_norm(x)), k, v
