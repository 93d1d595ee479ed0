"""Flash kernels: the reference's values and gradients, on any mesh, and the platform's own kernel in what is compiled for it."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from jax.extend import core

from radit_jax import sharding
from radit_jax.errors import InputError
from radit_jax.models import flash
from radit_jax.models.attention import FAR, Keys, attend, distances
from radit_jax.models.lm import LM, LmConfig
from radit_jax.weights.lm import abstract_lm

T, SHORT = 384, 128  # tokens: three blocks, one
LENGTHS = ((100, 170, 80, -34), (T,))  # packed instances across the blocks' border and padding; one instance alone
SMALL = LmConfig(vocab_size=41, width=16, layers=2, heads=4, kv_heads=2, head_dim=16, mlp_width=24, rope_theta=100.0)
GPU = any(device.platform == "gpu" for device in jax.devices())
KERNELS = [
    "splash_interpreted",
    "triton_interpreted",
    pytest.param("triton", marks=pytest.mark.skipif(not GPU, reason="no GPU here")),
]
HOPPER = pytest.mark.skipif(not flash._ragged_there(), reason="no GPU of the Hopper generation here")


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


@pytest.mark.parametrize("kernel", [*KERNELS, pytest.param("cudnn", marks=HOPPER)])
def test_bfloat16_differs_from_the_reference_by_its_rounding(kernel):
    bits = operands(dtype="bfloat16")
    exact = values_and_gradients(by_reference, *(x.astype("float32") for x in bits))
    assert_close(values_and_gradients(functools.partial(by_flash, kernel=kernel, dtype="bfloat16"), *bits), exact, 3e-2)


@HOPPER
@pytest.mark.parametrize("tables", [(2, 3), (2, 24), (24, 48)])
def test_the_table_of_segments_is_the_smallest_that_holds_them(tables, monkeypatch):
    """The rows have up to four segments with their padding: where no table holds them, the other kernel reads them."""
    monkeypatch.setattr(flash, "RAGGED", tuple(T // most for most in tables))
    bits = operands(dtype="bfloat16")
    exact = values_and_gradients(by_reference, *(x.astype("float32") for x in bits))
    assert_close(values_and_gradients(functools.partial(by_flash, kernel="cudnn", dtype="bfloat16"), *bits), exact, 3e-2)


def test_segments_become_ragged_sequences():
    ids = jnp.asarray([[1, 1, 1, 2, 3, 3, 0, 0], [5, 5, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 0]])
    starts, lengths = flash.ragged(ids, 5)
    assert starts.tolist() == [[0, 3, 4, 6, -1, -1], [0, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1]]
    assert lengths.tolist() == [[3, 1, 2, 2, -1], [8, -1, -1, -1, -1], [8, -1, -1, -1, -1]]


@pytest.mark.parametrize("window", [2, 150])
def test_a_sliding_window_is_the_references(window):
    windowed = functools.partial(by_reference, window=window)
    found = values_and_gradients(functools.partial(by_flash, kernel="splash_interpreted", window=window), *operands())
    assert_close(found, values_and_gradients(windowed, *operands()))
    with pytest.raises(AssertionError):
        assert_close(found, values_and_gradients(functools.partial(by_reference, window=window + 1), *operands()))


# Four devices for two groups: each group's keys go to two of them.
@pytest.mark.parametrize("shape, kernel", [((2, 2), "splash_interpreted"), ((1, 4), "triton_interpreted")])
def test_on_a_mesh_every_device_reads_its_own_rows_and_heads(shape, kernel):
    mesh = tiny.mesh(*shape)
    q, *kv = operands()
    heads_last = [(q.reshape(2, 4, T, -1), jax.P("data", "model")), *((x, jax.P("data")) for x in kv)]
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x, spec in heads_last]

    def by_mesh(q, k, v):
        return by_flash(q.reshape(2, 2, 2, T, -1), k, v, kernel=kernel)

    with jax.set_mesh(mesh):
        found = values_and_gradients(by_mesh, *placed)
    found["q"] = found["q"].reshape(q.shape)
    assert_close(found, values_and_gradients(by_reference, q, *kv))


# -- in the LM --------------------------------------------------------------------------------------------------------------------------


@functools.cache
def weights():
    """Enlarged, so that attention matters."""
    return jax.jit(lambda: jax.tree.map(lambda p: p * 1.5, nnx.state(LM(SMALL, rngs=nnx.Rngs(0)))))()


def lm(**changes):
    return nnx.split(abstract_lm(dataclasses.replace(SMALL, **changes)))[0], weights()


def tokens(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(0, SMALL.vocab_size, shape), jnp.int32)


def objective(graphdef, params, length=SHORT):
    """A number that every hidden state of two rows moves."""
    positions, segments = (x[:, :length] for x in rows())
    return jnp.sum(jnp.sin(nnx.merge(graphdef, params).hidden(tokens(2, length), positions, segments)))


def gradients(mesh=None, **changes):
    graphdef, params = lm(**changes)
    run = jax.jit(jax.value_and_grad(functools.partial(objective, graphdef)))
    if mesh is None:
        value, grads = run(params)
    else:
        with jax.set_mesh(mesh):
            value, grads = run(jax.device_put(params, sharding.shardings(params, sharding.LM_RULES, mesh)))
    return {"value": value, **tiny.leaves(grads)}


def test_gradients_of_the_lm_with_remat_on_a_mesh_equal_the_references():
    found = gradients(tiny.mesh(2, 2), attention="triton_interpreted", remat="full")
    assert_close(found, gradients(), 1e-4)


def test_prefill_of_prompts_side_by_side_equals_the_references():
    read_BxKxT, lengths_BxK = tokens(2, 3, SHORT), jnp.asarray([[SHORT, 5, 77], [1, 64, 100]])

    @functools.partial(jax.jit, static_argnums=0)
    def prefill(graphdef, params):
        model = nnx.merge(graphdef, params)

        def one(read_BxT, lengths_B):
            hidden_BxTxD, cache = model.prefill(read_BxT, lengths_B)
            real_BxT = cache.positions_BxS >= 0
            last = [x[-1].swapaxes(1, 2).reshape(2, SHORT, -1) for x in (cache.k_LxBxGxSxh, cache.v_LxBxGxSxh)]
            return jnp.where(real_BxT[..., None], jnp.concatenate([hidden_BxTxD, *last], -1), 0)

        return {"hidden, keys, values": jax.vmap(one, in_axes=1)(read_BxKxT, lengths_BxK)}

    with jax.set_mesh(tiny.mesh(2, 1)):
        found = prefill(*lm(attention="triton_interpreted"))
    assert_close(found, prefill(*lm()), 1e-4)


def test_what_a_kernel_cannot_read_is_left_to_the_reference():
    def kernels(length: int, model: int = 1, **changes) -> int:
        graphdef, params = nnx.split(abstract_lm(dataclasses.replace(SMALL, **changes)))
        with jax.set_mesh(tiny.mesh(1, model)):
            program = jax.make_jaxpr(lambda params: nnx.merge(graphdef, params)(tokens(1, length)))(params)
        return str(program).count("pallas_call")

    assert kernels(256, attention="splash") == kernels(256, attention="triton") == 1  # in the scanned layer
    assert kernels(256) == kernels(96, attention="splash") == kernels(256, attention="splash", model=3) == 0
    assert kernels(256, attention="splash", windows=(8, None)) == kernels(256, attention="triton", windows=(8, 8)) == 0
    assert kernels(256, attention="triton", windows=(256, None)) == 1  # a window as long as the row hides nothing


# -- what is compiled -------------------------------------------------------------------------------------------------------------------


def shapes(jaxpr) -> set[tuple[int, ...]]:
    """Of every array in a program, those inside of the kernels left out."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {out.aval.shape for out in equation.outvars}
        if equation.primitive.name != "pallas_call":
            for inner in core.jaxprs_in_params(equation.params):
                found |= shapes(inner)
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_array_has_the_size_of_a_rows_scores(remat):
    def squares(attention: str) -> set[tuple[int, ...]]:
        graphdef, params = nnx.split(abstract_lm(dataclasses.replace(SMALL, attention=attention, remat=remat)))
        jaxpr = jax.make_jaxpr(jax.grad(functools.partial(objective, graphdef, length=T)))(params)
        return {shape for shape in shapes(jaxpr.jaxpr) if shape.count(T) > 1}

    assert squares("splash") == squares("triton") == set()
    assert squares("reference")


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_float32_is_meant_forward_and_backward(kernel):
    program = str(jax.make_jaxpr(jax.grad(lambda *x: jnp.sum(by_flash(*x, kernel=kernel)), argnums=(0, 1, 2)))(*operands()))
    assert "precision=(Precision.HIGHEST" in program or "precision=Precision.HIGHEST" in program
    assert "precision=None" not in program


def for_a_gpu():
    """A context in which programs are for a GPU that is not there."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(sharding.make_mesh(1, 1).abstract_mesh.update(abstract_device=device))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_for_gpus_holds_the_gpus_kernel(dtype):
    graphdef, params = nnx.split(abstract_lm(dataclasses.replace(SMALL, attention="triton", head_dim=64, dtype=dtype, remat="full")))
    with for_a_gpu():
        traced = jax.jit(jax.value_and_grad(functools.partial(objective, graphdef))).trace(params)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 4  # forward, twice for remat; backward: 2


def test_prompts_side_by_side_lower_for_gpus():
    graphdef, params = nnx.split(abstract_lm(dataclasses.replace(SMALL, attention="triton")))

    @jax.jit
    def prefill(params):
        model = nnx.merge(graphdef, params)
        return jax.vmap(lambda read, n: model.prefill(read, n)[0], in_axes=1)(tokens(2, 3, T), jnp.full((2, 3), T))

    with for_a_gpu():
        assert "__gpu$xla.gpu.triton" in prefill.trace(params).lower(lowering_platforms=("cuda",)).as_text()


# -- the choice -------------------------------------------------------------------------------------------------------------------------


def test_the_platform_chooses(monkeypatch):
    llama = dataclasses.replace(SMALL, heads=32, kv_heads=8, dtype="bfloat16")

    def chosen(platform: str, config: LmConfig, row_length: int = 2048, model: int = 1) -> str:
        return flash.choose(flash.kernel_for(platform), config, row_length, model)

    for there, expected in ((True, "cudnn"), (False, "triton")):
        monkeypatch.setattr(flash, "_ragged_there", lambda there=there: there)
        found = {platform: chosen(platform, llama) for platform in ("tpu", "gpu", "cuda", "cpu")}
        assert found == {"tpu": "splash", "gpu": expected, "cuda": expected, "cpu": "reference"}
        assert chosen("gpu", dataclasses.replace(llama, dtype="float32")) == "triton"
    assert chosen("tpu", llama, model=16) == "splash"  # two devices share a group
    assert chosen("tpu", llama, model=12) == chosen("tpu", llama, 2000) == "reference"
    assert "12 devices" in flash.obstacle("splash", llama, 2048, 12) and "2000" in flash.obstacle("splash", llama, 2000)


def test_a_kernel_of_another_platform_is_refused():
    assert flash.kernel_for("cpu") == flash.kernel_for("tpu", "reference") == "reference"
    assert flash.kernel_for("tpu", "splash") == "splash"
    with pytest.raises(InputError, match="'splash', which does not run on cpu; expected auto or reference$"):
        flash.kernel_for("cpu", "splash")
    with pytest.raises(InputError, match="'flash', expected auto"):
        flash.kernel_for("tpu", "flash")
    with pytest.raises(ValueError, match="attention is 'flash', expected one of reference"):
        dataclasses.replace(SMALL, attention="flash")
