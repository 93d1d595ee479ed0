"""Flash attention over whole rows: kernels that never hold a row's (T, T) scores, forward or backward.

Which kernel runs is said by name in LmConfig, and chosen outside of the model by the platform of the mesh's devices, so that a program
compiled for hardware that is not there gets that hardware's kernel:

- "splash", on TPU: `jax.experimental.pallas.ops.tpu.splash_attention`. It takes segment ids, causal and sliding-window masks and grouped
  query heads as they are, and skips the blocks that the mask empties.
- "cudnn", on GPU of the Hopper generation and later: cuDNN's, which is given the segments as ragged sequences and reads nothing between
  them. JAX's public `jax.nn.dot_product_attention` would hand them over as a dense (B, 1, T, T) bias, so its inner function is called. It
  knows no float32.
- "triton", on any GPU, and where cuDNN cannot: `jax.experimental.pallas.ops.gpu.attention`. It takes segment ids; keys and values of a
  group are repeated for its query heads (linear in T).

Packed instances are contiguous in a row with positions ascending, so that causal by index among equal segment ids is causal by position.
Padding (segment 0) sees itself: finite, and seen by nothing else. What a kernel cannot do (`obstacle`) is read by the next one of its
platform, and in the end by the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from radit_jax.errors import InputError
from radit_jax.sharding import DATA, MODEL

if TYPE_CHECKING:
    from radit_jax.models.attention import Segments
    from radit_jax.models.lm import LmConfig

REFERENCE = "reference"
INTERPRETED = "_interpreted"  # the kernel run by Pallas's interpreter: on any platform, slowly, for tests
KINDS = (REFERENCE, "splash", "cudnn", "triton", "splash" + INTERPRETED, "triton" + INTERPRETED)
# As a device names its platform: its kernels, the first that can is taken; elsewhere the reference.
PLATFORMS = {"tpu": ("splash",), "gpu": ("cudnn", "triton"), "cuda": ("cudnn", "triton")}
BLOCK = 128  # tokens: the smallest tile of splash and triton
# Tokens of a segment on average, for which cuDNN is given a table: its work grows with the table, a tenth of a step from 128 to 16.
RAGGED = (128, 32)
SPLASH_BLOCKS = (512, 256, BLOCK)  # the largest that divides the row


# -- the choice -------------------------------------------------------------------------------------------------------------------------


def kernel_for(platform: str, setting: str = "auto") -> str:
    """The kernel of a platform (`mesh.devices.flat[0].platform`); a `setting` other than "auto" is taken at its word.

    InputError for a kernel that does not exist, or not on this platform.
    """
    own = (*PLATFORMS.get(platform, ()), REFERENCE)
    if setting not in ("auto", *KINDS):
        raise InputError(f"lm.attention is {setting!r}, expected auto, {REFERENCE}, splash (TPU), cudnn or triton (GPU)")
    if setting not in ("auto", *own) and not setting.endswith(INTERPRETED):
        raise InputError(f"lm.attention is {setting!r}, which does not run on {platform}; expected {' or '.join(('auto', *own))}")
    return own[0] if setting == "auto" else setting


def choose(kernel: str, config: LmConfig, row_length: int, model: int = 1) -> str:
    """What reads rows of this length, with heads over `model` devices: the kernel, the next one of its platform, or "reference"."""
    kernels = next((names[names.index(kernel) :] for names in PLATFORMS.values() if kernel in names), (kernel,))
    return next((name for name in kernels if not obstacle(name, config, row_length, model)), REFERENCE)


def obstacle(kernel: str, config: LmConfig, row_length: int, model: int = 1) -> str | None:
    """Why `kernel` does not read such rows; None where it does (or is the reference)."""
    if kernel == REFERENCE:
        return None
    reaches = _reaches(config, row_length)
    if row_length % BLOCK:
        return f"rows of {row_length} tokens are not a multiple of {BLOCK}"
    if len(reaches) > 1:
        return "the layers' sliding windows differ"
    if kernel == "cudnn" and config.dtype != "bfloat16":
        return f"cuDNN's kernel knows no {config.dtype}"
    if kernel == "cudnn" and not _ragged_there():
        return "cuDNN's kernel for ragged rows is for the Hopper generation and later"
    if kernel.startswith(("cudnn", "triton")) and reaches != {None}:
        return f"the kernel for GPUs is given no sliding window, and the layers have one of {max(reaches)} tokens"
    if config.heads % math.lcm(config.kv_heads, model):
        return f"{config.heads} heads in {config.kv_heads} groups do not divide over {model} devices"
    return None


def whole_blocks(length: int) -> int:
    """The next length of a row that kernels read."""
    return -(-length // BLOCK) * BLOCK


def reader(config: LmConfig, rows: Segments) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None:
    """Attention within these rows as a function of q (B, G, R, T, h) and k, v (B, G, T, h); None where the reference must read them."""
    row_length = rows.ids_BxT.shape[-1]
    model = jax.sharding.get_abstract_mesh().shape.get(MODEL, 1)
    kernel = choose(config.attention, config, row_length, model)
    if kernel == REFERENCE:
        return None
    (window,) = _reaches(config, row_length)
    how = {"kernel": kernel, "window": window, "single": rows.single, "dtype": config.dtype}
    return functools.partial(attend, segment_ids_BxT=rows.ids_BxT, **how)


@functools.cache
def _ragged_there() -> bool:
    """Whether cuDNN's kernel can be called: all GPUs here are of the Hopper generation or a later one, and this JAX has the function."""
    if importlib.util.find_spec("jax._src.cudnn.fused_attention_stablehlo") is None:
        return False
    found = [device.compute_capability for device in jax.local_devices() if device.platform == "gpu"]
    return bool(found) and all(int(capability.split(".")[0]) >= 9 for capability in found)


def _reaches(config: LmConfig, row_length: int) -> set[int | None]:
    """The different sliding windows among the layers, None for those that reach over the whole row."""
    return {window if window is not None and window < row_length else None for window in config.windows or (None,)}


# -- attention --------------------------------------------------------------------------------------------------------------------------


def attend(
    q_BxGxRxTxh: jax.Array,
    k_BxGxTxh: jax.Array,
    v_BxGxTxh: jax.Array,
    *,
    segment_ids_BxT: jax.Array,
    kernel: str,
    window: int | None = None,
    single: bool = False,
    dtype: str,
) -> jax.Array:
    """softmax(q k / sqrt(h)) v within rows, causal, within segments, less than `window` tokens back. (B, G, R, T, h) in `dtype`.

    `single` says that every row is one segment with padding after it.

    XLA cannot partition a kernel: under a mesh (`jax.set_mesh`) every device runs it on its own rows ("data") and groups ("model").
    """
    name = kernel.removesuffix(INTERPRETED)
    run = functools.partial(KERNELS[name], window=window, **({"single": single} if name == "cudnn" else {"interpret": kernel != name}))
    if dtype == "float32":  # is meant: no TF32 (GPU), no single bfloat16 pass (TPU)
        run = functools.partial(_exact, run)
    q, k, v = (x.astype(dtype) for x in (q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh))
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(q, k, v, segment_ids_BxT)
    shape, (B, G, R, T, h) = mesh.shape, q.shape
    # More devices than groups: a group's keys and values go to several, each with a share of its query heads.
    copies = math.lcm(G, shape.get(MODEL, 1)) // G
    k, v = (jnp.repeat(x, copies, axis=1) for x in (k, v))
    rows = P(DATA if DATA in shape and B % shape[DATA] == 0 else None)
    groups = P(*rows, MODEL if MODEL in shape else None)
    run = jax.shard_map(run, in_specs=(groups, groups, groups, rows), out_specs=groups, check_vma=False)
    return run(q.reshape(B, G * copies, R // copies, T, h), k, v, segment_ids_BxT).reshape(B, G, R, T, h)


def _splash(q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh, segment_ids_BxT, *, window: int | None, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    B, G, R, T, h = q_BxGxRxTxh.shape
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)
    block = next(size for size in SPLASH_BLOCKS if T % size == 0)
    one_row = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * (G * R)),
        block_sizes=splash.BlockSizes(*[block] * 8),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = (q_BxGxRxTxh.astype(jnp.float32) * h**-0.5).astype(q_BxGxRxTxh.dtype)  # the kernel does not
    rows = jax.vmap(lambda q, k, v, ids: one_row(q, k, v, splash.SegmentIds(ids, ids)))
    return rows(scaled.reshape(B, G * R, T, h), k_BxGxTxh, v_BxGxTxh, segment_ids_BxT).reshape(B, G, R, T, h)


def _triton(q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh, segment_ids_BxT, *, window: None, interpret: bool) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention as triton

    B, G, R, T, h = q_BxGxRxTxh.shape
    q = q_BxGxRxTxh.reshape(B, G * R, T, h).swapaxes(1, 2)
    k, v = (jnp.repeat(x, R, axis=1).swapaxes(1, 2) for x in (k_BxGxTxh, v_BxGxTxh))
    # A tile of q and two stages of k and v stay within 80 KB of shared memory.
    block = min(BLOCK, max(32, 2**14 // (h * q.dtype.itemsize) & -32))
    blocks = triton.BlockSizes(block, block, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32)
    out = triton.mha(q, k, v, segment_ids_BxT, h**-0.5, True, blocks, interpret=interpret)
    return out.swapaxes(1, 2).reshape(B, G, R, T, h)


def _cudnn(q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh, segment_ids_BxT, *, window: None, single: bool) -> jax.Array:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    B, G, R, T, h = q_BxGxRxTxh.shape

    def run(q, k, v, lengths, starts=None):
        heads_last = (q.reshape(B, G * R, T, h).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
        where = {"q_seqlen": lengths, "kv_seqlen": lengths, "q_offsets": starts, "kv_offsets": starts}
        out = cudnn.dot_product_attention(*heads_last, **where, scale=h**-0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL)
        return out.swapaxes(1, 2).reshape(B, G, R, T, h)

    def by_table(most, q, k, v, ids_BxT):
        starts_BxM1, lengths_BxM = ragged(ids_BxT, most)
        return run(q, k, v, lengths_BxM, starts_BxM1)

    if single:  # prompts side by side, by vmap: JAX's batching rule knows no offsets. What padding reads is anything.
        real_BxT = segment_ids_BxT > 0
        out = run(q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh, jnp.sum(real_BxT, axis=1, dtype=jnp.int32))
        return jnp.where(real_BxT[:, None, None, :, None], out, 0)
    # The smallest table that holds all segments of every row; where none does, the other kernel.
    tables = [max(T // tokens, 2) for tokens in RAGGED]
    needed = jnp.max(_segment_numbers(segment_ids_BxT)[:, -1]) + 1
    ways = [*(functools.partial(by_table, most) for most in tables), functools.partial(_triton, window=None, interpret=False)]
    way = sum((needed > most).astype(jnp.int32) for most in tables)
    return jax.lax.switch(way, ways, q_BxGxRxTxh, k_BxGxTxh, v_BxGxTxh, segment_ids_BxT)


def ragged(segment_ids_BxT: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """(starts_BxM1, lengths_BxM), int32, of the at most `most` runs of equal ids in each row, padding being one; −1 where there is none.

    starts have one column more, as cuDNN wants them.
    """
    of_segment_BxTxM = _segment_numbers(segment_ids_BxT)[..., None] == jnp.arange(most)[None, None]
    lengths_BxM = jnp.sum(of_segment_BxTxM, axis=1, dtype=jnp.int32)
    starts_BxM = jnp.cumsum(lengths_BxM, axis=1) - lengths_BxM
    starts_BxM, lengths_BxM = (jnp.where(lengths_BxM > 0, x, -1) for x in (starts_BxM, lengths_BxM))
    return jnp.pad(starts_BxM, [(0, 0), (0, 1)], constant_values=-1), lengths_BxM


def _segment_numbers(segment_ids_BxT: jax.Array) -> jax.Array:
    """Of each token, how many segments stand before its own."""
    return jnp.cumsum(jnp.diff(segment_ids_BxT, axis=1, prepend=segment_ids_BxT[:, :1]) != 0, axis=1, dtype=jnp.int32)


KERNELS = {"splash": _splash, "cudnn": _cudnn, "triton": _triton}


# -- float32 ----------------------------------------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exact(run: Callable, q, k, v, segment_ids_BxT) -> jax.Array:
    """`run` with all products in full precision, those of its backward pass too: it is traced later, when no `with` around `run` holds."""
    with jax.default_matmul_precision("highest"):
        return run(q, k, v, segment_ids_BxT)


def _exact_forward(run, q, k, v, segment_ids_BxT):
    with jax.default_matmul_precision("highest"):
        return jax.vjp(lambda q, k, v: run(q, k, v, segment_ids_BxT), q, k, v)


def _exact_backward(run, pull, cotangent):
    with jax.default_matmul_precision("highest"):
        return (*pull(cotangent), None)


_exact.defvjp(_exact_forward, _exact_backward)
