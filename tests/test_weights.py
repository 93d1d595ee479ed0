"""Checkpoints in: every tensor is accounted for by name; names resolve; GGUF files give what the Hugging Face folder holds."""

from __future__ import annotations

import json
import re

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from references.tiny_lms import FAMILIES, draw
from safetensors.numpy import save_file

from radit_jax.errors import InputError
from radit_jax.models.layers import rope_frequencies
from radit_jax.weights.gguf import GgufFile
from radit_jax.weights.hf import Safetensors, resolve
from radit_jax.weights.lm import abstract_lm, config_from_hf, load_lm
from radit_jax.weights.names import GGUF_LM, HF_LM

KINDS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}


def flat(lm: nnx.Module) -> dict[str, jax.Array]:
    return {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(lm))}


def tiny_tensors(folder, family: str) -> dict[str, np.ndarray]:
    """The tensors of a tiny checkpoint under their Hugging Face names, shapes from our own config (test_lm has the independent ones)."""
    (folder / "config.json").write_text(json.dumps(FAMILIES[family]))
    shapes = {key: leaf.shape for key, leaf in _abstract(folder).items()}
    tensors = {}
    for row in HF_LM:
        if row.path in shapes:
            stacked = "{layer}" in row.tensor
            shape = shapes[row.path][1:] if stacked else shapes[row.path]
            for layer in range(shapes[row.path][0] if stacked else 1):
                name = row.tensor.format(layer=layer)
                tensors[name] = draw(name, shape[::-1] if row.transpose else shape)
    return tensors


def _abstract(folder) -> dict:
    lm = abstract_lm(config_from_hf(folder / "config.json", KINDS))
    return {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(lm))}


def checkpoint(folder, family: str = "llama2"):
    folder.mkdir(exist_ok=True)
    save_file(tiny_tensors(folder, family), folder / "model.safetensors")
    return folder


# -- folders ------------------------------------------------------------------------------------------------------------------------


def test_shards_equal_one_file(tmp_path):
    whole = checkpoint(tmp_path / "whole")
    tensors = tiny_tensors(whole, "llama2")
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "config.json").write_bytes((whole / "config.json").read_bytes())
    file_of = {name: f"model-{index % 3}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(file_of.values()):
        save_file({name: tensors[name] for name, where in file_of.items() if where == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    jax.tree.map(np.testing.assert_array_equal, flat(load_lm(str(whole))), flat(load_lm(str(shards))))

    (shards / "model-1.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-1\.safetensors: no such file"):
        load_lm(str(shards))


def test_bfloat16_is_read_exactly_and_stored_as_asked(tmp_path):
    folder = checkpoint(tmp_path)
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in tiny_tensors(folder, "llama2").items()}
    save_file(tensors, folder / "model.safetensors")
    wide, narrow = flat(load_lm(str(folder))), flat(load_lm(str(folder), param_dtype="bfloat16", dtype=jnp.bfloat16))
    q = np.stack([tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].T for layer in range(3)])
    np.testing.assert_array_equal(wide["blocks/attention/q/kernel"], q.astype(np.float32))
    assert {leaf.dtype.name for leaf in narrow.values()} == {"bfloat16"} and {leaf.dtype.name for leaf in wide.values()} == {"float32"}
    np.testing.assert_array_equal(narrow["blocks/attention/q/kernel"], q)


def test_place_gets_every_parameter_with_its_path(tmp_path):
    seen = {}

    def place(path, shape, read):
        seen[path] = array = read((slice(None),) * len(shape))
        for index in ((slice(1, None),), (slice(0, 1), slice(2, 5)), (slice(2, 3), slice(1, 4), slice(0, 2))):
            index = (*index, *[slice(None)] * (len(shape) - len(index)))[: len(shape)]
            np.testing.assert_array_equal(read(index), array[index], err_msg=path)  # what a mesh asks for
        return jnp.asarray(array)

    lm = load_lm(str(checkpoint(tmp_path, "qwen2")), place=place)
    assert seen.keys() == flat(lm).keys() and "blocks/attention/k/bias" in seen and "head/kernel" not in seen
    assert all(isinstance(array, np.ndarray) for array in seen.values())


DAMAGES = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"tensor missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    "unused": (lambda t: t.update({"model.layers.0.mlp.extra": np.zeros(3, np.float32)}), r"tensor unused.*: model\.layers\.0\.mlp\.extra"),
    "one layer too many": (
        lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t["model.layers.2.mlp.up_proj.weight"]}),
        r"tensor unused.*: model\.layers\.3\.mlp\.up_proj\.weight",
    ),
    "transposed": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((32, 48), np.float32)}),
        r"tensor model\.layers\.2\.mlp\.up_proj\.weight has shape \(32, 48\), expected \(48, 32\)",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_wrong_tensor_is_named(damage, tmp_path):
    change, message = DAMAGES[damage]
    tensors = tiny_tensors(checkpoint(tmp_path), "llama2")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        load_lm(str(tmp_path))


def test_buffers_and_a_stored_tied_head_are_passed_over(tmp_path):
    folder = checkpoint(tmp_path, "smollm2")
    tensors = tiny_tensors(folder, "smollm2")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, folder / "model.safetensors")
    assert load_lm(str(folder)).head is None


def test_a_cut_safetensors_file_is_one_line(tmp_path):
    file = checkpoint(tmp_path) / "model.safetensors"
    for cut in (file.stat().st_size - 10, 40, 3, 0):
        file.write_bytes(file.read_bytes()[:cut])
        with pytest.raises(InputError, match="truncated or not a safetensors file") as raised:
            load_lm(str(tmp_path))
        assert "\n" not in str(raised.value)


CONFIGS = {
    "unknown architecture": ({"model_type": "gpt2"}, "model_type 'gpt2', expected one of llama"),
    "rope scaling": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
    "rope field": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "has no low_freq_factor"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu', expected silu"),
    "no width": ({"hidden_size": None}, "hidden_size is None"),
    "heads": ({"num_key_value_heads": 3}, r"heads \(4\) is not a multiple of kv_heads \(3\)"),
    "layer types": ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked"]}, "chunked"),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_we_do_not_build_is_refused_by_its_field(case, tmp_path):
    change, message = CONFIGS[case]
    (tmp_path / "config.json").write_text(json.dumps(FAMILIES["llama2"] | change))
    with pytest.raises(InputError, match=message):
        config_from_hf(tmp_path / "config.json", KINDS)


def test_layer_types_give_one_window_per_layer(tmp_path):
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    raw = FAMILIES["qwen2_sliding"] | {"layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert config_from_hf(tmp_path / "config.json", KINDS).windows == (5, None, 5)


# -- names --------------------------------------------------------------------------------------------------------------------------


def test_resolve(tmp_path):
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("package:json").name == "json"
    assert resolve("package:json/decoder.py").name == "decoder.py"
    for name, message in (
        ("package:no_such_module_here/x", "'no_such_module_here' is not installed"),
        ("package:json/none.gguf", "has no 'none.gguf'"),
        (str(tmp_path / "none"), "no such folder or file"),
        ("none.gguf", "no such folder or file"),
        (__file__, "a folder or a .gguf file"),
        ("nobody/nothing-here", "not to be had from the Hub"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            resolve(name)
        assert "\n" not in str(raised.value)


def test_a_folder_without_weights_or_config_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"expected model\.safetensors"):
        Safetensors(tmp_path)
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        load_lm(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_lm(str(tmp_path))


# -- GGUF ---------------------------------------------------------------------------------------------------------------------------


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """What the converter of llama files does to q and k."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(file, config: dict, tensors: dict[str, np.ndarray], extra: dict[str, np.ndarray] | None = None) -> None:
    arch = "llama" if config["model_type"] in ("llama", "mistral") else config["model_type"]
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
    to_gguf = {hf.tensor: ours.tensor for hf, ours in zip(HF_LM, GGUF_LM, strict=True)}
    for name, value in tensors.items():
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}.get(name.split(".")[-2])
        value = permute(value, heads) if arch == "llama" and heads else value
        layer = re.search(r"\d+", name)
        template = to_gguf[re.sub(r"\d+", "{layer}", name)]
        writer.add_tensor(template.format(layer=layer and layer.group()), value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama1", "llama_biased", "smollm2", "qwen2", "qwen3"])
def test_a_gguf_file_gives_what_the_folder_gives(family, tmp_path):
    folder = checkpoint(tmp_path, family)
    write_gguf(tmp_path / "model.gguf", FAMILIES[family], tiny_tensors(folder, family))
    ours, theirs = load_lm(str(tmp_path / "model.gguf")), load_lm(str(folder))
    jax.tree.map(np.testing.assert_array_equal, flat(ours), flat(theirs))
    for field in ("heads", "kv_heads", "head_dim", "qk_norm", "attention_bias", "output_bias", "mlp_bias", "tied", "windows"):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field


def test_rope_divisors_of_a_gguf_file_are_the_llama3_scaling(tmp_path):
    folder = checkpoint(tmp_path, "llama3")
    scaled = config_from_hf(folder / "config.json", KINDS)
    frequencies = rope_frequencies(scaled.head_dim, scaled.rope_theta, scaled.rope_scaling)
    divisors = rope_frequencies(scaled.head_dim, scaled.rope_theta, None) / frequencies
    assert divisors[0] == 1.0 and 1.0 < divisors[1] < 8.0 and divisors[-1] == pytest.approx(8.0)  # kept, blended, stretched
    write_gguf(tmp_path / "model.gguf", FAMILIES["llama3"], tiny_tensors(folder, "llama3"), {"rope_freqs.weight": divisors})
    config = load_lm(str(tmp_path / "model.gguf")).config
    np.testing.assert_allclose(rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), frequencies, rtol=1e-6)


@pytest.mark.parametrize("kind", [kind.name for kind in gguf.quants._type_traits])
def test_every_type_the_package_dequantizes_is_read(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 100, (4, 2 * size)).astype(np.uint8)  # four rows of two blocks
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_tensor("x", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "x.gguf")
    assert file.shapes["x"] == (4, 2 * block)
    np.testing.assert_array_equal(file.read("x"), gguf.dequantize(raw, kind))


def test_a_cut_or_foreign_gguf_file_is_one_line(tmp_path):
    folder, file = checkpoint(tmp_path), tmp_path / "model.gguf"
    write_gguf(file, FAMILIES["llama2"], tiny_tensors(folder, "llama2"))
    whole = file.read_bytes()
    for content in [whole[:cut] for cut in (len(whole) - 1, len(whole) // 2, 1000, 200, 20, 3, 0)] + [b"<html>" * 100]:
        file.write_bytes(content)
        with pytest.raises(InputError, match="truncated or not a GGUF file") as raised:
            load_lm(str(file))
        assert "\n" not in str(raised.value)


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path):
    config = FAMILIES["llama2"] | {"model_type": "gemma"}
    write_gguf(tmp_path / "x.gguf", config, {"model.norm.weight": np.ones(32, np.float32)})
    with pytest.raises(InputError, match="architecture 'gemma', expected one of llama"):
        load_lm(str(tmp_path / "x.gguf"))
