"""The BERT-family text encoder E(text) of the retriever (Eq. 1): DRAGON+, Contriever, MiniLM, E5, BGE.

Post-norm transformer with learned positions, layers stacked and scanned as in the LM. There is no dropout: RA-DIT's retriever is
trained for one epoch at a small learning rate, and a deterministic encoder is what the stored vectors were made with.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radit_jax.models.attention import MASKED
from radit_jax.models.layers import Embed, Linear, as_bits, contract, for_cpu, from_bits, over_rows, rows_apart
from radit_jax.models.lm import REMAT
from radit_jax.models.unpad import Line

POOLINGS = ("cls", "mean")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, and how token states become one vector. Hashable: it is static under jit."""

    vocab_size: int
    width: int  # also E, the size of the vector
    layers: int
    heads: int
    mlp_width: int
    max_positions: int = 512  # tokens, specials included
    position_offset: int = 0  # rows of the position table before the first position (RoBERTa: 2)
    types: int = 2  # rows of the segment table, of which the first is used
    norm_eps: float = 1e-12
    pooling: str = "cls"  # cls: state of the first token | mean: of the unmasked tokens
    normalize: bool = False  # vectors of length 1
    dtype: str = "float32"  # compute dtype; norms, softmax, pooling and the vector are float32 in any case
    param_dtype: str = "float32"
    remat: str = "none"  # none | full | dots: what the backward pass recomputes

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width ({self.width}) is not a multiple of heads ({self.heads})")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling is {self.pooling!r}, expected one of {', '.join(POOLINGS)}")
        if self.remat not in REMAT:
            raise ValueError(f"remat is {self.remat!r}, expected one of {', '.join(REMAT)}")


class LayerNorm(nnx.Module):
    """(x - mean) / std * scale + bias over the last axis, computed in float32, returned in `dtype`."""

    def __init__(self, shape: tuple[int, ...], *, eps: float, dtype: str, param_dtype: str):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(shape, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        scale, bias = (over_rows(p[...].astype(jnp.float32), x.shape) for p in (self.scale, self.bias))
        return (wide * scale + bias).astype(self.dtype)


class Embeddings(nnx.Module):
    """norm(word + position + type 0)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c, kinds = config, {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.offset = c.position_offset
        self.word = Embed((c.vocab_size, c.width), rngs=rngs, **kinds)
        self.position = Embed((c.max_positions + c.position_offset, c.width), rngs=rngs, **kinds)
        self.type = Embed((c.types, c.width), rngs=rngs, **kinds)
        self.norm = LayerNorm((c.width,), eps=c.norm_eps, **kinds)

    def __call__(self, tokens_BxT: jax.Array, positions_BxT: jax.Array) -> jax.Array:
        place_BxTxD = self.position(positions_BxT + self.offset) + self.type(jnp.zeros_like(positions_BxT))
        return self.norm(self.word(tokens_BxT) + place_BxTxD)


class Attention(nnx.Module):
    """Bidirectional multi-head attention over the tokens that `bias` leaves visible."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.heads, self.dtype = c.heads, c.dtype
        square = (c.layers, c.width, c.width)
        kinds = {"bias": True, "dtype": c.dtype, "param_dtype": c.param_dtype, "rngs": rngs}
        self.q, self.k, self.v, self.o = (Linear(square, **kinds) for _ in range(4))

    def __call__(self, x: jax.Array, bias_BxS: jax.Array, line: Line) -> jax.Array:
        heads = (linear(x).reshape(*x.shape[:2], self.heads, -1) for linear in (self.q, self.k, self.v))
        q, k, v = (line.pad(states).swapaxes(1, 2) for states in heads)
        scores_BxHxTxS = contract("bhtd,bhsd->bhts", q, k, self.dtype) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(scores_BxHxTxS + bias_BxS[:, None, None], axis=-1)
        out_BxHxTxd = contract("bhts,bhsd->bhtd", weights, v, self.dtype).astype(self.dtype)
        return self.o(line.unpad(out_BxHxTxd.swapaxes(1, 2)).reshape(x.shape))


class Mlp(nnx.Module):
    """down(gelu(up(x))), the exact (erf) gelu."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c = config
        kinds = {"bias": True, "dtype": c.dtype, "param_dtype": c.param_dtype, "rngs": rngs}
        self.up = Linear((c.layers, c.width, c.mlp_width), **kinds)
        self.down = Linear((c.layers, c.mlp_width, c.width), **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        up = self.up(x).astype(jnp.float32)  # rounded once: see layers.GatedMlp
        # jax.nn.gelu is by erfc, which takes twice the time of erf for digits that are rounded away.
        return self.down((up * 0.5 * (1 + jax.lax.erf(up * np.float32(2**-0.5)))).astype(x.dtype))


class Block(nnx.Module):
    """One layer: norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        c = config
        kinds = {"eps": c.norm_eps, "dtype": c.dtype, "param_dtype": c.param_dtype}
        self.attention = Attention(c, rngs=rngs)
        self.attention_norm = LayerNorm((c.layers, c.width), **kinds)
        self.mlp = Mlp(c, rngs=rngs)
        self.mlp_norm = LayerNorm((c.layers, c.width), **kinds)

    def __call__(self, x: jax.Array, bias_BxS: jax.Array, line: Line) -> jax.Array:
        with jax.named_scope("attention"):
            x = self.attention_norm(x + self.attention(x, bias_BxS, line))
        with jax.named_scope("mlp"):
            return self.mlp_norm(x + self.mlp(x))


class Encoder(nnx.Module):
    """Text to vector: tokens_BxT int32, mask_BxT bool (True on real tokens) -> vectors_BxE float32.

    `indices_N` are those of the real tokens (unpad.Line); without them the maps read the padding too, which changes no vector.
    `unrolled`: on a CPU the program has the layers one after the other, not in a loop, for a gradient: a loop's goes into the stack as
    zeros, then layer by layer, and its weights are copied out of theirs. 16 R-ft steps of 32 questions take 3.5 s in place of 4.3 on two
    cores with AMX, and a third longer to compile. Without a gradient, or with `remat`, the loop is up to a tenth faster.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embeddings(config, rngs=rngs)
        self.blocks = Block(config, rngs=rngs)

    def __call__(
        self, tokens_BxT: jax.Array, mask_BxT: jax.Array, indices_N: jax.Array | None = None, *, unrolled: bool = False
    ) -> jax.Array:
        hidden_BxTxD = self.hidden(tokens_BxT, mask_BxT, indices_N, unrolled=unrolled).astype(jnp.float32)
        with jax.named_scope("pool"):
            vectors_BxE = hidden_BxTxD[:, 0] if self.config.pooling == "cls" else mean_of(hidden_BxTxD, mask_BxT)
            return unit(vectors_BxE) if self.config.normalize else vectors_BxE

    def hidden(
        self, tokens_BxT: jax.Array, mask_BxT: jax.Array, indices_N: jax.Array | None = None, *, unrolled: bool = False
    ) -> jax.Array:
        """States (B, T, D) of the last layer. Rows are padded on the right; ValueError if T is beyond the position table."""
        if tokens_BxT.shape[1] > self.config.max_positions:
            raise ValueError(f"{tokens_BxT.shape[1]} tokens, but the encoder has positions for {self.config.max_positions}")
        bias_BxS = jnp.where(mask_BxT, 0.0, MASKED)
        positions_BxT = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1])[None], tokens_BxT.shape)
        line = Line.of(mask_BxT, indices_N)
        graphdef, stacked = nnx.split(self.blocks)

        def layer(x, params):
            return rows_apart(nnx.merge(graphdef, jax.tree.map(from_bits, params))(x, bias_BxS, line)), None

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[self.config.remat], prevent_cse=False)
        x = rows_apart(self.embed(line.unpad(tokens_BxT), line.unpad(positions_BxT)))
        return line.pad(jax.lax.scan(layer, x, stacked, unroll=unrolled and for_cpu())[0])

    def as_read(self) -> Encoder:
        """This encoder with its layers' kernels in the compute dtype, as bits, from here on: else every call casts all of them.

        The same vectors; no gradient passes.
        """
        kernels = {path: leaf for path, leaf in nnx.to_flat_state(nnx.state(self.blocks)) if path[-1] == "kernel"}
        cast = {path: leaf.replace(as_bits(leaf[...].astype(self.config.dtype))) for path, leaf in kernels.items()}
        nnx.update(self.blocks, nnx.from_flat_state(cast))
        return self


class DualEncoder(nnx.Module):
    """E_q and E_d (Eq. 1) as one model, where both are trained."""

    REMAT = "dots"  # of E_d there: it reads k passages for every query, too many to keep all that its backward pass reads

    def __init__(self, query: Encoder, document: Encoder):
        self.query, self.document = query, document


def mean_of(hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Mean over the unmasked tokens; 0 where a row has none."""
    weights_BxT = mask_BxT.astype(hidden_BxTxD.dtype)
    total_BxD = jnp.sum(hidden_BxTxD * weights_BxT[..., None], axis=1)
    return total_BxD / jnp.maximum(jnp.sum(weights_BxT, axis=1), 1.0)[:, None]


def unit(vectors_BxE: jax.Array) -> jax.Array:
    """Vectors divided by their length, which is taken as at least 1e-12 (a zero vector stays zero, with a finite gradient)."""
    squares_B = jnp.sum(vectors_BxE * vectors_BxE, axis=-1)
    return vectors_BxE * jax.lax.rsqrt(jnp.maximum(squares_B, 1e-24))[:, None]
