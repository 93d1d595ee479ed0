"""Flash kernels: the reference's values and gradients, on any mesh, and the platform's own kernel in what is compiled for it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax.models import flash
from radit_jax.models.attention import FAR, Keys, attend, distances

T = 256  # two blocks
LENGTHS = ((70, 120, 40, -26), (T,))  # packed instances across the blocks' border and padding; one instance alone
GPU = any(device.platform == "gpu" for device in jax.devices())
KERNELS = [
    "splash_interpreted",
    "triton_interpreted",
    pytest.param("triton", marks=pytest.mark.skipif(not GPU, reason="no GPU here")),
]


def rows() -> tuple[jax.Array, jax.Array]:
    """Positions and segment ids (2, T)."""
    positions = np.stack([np.concatenate([np.arange(abs(n)) for n in row]) for row in LENGTHS])
    segments = np.stack([np.concatenate([np.full(abs(n), i + 1 if n > 0 else 0) for i, n in enumerate(row)]) for row in LENGTHS])
    return jnp.asarray(positions, jnp.int32), jnp.asarray(segments, jnp.int32)


def operands(G: int = 2, R: int = 2, h: int = 16, dtype: str = "float32") -> tuple[jax.Array, ...]:
    shapes = ((2, G, R, T, h), (2, G, T, h), (2, G, T, h))
    return tuple(jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes))


def by_reference(q, k, v, window: int | None = None, dtype: str = "float32"):
    positions, segments = rows()
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]
    return attend(q, [Keys(k, v, distances(positions, positions, same))], FAR if window is None else window, dtype)


def by_flash(q, k, v, kernel: str, window: int | None = None, dtype: str = "float32"):
    return flash.attend(q, k, v, segment_ids_BxT=rows()[1], kernel=kernel, window=window, dtype=dtype)


def values_and_gradients(read, *operands):
    """What the real tokens read, and the gradients of a function of it. Padding reads something finite."""

    def value(*operands):
        out = read(*operands).astype(jnp.float32)
        real = jnp.where((rows()[1] > 0)[:, None, None, :, None], out, 0)
        return jnp.sum(jnp.sin(3 * real)), (out, real)

    (_, (out, real)), grads = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*operands)
    assert jnp.isfinite(out).all()
    return dict(zip(("out", "q", "k", "v"), (real, *grads), strict=True))


def assert_close(found, expected, tolerance: float = 1e-5) -> None:
    """Equal to a part `tolerance` of each array's largest value."""
    for name, array in expected.items():
        wanted = np.asarray(array, np.float32)
        assert np.abs(np.asarray(found[name], np.float32) - wanted).max() <= tolerance * np.abs(wanted).max(), name


# -- parity -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("h", [16, 64, 128])
def test_values_and_gradients_equal_the_references(kernel, h):
    assert_close(
        values_and_gradients(functools.partial(by_flash, kernel=kernel), *operands(h=h)),
        values_and_gradients(by_reference, *operands(h=h)),
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_differs_from_the_reference_by_its_rounding(kernel):
    bits = operands(dtype="bfloat16")
    exact = values_and_gradients(by_reference, *(x.astype("float32") for x in bits))
    assert_close(values_and_gradients(functools.partial(by_flash, kernel=kernel, dtype="bfloat16"), *bits), exact, 3e-2)


@pytest.mark.parametrize("window", [2, 150])
def test_a_sliding_window_is_the_references(window):
    windowed = functools.partial(by_reference, window=window)
    found = values_and_gradients(functools.partial(by_flash, kernel="splash_interpreted", window=window), *operands())
    assert_close(found, values_and_gradients(windowed, *operands()))
    with pytest.raises(AssertionError):
        assert_close(found, values_and_gradients(functools.partial(by_reference, window=window + 1), *operands()))
