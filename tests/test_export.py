"""Exports: what is written reads back the same, in the names and shapes of Hugging Face, whole or not at all.

That transformers and sentence-transformers compute the same from it is checked by tests/references/check_export.py, which needs torch.
"""

from __future__ import annotations

import dataclasses
import json

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from references.check_export import MINILM, TINY_LMS
from safetensors.numpy import load_file

from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.models.encoder import EncoderConfig
from radit_jax.models.layers import RopeScaling
from radit_jax.models.lm import LmConfig
from radit_jax.weights.encoder import abstract_encoder, load_encoder
from radit_jax.weights.export import export_encoder, export_lm
from radit_jax.weights.hf import resolve
from radit_jax.weights.lm import abstract_lm, load_lm

LM_SHAPE = LmConfig(
    vocab_size=37, width=24, layers=3, heads=4, kv_heads=4, head_dim=6, mlp_width=40, max_positions=64, norm_eps=3e-6, rope_theta=5e4
)
ENCODER_SHAPE = EncoderConfig(vocab_size=37, width=24, layers=2, heads=3, mlp_width=40, max_positions=32, norm_eps=2e-9)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINILM)


def drawn(module: nnx.Module) -> nnx.Module:
    """Random parameters in place of an abstract module's shapes."""
    graphdef, params = nnx.split(module)
    random = np.random.RandomState(0)
    flat = [(path, leaf.replace(jnp.asarray(random.standard_normal(leaf.shape), leaf.dtype))) for path, leaf in nnx.to_flat_state(params)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def assert_same(a: nnx.Module, b: nnx.Module) -> None:
    """The same config and, bit for bit, the same parameters."""
    assert a.config == b.config
    a, b = (dict(nnx.to_flat_state(nnx.state(module, nnx.Param))) for module in (a, b))
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path][...], b[path][...], err_msg=str(path))


def family_config(name: str) -> LmConfig:
    changes = dict(TINY_LMS[name])
    if "rope_scaling" in changes:
        changes["rope_scaling"] = RopeScaling(*changes["rope_scaling"])
    return dataclasses.replace(LM_SHAPE, **changes)


@pytest.mark.parametrize("name", TINY_LMS)
def test_lms_of_every_family_read_back_the_same(name, tokenizer, tmp_path):
    lm = drawn(abstract_lm(family_config(name)))
    export_lm(lm, tokenizer, tmp_path / "lm")
    assert_same(load_lm(str(tmp_path / "lm")), lm)
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["model_type"] == name.split("_")[0]


def test_large_lms_are_written_in_pieces(tokenizer, tmp_path):
    lm = drawn(abstract_lm(LM_SHAPE))
    export_lm(lm, tokenizer, tmp_path / "lm", shard_bytes=10_000)
    files = sorted(tmp_path.glob("lm/model-*.safetensors"))
    assert len(files) > 2 and not (tmp_path / "lm" / "model.safetensors").exists()
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 10_000 for file in files)
    assert files[-1].name == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert_same(load_lm(str(tmp_path / "lm")), lm)


def test_bfloat16_parameters_stay_bfloat16(tokenizer, tmp_path):
    lm = drawn(abstract_lm(dataclasses.replace(LM_SHAPE, param_dtype="bfloat16")))
    export_lm(lm, tokenizer, tmp_path / "lm")
    assert json.loads((tmp_path / "lm" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(load_lm(str(tmp_path / "lm"), param_dtype="bfloat16"), lm)


def test_bfloat16_is_the_float32_lm_rounded(tokenizer, tmp_path):
    lm = drawn(abstract_lm(LM_SHAPE))
    export_lm(lm, tokenizer, tmp_path / "full", readme="# A card\n")
    export_lm(lm, tokenizer, tmp_path / "half", dtype="bfloat16", shard_bytes=6_000)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    files = sorted(tmp_path.glob("half/model-*.safetensors"))
    assert len(files) > 2 and all(sum(t.nbytes for t in load_file(file).values()) <= 6_000 for file in files)
    full = load_file(tmp_path / "full" / "model.safetensors")
    half = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert full.keys() == half.keys()
    for name, tensor in half.items():
        assert tensor.dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensor, full[name].astype(jnp.bfloat16), err_msg=name)
    assert_same(load_lm(str(tmp_path / "half")), load_lm(str(tmp_path / "half"), param_dtype="float32"))
    assert (tmp_path / "full" / "README.md").read_text() == "# A card\n" and not (tmp_path / "half" / "README.md").exists()


@pytest.mark.parametrize("name", ("llama", "qwen2", "qwen3"))
def test_an_lm_has_what_the_converter_of_llama_cpp_reads(name, tmp_path):
    """Its architecture, a GGUF name for every tensor, and merges and special ids from tokenizer.json and the configs beside it."""
    export_lm(drawn(abstract_lm(family_config(name))), tiny.tokenizer(), tmp_path / "lm", dtype="bfloat16")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    architecture = next(kind for kind, known in gguf.MODEL_ARCH_NAMES.items() if known == config["model_type"])
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    for tensor in load_file(tmp_path / "lm" / "model.safetensors"):
        assert names.get_name(tensor, try_suffixes=(".weight", ".bias")), tensor
    vocabulary = gguf.SpecialVocab(tmp_path / "lm", load_merges=True)
    assert len(vocabulary.merges) == len(tiny.MERGES)
    assert vocabulary.special_token_ids["bos"] == 0 and vocabulary.special_token_ids["eos"] == 1


@pytest.mark.parametrize(("pooling", "normalize", "offset"), [("cls", False, 0), ("mean", True, 0), ("mean", False, 2)])
def test_encoders_read_back_the_same(pooling, normalize, offset, tokenizer, tmp_path):
    encoder = drawn(abstract_encoder(dataclasses.replace(ENCODER_SHAPE, pooling=pooling, normalize=normalize, position_offset=offset)))
    export_encoder(encoder, tokenizer, tmp_path / "encoder")
    assert_same(load_encoder(str(tmp_path / "encoder")), encoder)
    assert (tmp_path / "encoder" / "2_Normalize").is_dir() == normalize
    assert load_tokenizer(str(tmp_path / "encoder")).max_tokens == 32  # positions, where the tokenizer allows more


def test_minilm_leaves_as_it_came(tokenizer, tmp_path):
    encoder = load_encoder(MINILM)
    export_encoder(encoder, tokenizer, tmp_path / "minilm")
    assert_same(load_encoder(str(tmp_path / "minilm")), encoder)
    before, after = load_file(resolve(MINILM) / "model.safetensors"), load_file(tmp_path / "minilm" / "model.safetensors")
    assert before.keys() - after.keys() == {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
    for name, tensor in after.items():
        np.testing.assert_array_equal(tensor, before[name], err_msg=name)
    again = load_tokenizer(str(tmp_path / "minilm"))
    np.testing.assert_array_equal(again.encode_with_specials(["a b c"], 8)[0], tokenizer.encode_with_specials(["a b c"], 8)[0])
    assert again.max_tokens == 256


def test_an_export_is_replaced_whole_or_not_at_all(tokenizer, tmp_path):
    first, second = (drawn(abstract_encoder(dataclasses.replace(ENCODER_SHAPE, layers=n))) for n in (1, 2))

    class Failing:
        bos_id = eos_id = pad_id = max_tokens = None

        def save(self, folder):
            raise OSError("disk full")

    export_encoder(first, tokenizer, tmp_path / "encoder")
    with pytest.raises(OSError, match="disk full"):
        export_encoder(second, Failing(), tmp_path / "encoder")
    assert_same(load_encoder(str(tmp_path / "encoder")), first)
    export_encoder(second, tokenizer, tmp_path / "encoder")
    assert_same(load_encoder(str(tmp_path / "encoder")), second)
    assert [path.name for path in tmp_path.iterdir()] == ["encoder"]


def test_a_folder_of_something_else_is_not_overwritten(tokenizer, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not overwritten"):
        export_encoder(drawn(abstract_encoder(ENCODER_SHAPE)), tokenizer, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": (4, 5, None)}, "different sliding windows"),
        ({"qk_norm": True, "mlp_bias": True}, "no Hugging Face architecture"),
        ({"rope_scaling": RopeScaling("table", divisors=(1.0, 2.0, 4.0))}, "rotary scaling 'table'"),
    ],
)
def test_what_hugging_face_has_no_name_for_is_an_error(changes, words, tokenizer, tmp_path):
    lm = drawn(abstract_lm(dataclasses.replace(LM_SHAPE, **changes)))
    with pytest.raises(InputError, match=words):
        export_lm(lm, tokenizer, tmp_path / "lm")
    assert not (tmp_path / "lm").exists()
