"""The pieces every transformer here is made of: one contraction rule, linear maps, embeddings, norms, rotary positions.

Modules hold their parameters with any leading axes (a stack of layers) and are called on one layer's slice of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from radit_jax.sharding import DATA

DOT = "dot"  # the name under which the remat policy "dots" keeps the outputs of linear maps


# -- contraction --------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def contract(spec: str, a: jax.Array, b: jax.Array, dtype: str, out: str = "float32") -> jax.Array:
    """Two-operand einsum: operands in `dtype`, sums in float32, result in `out`; the same holds for both dots of its gradient.

    Plain autodiff would feed the float32 cotangent into a dot with a bfloat16 operand, which XLA widens: twice slower on CPUs,
    and no use of the matrix units elsewhere. Every letter of an operand must be in the other operand or in the result.
    """
    # Where float32 is asked for, it is meant: no TF32 (GPU) and no single bfloat16 pass (TPU).
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None
    # Matrix units sum in float32 and round what they write; a CPU's library sums in what it writes, and there float32 is faster too.
    written = "float32" if dtype == "float32" or for_cpu() else out
    a, b = a.astype(dtype), b.astype(dtype)
    if dtype == "bfloat16" and for_cpu():
        spec, a = _summed_last(spec, a)
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=written).astype(out)


def _summed_last(spec: str, a: jax.Array) -> tuple[str, jax.Array]:
    """The same einsum with the summed axes of `a` behind its others, as XLA's CPU library for bfloat16 wants them.

    A product of another form is widened to float32, at a third of the speed: those for gradients of kernels, a third of a training step.
    """
    operands, letters = spec.split("->")
    a_letters, b_letters = operands.split(",")
    turned = "".join(sorted(a_letters, key=lambda letter: letter not in letters))
    if turned == a_letters:
        return spec, a
    return f"{turned},{b_letters}->{letters}", _laid_out(jnp.einsum(f"{a_letters}->{turned}", a))


def _laid_out(x: jax.Array) -> jax.Array:
    """x, in memory as its axes stand: XLA would fold a transposition into the product that reads it, and drops optimization barriers first.

    What it folds nothing through is a loop, whose turns it must not know: one (or two, which write the same, where x begins with NaN).
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return x  # devices would have to agree on the turns
    turns = 1 + jnp.isnan(x[(0,) * x.ndim]).astype(jnp.int32)
    return jax.lax.fori_loop(0, turns, lambda _, __: x, jnp.zeros_like(x))


def _contract_forward(spec, a, b, dtype, out):
    # () for an operand that is to have a gradient, None for a frozen one: the structure is known while the backward pass is traced.
    wanted = tuple(() if operand.perturbed else None for operand in (a, b))
    return contract(spec, a.value, b.value, dtype, out), (a.value, b.value, wanted)


def _contract_backward(spec, dtype, out, operands, cotangent):
    a, b, (a_wanted, b_wanted) = operands
    operands, letters = spec.split("->")
    a_letters, b_letters = operands.split(",")
    a_bar = b_bar = None
    if a_wanted is not None:
        a_bar = _contract_into(a_letters, (letters, cotangent), (b_letters, b), dtype, a.dtype.name)
    if b_wanted is not None:
        b_bar = _contract_into(b_letters, (a_letters, a), (letters, cotangent), dtype, b.dtype.name)
    return a_bar, b_bar


def _contract_into(letters: str, left: tuple[str, jax.Array], right: tuple[str, jax.Array], dtype: str, out: str) -> jax.Array:
    """Contracts to `letters` with the operand first that owns its first unshared letter, so that the result needs no transposition.

    XLA folds a transposed result into a dot form that its CPU runtime refuses in mixed bfloat16 / float32.
    """
    first = next(letter for letter in letters if not (letter in left[0] and letter in right[0]))
    (a_letters, a), (b_letters, b) = (left, right) if first in left[0] else (right, left)
    return contract(f"{a_letters},{b_letters}->{letters}", a, b, dtype, out)


contract.defvjp(_contract_forward, _contract_backward, symbolic_zeros=True)


def dot(x: jax.Array, kernel: jax.Array, dtype: str, out: str = "float32", *, transposed: bool = False) -> jax.Array:
    """x (..., in) @ kernel (in, out), or (out, in) if `transposed`; operands in `dtype`, sums in float32, result in `out`.

    With one axis of rows, the product for the gradient of the kernel reads x as it lies. With several XLA transposes x before it: on a CPU
    a seventh of an LM-ft step.
    """
    y = contract("mx,yx->my" if transposed else "mx,xy->my", x.reshape(-1, x.shape[-1]), kernel, dtype, out)
    return y.reshape(*x.shape[:-1], -1)


def as_bits(x: jax.Array) -> jax.Array:
    """A bfloat16 array on a CPU as the integers it is stored as; anything else as it is. No gradient passes.

    XLA's CPU code cannot slice bfloat16: it widens the *whole* array to float32 and narrows every slice, four times the time of a decoding
    step's products and twice the memory of the weights. Integers are sliced as they are.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 and for_cpu() else x


@jax.custom_vjp
def kept(x: jax.Array) -> jax.Array:
    """x, which the remat policy "dots" keeps for the backward pass: on a CPU as bits, for XLA stacks bfloat16 value by value there."""
    return _kept(x)


def _kept(x: jax.Array) -> jax.Array:
    return from_bits(checkpoint_name(as_bits(x), DOT))


kept.defvjp(lambda x: (_kept(x), None), lambda _, cotangent: (cotangent,))


def platform() -> str:
    """What is traced is for: the mesh in context may be of devices that are not here (a plan for TPUs, made on a CPU)."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def for_cpu() -> bool:
    """Whether what is traced is for a CPU."""
    return platform() == "cpu"


def from_bits(x: jax.Array) -> jax.Array:
    """The array that `as_bits` was given, or a slice of it."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def rows_apart(x: jax.Array) -> jax.Array:
    """x (B, ...) with its rows over the "data" axis of the mesh in context (`jax.set_mesh`) and the rest whole; without a mesh, x as it is.

    Said of the states between layers. Left to itself the compiler takes their layout from the embedding, whose D is cut over "data": every
    device would then compute a part of D for all rows, and sum activations of the whole batch in every layer.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if DATA not in mesh.auto_axes or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, P(DATA, *[None] * (x.ndim - 1)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def over_rows(vector_D: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The vector (a bias, a scale) on every row of an array of this shape (…, D).

    Its gradient is the sum over all rows. XLA's CPU code for such a sum goes down every column, and computes what is summed on the way: a
    third of an R-ft step. As a product with ones it is fast.
    """
    return jnp.broadcast_to(vector_D.reshape((1,) * (len(shape) - 1) + (-1,)), shape)


def _over_rows_forward(vector_D, shape):
    return over_rows(vector_D, shape), None


def _over_rows_backward(shape, _, cotangent):
    rows_MxD = cotangent.reshape(-1, shape[-1])
    if not for_cpu():
        return (jnp.sum(rows_MxD, axis=0),)
    ones_M = jnp.ones(len(rows_MxD), rows_MxD.dtype)
    return (contract("m,md->d", ones_M, rows_MxD, "float32").astype(cotangent.dtype),)


over_rows.defvjp(_over_rows_forward, _over_rows_backward)


# -- modules ------------------------------------------------------------------------------------------------------------------------


class Linear(nnx.Module):
    """y = x @ kernel (+ bias), kernel (in, out); the result is in the compute dtype."""

    def __init__(self, shape: tuple[int, ...], *, bias: bool = False, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        fan_in = shape[-2]
        self.dtype = dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * np.asarray(fan_in**-0.5, param_dtype))
        self.bias = nnx.Param(jnp.zeros((*shape[:-2], shape[-1]), param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.finished(self.product(x))

    def product(self, x: jax.Array) -> jax.Array:
        """x @ kernel, as `written`."""
        return dot(x, self.kernel[...], self.dtype, self.written)

    @property
    def written(self) -> str:
        """The dtype of the product: the compute dtype; float32 where a bias is still to be added."""
        return self.dtype if self.bias is None else "float32"

    def finished(self, y: jax.Array) -> jax.Array:
        """The result, of the product."""
        if self.bias is not None:
            y = y + over_rows(self.bias[...].astype(y.dtype), y.shape)
        return kept(y.astype(self.dtype))


def side_by_side(linears: Sequence[Linear], x: jax.Array) -> list[jax.Array]:
    """What each of these maps, alike but in their width, makes of x. On one CPU device by one product, of their kernels side by side.

    Products are slow where a kernel is narrow, as those of keys and values are where heads share them (576 → 192 for SmolLM2-135M): scoring
    takes 2 to 10 % less processor time on Zen 3, in three runs by turns; training and decoding take the same.
    """
    first = linears[0]
    if not for_cpu() or jax.sharding.get_abstract_mesh().size > 1 or any(type(linear) is not Linear for linear in linears):
        return [linear(x) for linear in linears]
    kernels = [linear.kernel[...] for linear in linears]
    ends = np.cumsum([kernel.shape[-1] for kernel in kernels])[:-1].tolist()
    y = dot(x, jnp.concatenate(kernels, axis=-1), first.dtype, first.written)
    return [linear.finished(part) for linear, part in zip(linears, jnp.split(y, ends, axis=-1))]


class Embed(nnx.Module):
    """Rows of a table (V, D), in the compute dtype."""

    def __init__(self, shape: tuple[int, int], *, dtype: str, param_dtype: str, rngs: nnx.Rngs):
        self.dtype = dtype
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), shape, param_dtype) * np.asarray(0.02, param_dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return jnp.take(self.embedding[...], tokens, axis=0, mode="clip").astype(self.dtype)

    def of_bits(self, tokens: jax.Array) -> jax.Array:
        """The same, but no gradient passes, and in a loop on a CPU the table is not widened before it."""
        return from_bits(jnp.take(as_bits(self.embedding[...]), tokens, axis=0, mode="clip")).astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, computed in float32, returned in `dtype`."""

    def __init__(self, shape: tuple[int, ...], *, eps: float, dtype: str, param_dtype: str):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(shape, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * over_rows(self.scale[...].astype(jnp.float32), wide.shape)).astype(self.dtype)


class GatedMlp(nnx.Module):
    """down(silu(gate(x)) * up(x)), the SwiGLU of the Llama family."""

    def __init__(self, stack: tuple[int, ...], width: int, inner: int, *, bias: bool, **kinds: Any):
        self.gate = Linear((*stack, width, inner), bias=bias, **kinds)
        self.up = Linear((*stack, width, inner), bias=bias, **kinds)
        self.down = Linear((*stack, inner, width), bias=bias, **kinds)

    def __call__(self, x: jax.Array) -> jax.Array:
        # In float32, rounded once: a CPU has no bfloat16 but in products, and XLA rounds there after every operation.
        gate, up = (linear(x).astype(jnp.float32) for linear in (self.gate, self.up))
        return self.down((jax.nn.silu(gate) * up).astype(x.dtype))


# -- rotary positions ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How a checkpoint stretches its rotary frequencies: "linear", "llama3", or "table" (GGUF files carry the divisors themselves)."""

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192
    divisors: tuple[float, ...] = ()


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position for each of the head_dim / 2 pairs, float32."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        pass
    elif scaling.kind == "linear":
        frequencies = frequencies / scaling.factor
    elif scaling.kind == "table":
        frequencies = frequencies / np.asarray(scaling.divisors, np.float64)
    elif scaling.kind == "llama3":
        frequencies = _llama3(frequencies, scaling)
    else:
        raise ValueError(f"rope scaling {scaling.kind!r} is none of linear, llama3, table")
    return frequencies.astype(np.float32)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, and those between blended linearly (Llama 3.1)."""
    turns = scaling.original_positions * frequencies / (2 * math.pi)  # full turns within the original context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_tables(positions_BxT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position times frequency, each (B, T, head_dim) float32: both members of a pair turn by the same angle."""
    angles = positions_BxT.astype(jnp.float32)[..., None] * jnp.asarray(frequencies)[None, None]
    cos, sin = (jnp.concatenate([table, table], axis=-1) for table in (jnp.cos(angles), jnp.sin(angles)))
    return cos, sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + h/2) of the last axis by their angles: the rotate-half layout of Hugging Face checkpoints.

    x is (B, T, heads, h); cos and sin are (B, T, h).
    """
    wide = x.astype(jnp.float32)
    if for_cpu():
        # XLA's CPU code for halves that change places goes value by value; as a product with a signed permutation it is fast, and exact.
        other = contract("bthi,ij->bthj", x, jnp.asarray(_other_half(x.shape[-1]), x.dtype), x.dtype.name)
    else:
        first, second = jnp.split(wide, 2, axis=-1)
        other = jnp.concatenate([-second, first], axis=-1)
    return (wide * cos[:, :, None] + other * sin[:, :, None]).astype(x.dtype)


def _other_half(h: int) -> np.ndarray:
    """(h, h): x @ it = (−second half of x, first half)."""
    half = np.eye(h // 2)
    return np.block([[np.zeros_like(half), half], [-half, np.zeros_like(half)]])
