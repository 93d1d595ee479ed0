"""An LM with its layers apart, for one more token in every row, again and again.

On CPUs and GPUs a slice of stacked weights is a copy of them, which for a few rows takes longer than their products, and a stacked cache
that is read and written in one step is copied whole. Apart, weights are read where they lie, and each layer writes its keys into its own
array before it looks at them: two and a half times the tokens a second on an H200. On a CPU the keys of the prompts, too, are looked at
where they lie, and what is written has arrays of its own.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radit_jax.models.attention import FAR, Keys, attend, distances
from radit_jax.models.layers import as_bits, for_cpu, from_bits, rope_frequencies, rope_tables
from radit_jax.models.lm import LM, KVCache
from radit_jax.models.unpad import Line
from radit_jax.sharding import replicated

APART = ("cpu", "gpu", "cuda")  # platforms where decoding is faster so


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ApartCache:
    """A KVCache with an array for each layer."""

    k_BxGxSxh: tuple[jax.Array, ...]
    v_BxGxSxh: tuple[jax.Array, ...]
    positions_BxSx1: jax.Array
    next_slot: jax.Array

    @property
    def capacity(self) -> int:
        """Slots of a row."""
        return self.positions_BxSx1.shape[-2]

    @classmethod
    def of(cls, cache: KVCache) -> ApartCache:
        """A copy, but where layers are views (`are_views`). Any axes between L and B stay in front."""
        k, v = map(_layers, (cache.k_LxBxGxSxh, cache.v_LxBxGxSxh))
        return cls(k, v, cache.positions_BxS[..., None], jnp.copy(cache.next_slot))  # which may be given up

    @classmethod
    def empty(cls, like: KVCache, slots: int) -> ApartCache:
        """A cache of so many slots for the rows of another one, of which it holds nothing."""
        layers, *rows, _, h = like.k_LxBxGxSxh.shape
        dtype = jax.eval_shape(from_bits, like.k_LxBxGxSxh).dtype
        k, v = (tuple(jnp.zeros((*rows, slots, h), dtype) for _ in range(layers)) for _ in range(2))
        return cls(k, v, jnp.full((*rows[:-1], slots, 1), -1, jnp.int32), jnp.int32(0))


class ApartLM(nnx.Module):
    """`LM.decode_step`, over a cache that is apart. Holds a copy of the layers' weights, but on one CPU device, where they are views."""

    vocabulary = LM.vocabulary

    def __init__(self, lm: LM):
        self.config, self.embed, self.final_norm, self.head = lm.config, lm.embed, lm.final_norm, lm.head
        graphdef, stacked = nnx.split(lm.blocks)
        leaves, treedef = jax.tree.flatten(stacked)
        self.blocks = nnx.List([nnx.merge(graphdef, treedef.unflatten(layer)) for layer in zip(*map(_layers, leaves))])

    def decode_step(
        self, tokens_B: jax.Array, positions_B: jax.Array, cache: ApartCache, past: ApartCache | None = None
    ) -> tuple[jax.Array, ApartCache]:
        """Logits (B, V) after one more token in every row, and the cache with it. Rows also see `past`, which is not written."""
        c, slot = self.config, cache.next_slot
        positions_Bx1 = positions_B[:, None]
        rope = rope_tables(positions_Bx1, rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
        cache = dataclasses.replace(cache, positions_BxSx1=write(cache.positions_BxSx1, positions_B[:, None, None], slot))
        written = _keys(cache, positions_Bx1)
        before = [()] * c.layers if past is None else zip(_keys(past, positions_Bx1))
        reaches = [FAR if window is None else window for window in c.windows or (None,) * c.layers]
        x_Bx1xD, kv = self.embed.of_bits(tokens_B[:, None]), []
        for block, *of_layer in zip(self.blocks, before, written, reaches):
            x_Bx1xD, *new = _layer(*nnx.split(block), c.dtype, x_Bx1xD, rope, *of_layer, slot)
            kv.append(new)
        hidden_BxD = self.final_norm(x_Bx1xD)[:, 0]
        return self.logits(hidden_BxD), ApartCache(*zip(*kv), cache.positions_BxSx1, slot + 1)

    def logits(self, hidden_BxD: jax.Array) -> jax.Array:
        """`LM.logits`. An embedding (V, D) is turned already, and would be turned back for a product with V behind."""
        if self.head is None and for_cpu():
            return self.vocabulary().logits_in_front(hidden_BxD[:, None])[..., 0].T
        return LM.logits(self, hidden_BxD)


def _keys(cache: ApartCache, positions_Bx1: jax.Array) -> list[Keys]:
    """Of each layer, as tokens at these positions see them."""
    positions_BxS = cache.positions_BxSx1[..., 0]
    distance_Bx1xS = distances(positions_Bx1, positions_BxS, positions_BxS[:, None] >= 0)
    return [Keys(k, v, distance_Bx1xS) for k, v in zip(cache.k_BxGxSxh, cache.v_BxGxSxh)]


@functools.partial(jax.jit, static_argnums=(0, 2))
def _layer(graphdef, params, dtype: str, x_Bx1xD, rope, before: tuple[Keys, ...], old: Keys, reach, slot):
    """The states after one layer, and its keys and values with those of the new token, which sees `before` too.

    A program of its own for whoever traces it, so that it is traced once and not for every layer.
    """
    new = []

    def read(q_BxGxRx1xh, k_BxGx1xh, v_BxGx1xh):
        new.extend((write(old.k_BxGxSxh, k_BxGx1xh, slot), write(old.v_BxGxSxh, v_BxGx1xh, slot)))
        return attend(q_BxGxRx1xh, [*before, Keys(*new, old.distance_BxTxS)], reach, dtype)

    x_Bx1xD, _, _ = nnx.merge(graphdef, params)(x_Bx1xD, rope, read, Line(None))
    return x_Bx1xD, *new


@jax.custom_batching.custom_vmap
def write(old_xSxh: jax.Array, new_xTxh: jax.Array, slot: jax.Array) -> jax.Array:
    """`new` in the place of what is at `slot` and after it."""
    return jax.lax.dynamic_update_slice_in_dim(old_xSxh, new_xTxh, slot, -2)


@write.def_vmap
def _write_side_by_side(size, batched, old, new, slot):
    # All write the same slot: one write with an axis more. vmap's own rule, for slots that differ, is a scatter.
    return write(*(x if is_batched else jnp.broadcast_to(x, (size, *x.shape)) for x, is_batched in zip((old, new), batched)), slot), True


def are_views(stacked: jax.Array) -> bool:
    """Whether the layers of a stack lie where it does, which they keep: on one CPU device, outside of a program."""
    return for_cpu() and not isinstance(stacked, jax.core.Tracer) and len(stacked.devices()) == 1


def _layers(stacked: jax.Array) -> tuple[jax.Array, ...]:
    bits = as_bits(stacked)
    if not are_views(stacked):
        return tuple(from_bits(bits[n]) for n in range(len(bits)))
    mesh = getattr(stacked.sharding, "mesh", None)  # what is computed of them will lie on it: programs are told apart by that
    (where,) = stacked.devices() if mesh is None else [replicated(mesh)]
    dtype = jax.eval_shape(from_bits, stacked).dtype
    return tuple(jax.device_put(layer.view(dtype), where, may_alias=True) for layer in np.asarray(bits))
