"""LoRA (Hu et al. 2021) and QLoRA (Dettmers et al. 2023) for LM-ft: the LM's weights are frozen, and low-rank maps beside its own learn.

qwix quantizes the frozen kernels; the low-rank part is ours, for qwix's LoraProvider (0.1.8) does not reach the layers here. It replaces
jnp.einsum and its like while a model is called, and makes the low-rank parameters on the first call. For that it hangs random keys on every
module, scalars, which the scan over stacked layers cannot slice. With parameters made by hand it still writes to the module at hand, from
inside the custom_vjp of layers.contract, and NNX refuses that; it is a copy of one layer, merged for the scan and dropped again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from radit_jax.errors import InputError
from radit_jax.models.layers import Linear, contract, dot
from radit_jax.types import PyTree

if TYPE_CHECKING:
    from radit_jax.models.lm import LM

MAPS = ("q", "k", "v", "o", "gate", "up", "down")  # the linear maps of a layer
NF4, INT8 = "nf4", "int8"
BLOCK = 64  # inputs that share a scale in nf4
Place = Callable[[str, tuple[int, ...], Callable[[tuple[slice, ...]], np.ndarray]], jax.Array]


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """The fields of lm_ft.lora."""

    rank: int = 0  # 0: all weights learn, and nothing here is used
    alpha: float = 32.0  # the low-rank maps are multiplied by alpha / rank
    targets: str = "q,v"  # regular expressions, separated by commas, of which one matches a whole name of MAPS
    quantize: str = ""  # the frozen kernels of the layers: "" as they are | int8 | nf4

    def __post_init__(self):
        if self.rank < 0:
            raise InputError(f"lm_ft.lora.rank is {self.rank}, expected 0 (off) or more")
        if self.quantize not in ("", INT8, NF4):
            raise InputError(f"lm_ft.lora.quantize is {self.quantize!r}, expected '', {INT8} or {NF4}")
        if self.quantize and not self.rank:
            raise InputError(
                f"lm_ft.lora.quantize is {self.quantize!r}, which needs lm_ft.lora.rank above 0: quantized weights do not learn"
            )
        if self.rank and not self.alpha > 0:
            raise InputError(f"lm_ft.lora.alpha is {self.alpha}, expected more than 0")
        for pattern in self.patterns if self.rank else ():
            if not any(_matches(pattern, name) for name in MAPS):
                raise InputError(f"lm_ft.lora.targets: {pattern!r} matches no linear map, there are {', '.join(MAPS)}")
        if self.quantize:
            _qwix()

    @property
    def patterns(self) -> list[str]:
        return [pattern.strip() for pattern in self.targets.split(",")]

    @property
    def maps(self) -> list[str]:
        """The linear maps that learn."""
        return [name for name in MAPS if any(_matches(pattern, name) for pattern in self.patterns)]


def _matches(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise InputError(f"lm_ft.lora.targets: {pattern!r} is no regular expression ({error})") from None


def _qwix() -> Any:
    try:
        import qwix  # slow, and only QLoRA needs it
    except ImportError:
        raise InputError("lm_ft.lora.quantize needs qwix, which is not installed (pip install 'radit-jax[lora]')") from None
    return qwix


# -- modules ----------------------------------------------------------------------------------------------------------------------------


class Quantized(nnx.Module):
    """A frozen kernel (…, in, out) in few bits: `kernel[...]` widens it to float32.

    int8 has one scale for every output, nf4 one for every output and BLOCK inputs (or as many below that as divide them), in float32.
    Two codes of nf4 lie in one byte, inputs beside each other: 4-bit arrays are not everywhere stored in 4 bits.
    """

    def __init__(self, kernel: jax.Array, qtype: str):
        self.qtype = qtype
        codes, scales = jax.jit(_quantize, static_argnums=1)(kernel, qtype)
        self.codes, self.scales = nnx.Param(codes), nnx.Param(scales)

    def __getitem__(self, _: Any) -> jax.Array:
        codes = self.codes[...]
        if self.qtype == NF4:
            pairs = jnp.stack([codes & 15, codes >> 4], axis=-2)
            codes = pairs.reshape(*codes.shape[:-2], -1, codes.shape[-1])
        qwix = _qwix()
        return qwix.dequantize(qwix.QArray(codes, self.scales[...], qtype=self.qtype))


def _quantize(kernel_LxIxO: jax.Array, qtype: str) -> tuple[jax.Array, jax.Array]:
    """(codes, scales), layer by layer: nf4 compares every weight with sixteen levels."""
    tiles = {0: math.gcd(kernel_LxIxO.shape[1], BLOCK)} if qtype == NF4 else None

    def one(kernel_IxO: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = _qwix().quantize(kernel_IxO.astype(jnp.float32), qtype, channelwise_axes=(1,), tiled_axes=tiles)
        if qtype != NF4:
            return found.qvalue, found.scale
        codes = found.qvalue.astype(jnp.uint8)
        return codes[0::2] | codes[1::2] << 4, found.scale

    return jax.lax.map(one, kernel_LxIxO)


class Frozen(Linear):
    """A linear map whose kernel, as it is or Quantized, does not learn."""

    def __init__(self, linear: Linear, quantize: str):
        self.dtype, self.bias = linear.dtype, linear.bias
        self.kernel = Quantized(linear.kernel[...], quantize) if quantize else linear.kernel

    def product(self, x: jax.Array) -> jax.Array:
        # For the backward pass the kernel is kept as it is stored, and widened once more there.
        return jax.checkpoint(super().product, prevent_cse=False)(x)


class LoraLinear(Frozen):
    """y = x @ kernel + alpha / rank · (x @ a) @ b (+ bias), of which a (…, in, rank) and b (…, rank, out) learn. b begins at zero."""

    def __init__(self, linear: Linear, quantize: str, a: jax.Array, b: jax.Array, scale: float):
        super().__init__(linear, quantize)
        self.lora_a, self.lora_b, self.scale = nnx.LoRAParam(a), nnx.LoRAParam(b), scale

    def product(self, x: jax.Array) -> jax.Array:
        y = super().product(x)
        low = dot(x, self.lora_a[...], self.dtype, self.dtype)
        return y + (self.scale * dot(low, self.lora_b[...], self.dtype)).astype(y.dtype)

    def change(self) -> jax.Array:
        """What is added to the kernels (L, in, out), float32."""
        return self.scale * contract("lxr,lry->lxy", self.lora_a[...], self.lora_b[...], "float32")


# -- of an LM ---------------------------------------------------------------------------------------------------------------------------


def _here(path: str, shape: tuple[int, ...], read: Callable[[tuple[slice, ...]], np.ndarray]) -> jax.Array:
    return jnp.asarray(read((slice(None),) * len(shape)))


def adapted(lm: LM, options: LoraOptions, *, seed: int = 0, place: Place = _here) -> LM:
    """The LM with low-rank maps beside the targets and its layers' kernels quantized, as `options` says; with rank 0, as it is.

    It computes what the LM computed (with its kernels quantized, about that). The module is taken over, and so are its arrays. `place` puts
    the new parameters on their devices. InputError for a rank that is no lower than a kernel's.
    """
    if not options.rank:
        return lm
    for path, owner, name, linear in _linears(lm.blocks, "blocks"):
        if name in options.maps:
            rng = np.random.default_rng([seed, MAPS.index(name)])
            low_rank = _low_rank(path, linear.kernel.shape, options.rank, rng, place)
            setattr(owner, name, LoraLinear(linear, options.quantize, *low_rank, options.alpha / options.rank))
        elif options.quantize:
            setattr(owner, name, Frozen(linear, options.quantize))
    return lm


def _low_rank(path: str, shape: tuple[int, ...], rank: int, rng: np.random.Generator, place: Place) -> list[jax.Array]:
    """[a, b] for a kernel of this shape."""
    layers, inputs, outputs = shape
    if rank >= (full := min(inputs, outputs)):
        raise InputError(f"lm_ft.lora.rank is {rank}, expected less than the {full} of {path} ({inputs} × {outputs})")
    a = rng.standard_normal((layers, inputs, rank), np.float32) * np.float32(inputs**-0.5)
    b = np.zeros((layers, rank, outputs), np.float32)
    return [place(f"{path}/{name}", whole.shape, whole.__getitem__) for name, whole in (("lora_a", a), ("lora_b", b))]


def split(lm: LM) -> tuple[Any, ...]:
    """(graphdef, parameters) of an LM; of an adapted one (graphdef, what learns, what is frozen)."""
    return nnx.split(lm, nnx.LoRAParam, ...) if is_adapted(lm.blocks) else nnx.split(lm)


def merged(lm: LM, dtype: str = "") -> LM:
    """The plain LM that computes what an adapted one does, its kernels in `dtype` (default: that of its parameters).

    Any other LM as it is. The module is taken over.
    """
    if not is_adapted(lm.blocks):
        return lm
    plain = nnx.eval_shape(lambda: type(lm)(lm.config, rngs=nnx.Rngs(0)))
    empty = {path: linear for path, _, _, linear in _linears(plain.blocks, "blocks")}
    for path, owner, name, linear in _linears(lm.blocks, "blocks"):
        if isinstance(linear, Frozen):
            empty[path].kernel, empty[path].bias = nnx.Param(_merged_kernel(linear, dtype or lm.config.param_dtype)), linear.bias
            setattr(owner, name, empty[path])
    return lm


def _merged_kernel(linear: Frozen, dtype: str) -> jax.Array:
    graphdef, state = nnx.split(linear)
    where = (linear.kernel.codes if isinstance(linear.kernel, Quantized) else linear.kernel)[...].sharding

    def kernel(state: PyTree) -> jax.Array:
        linear = nnx.merge(graphdef, state)
        wide = linear.kernel[...].astype(jnp.float32)
        return (wide + linear.change() if isinstance(linear, LoraLinear) else wide).astype(dtype)

    return jax.jit(kernel, out_shardings=where)(state)


def is_adapted(blocks: nnx.Module) -> bool:
    """Whether the layers hold frozen maps."""
    return any(isinstance(linear, Frozen) for _, _, _, linear in _linears(blocks, ""))


def summary(learned: PyTree, frozen: PyTree) -> str:
    """How many parameters learn, and what the others take."""
    count, held = (sum(getattr(leaf, of) for leaf in jax.tree.leaves(tree)) for tree, of in ((learned, "size"), (frozen, "nbytes")))
    return f"{count:,} parameters of low-rank maps learn, beside {held:,} bytes that are frozen"


def _linears(module: nnx.Module, path: str) -> Iterator[tuple[str, nnx.Module, str, Linear]]:
    """(path, owner, name, map) of every linear map in a module; each may be replaced as it comes, and is let go then."""
    for name in list(vars(module)):
        child = vars(module)[name]
        if isinstance(child, Linear):
            yield f"{path}/{name}", module, name, child
        elif isinstance(child, nnx.Module):
            yield from _linears(child, f"{path}/{name}")
