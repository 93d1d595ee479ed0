"""Our models as folders that transformers, vLLM and sentence-transformers load: config.json, model.safetensors, tokenizer files.

The names tables of the import, read backwards. A folder is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from radit_jax.artifacts import write_json
from radit_jax.errors import InputError
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.models.lm import LM, LmConfig
from radit_jax.weights.encoder_names import HF_ENCODER
from radit_jax.weights.hf import Name
from radit_jax.weights.names import HF_LM

SHARD_BYTES = 4 << 30  # a file of model.safetensors at most: 65B models are written in pieces, from one piece's memory
MARKER = "config.json"  # what tells an exported folder, which may be replaced, from anything else


class SavedTokenizer(Protocol):
    """What an export needs of a tokenizer; ids may be None."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    max_tokens: int | None

    def save(self, folder: Path) -> None: ...


def export_lm(
    lm: LM, tokenizer: SavedTokenizer, folder: Path, *, dtype: str = "", readme: str = "", shard_bytes: int = SHARD_BYTES
) -> None:
    """Writes `folder`, which transformers' AutoModelForCausalLM and AutoTokenizer load; the same logits, in the stored dtype.

    `dtype` ("float32" | "bfloat16") rounds the tensors to another one; `readme` becomes README.md, the model card.
    InputError if `folder` is there already and is no exported one, or the config has no Hugging Face architecture.
    """
    with _whole(Path(folder)) as partial:
        dtype = dtype or lm.config.param_dtype
        config = lm_config(lm.config) | {"torch_dtype": dtype} | _ids(tokenizer)
        write_json(partial / "config.json", config)
        write_json(partial / "generation_config.json", _ids(tokenizer) | {"do_sample": False})
        _save_tensors(lm, HF_LM, partial, dtype, shard_bytes)
        tokenizer.save(partial)
        _save_card(partial, readme)


def export_encoder(encoder: Encoder, tokenizer: SavedTokenizer, folder: Path, *, readme: str = "") -> None:
    """Writes `folder`, which SentenceTransformer(folder) loads, and transformers' AutoModel: pooling and unit norm included.

    `readme` becomes README.md, the model card.
    """
    c = encoder.config
    with _whole(Path(folder)) as partial:
        write_json(partial / "config.json", encoder_config(c, tokenizer.pad_id or 0))
        _save_tensors(encoder, HF_ENCODER, partial, c.param_dtype, SHARD_BYTES)
        tokenizer.save(partial)
        _save_card(partial, readme)
        limit = min(tokenizer.max_tokens or c.max_positions, c.max_positions)
        write_json(partial / "sentence_bert_config.json", {"max_seq_length": limit, "do_lower_case": False})
        names = ("Transformer", "Pooling") + (("Normalize",) if c.normalize else ())
        paths = [f"{i}_{name}" if i else "" for i, name in enumerate(names)]
        modules = [_module(i, name, path) for i, (name, path) in enumerate(zip(names, paths, strict=True))]
        write_json(partial / "modules.json", modules)
        for path in filter(None, paths):
            (partial / path).mkdir()
        write_json(partial / "1_Pooling" / "config.json", _pooling(c))


# -- configs ------------------------------------------------------------------------------------------------------------------------


def lm_config(c: LmConfig) -> dict[str, Any]:
    """config.json of a decoder: the family is the one whose differences the config has."""
    family, architecture = _family(c)
    windows = [window for window in c.windows if window]
    config = {
        "model_type": family,
        "architectures": [architecture],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied,
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        "torch_dtype": c.param_dtype,
        **_rope(c),
    }
    if family == "mistral":
        config["sliding_window"] = windows[0]
    elif windows:
        kinds = ["sliding_attention" if window else "full_attention" for window in c.windows]
        first = kinds.index("sliding_attention")  # older versions read this in place of layer_types
        config |= {"use_sliding_window": True, "sliding_window": windows[0], "layer_types": kinds, "max_window_layers": first}
    return config


def _family(c: LmConfig) -> tuple[str, str]:
    """(model_type, architecture) that computes what `c` says; InputError where Hugging Face has none."""
    some_windows = any(c.windows)
    if len({window for window in c.windows if window}) > 1:
        raise InputError(f"cannot export: layers have different sliding windows {c.windows}, a Hugging Face config has one")
    if c.qk_norm and not c.mlp_bias and c.output_bias == c.attention_bias:
        return "qwen3", "Qwen3ForCausalLM"
    if c.attention_bias and not c.output_bias and not c.mlp_bias and not c.qk_norm:
        return "qwen2", "Qwen2ForCausalLM"
    plain = not c.qk_norm and c.output_bias == c.attention_bias
    if plain and not some_windows:
        return "llama", "LlamaForCausalLM"
    if plain and all(c.windows) and not c.attention_bias and not c.mlp_bias:
        return "mistral", "MistralForCausalLM"
    raise InputError(f"cannot export: no Hugging Face architecture has these biases, norms and windows together ({c})")


def _rope(c: LmConfig) -> dict[str, Any]:
    """Both spellings: `rope_theta` and `rope_scaling` (transformers 4, vLLM), `rope_parameters` (transformers 5)."""
    scaling, s = None, c.rope_scaling
    if s is not None and s.kind == "linear":
        scaling = {"rope_type": "linear", "factor": s.factor}
    elif s is not None and s.kind == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_positions,
        }
    elif s is not None:
        raise InputError(f"cannot export: rotary scaling {s.kind!r} (of a GGUF file) has no Hugging Face name; start from safetensors")
    both = {"rope_theta": c.rope_theta, "rope_scaling": scaling}
    return both | {"rope_parameters": {"rope_theta": c.rope_theta, **(scaling or {"rope_type": "default"})}}


def encoder_config(c: EncoderConfig, pad_id: int) -> dict[str, Any]:
    """config.json of an encoder."""
    family, architecture = ("xlm-roberta", "XLMRobertaModel") if c.position_offset else ("bert", "BertModel")
    return {
        "model_type": family,
        "architectures": [architecture],
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "intermediate_size": c.mlp_width,
        "max_position_embeddings": c.max_positions + c.position_offset,
        "type_vocab_size": c.types,
        "layer_norm_eps": c.norm_eps,
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        # RoBERTa counts positions from the id of its padding token plus one.
        "pad_token_id": c.position_offset - 1 if c.position_offset else pad_id,
        "torch_dtype": c.param_dtype,
    }


def _module(index: int, name: str, path: str) -> dict[str, Any]:
    return {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{name}"}


def _pooling(c: EncoderConfig) -> dict[str, Any]:
    """1_Pooling/config.json in the spelling that every version of sentence-transformers reads."""
    modes = {f"pooling_mode_{mode}_tokens": False for mode in ("max", "mean_sqrt_len")}
    return {
        "word_embedding_dimension": c.width,
        "pooling_mode_cls_token": c.pooling == "cls",
        "pooling_mode_mean_tokens": c.pooling == "mean",
        **modes,
    }


def _ids(tokenizer: SavedTokenizer) -> dict[str, int]:
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    return {key: value for key, value in ids.items() if value is not None}


# -- files --------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well; an earlier export is replaced."""
    if folder.exists() and not (folder.is_dir() and ((folder / MARKER).exists() or not any(folder.iterdir()))):
        raise InputError(f"{folder}: is there already and is no exported model; not overwritten")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of the checkpoint: a parameter of ours, or one layer of it."""

    name: str
    parameter: jax.Array
    layer: int | None
    transpose: bool
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.parameter.size * self.dtype.itemsize // (1 if self.layer is None else self.parameter.shape[0])

    def read(self) -> np.ndarray:
        value = np.asarray(self.parameter if self.layer is None else self.parameter[self.layer]).astype(self.dtype, copy=False)
        return np.ascontiguousarray(value.T if self.transpose else value)


def _save_card(folder: Path, readme: str) -> None:
    if readme:
        (folder / "README.md").write_text(readme, encoding="utf-8")


def _save_tensors(module: nnx.Module, names: Sequence[Name], folder: Path, dtype: str, shard_bytes: int) -> None:
    """model.safetensors, or numbered files of at most `shard_bytes` with an index; one file's tensors are on the host at a time."""
    shards = _shards(_tensors_of(module, names, jnp.dtype(dtype)), shard_bytes)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for file, shard in zip(files, shards, strict=True):
        save_file({tensor.name: tensor.read() for tensor in shard}, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for tensor in shard)
        weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tensors_of(module: nnx.Module, names: Sequence[Name], dtype: np.dtype) -> list[_Tensor]:
    """The checkpoint's tensors of a module, layer by layer."""
    table = {row.path: row for row in names}
    found = []
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        row, value = table["/".join(map(str, path))], variable[...]
        layers = range(value.shape[0]) if "{layer}" in row.tensor else (None,)
        found += [_Tensor(row.tensor.format(layer=layer), value, layer, row.transpose, dtype) for layer in layers]
    return sorted(found, key=lambda tensor: -1 if tensor.layer is None else tensor.layer)


def _shards(tensors: Sequence[_Tensor], most: int) -> list[list[_Tensor]]:
    """Consecutive groups of at most `most` bytes, or of one tensor."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards
