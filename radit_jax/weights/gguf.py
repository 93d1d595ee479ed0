"""GGUF files: metadata, and tensors dequantized on demand into what the Hugging Face folder of the same model would hold.

Every type the `gguf` package dequantizes is read. The converter that makes "llama" files reorders the rows of q and k from
rotate-half pairs (i, i + h/2) to neighbouring pairs (2i, 2i + 1); that is undone here. Other architectures are stored as they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from radit_jax.errors import InputError
from radit_jax.models.layers import RopeScaling
from radit_jax.models.lm import LmConfig
from radit_jax.weights import gguf_header
from radit_jax.weights.hf import first_line

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")  # general.architecture; Mistral and SmolLM2 files say llama
PERMUTED = ("llama", "mistral")
REQUIRED = object()


class GgufFile:
    """A GGUF file as `Tensors`; `metadata(key)` reads its header, with ``{arch}`` standing for the architecture."""

    def __init__(self, path: Path):
        self.where = Path(path)
        try:
            gguf_header.check(self.where)
            self._reader = gguf.GGUFReader(self.where)
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            self.shapes = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}
        except InputError:
            raise
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:  # whatever a cut or foreign file makes it stumble on
            raise InputError(f"{path}: truncated or not a GGUF file ({first_line(error)})") from error
        self.architecture = self.metadata("general.architecture")

    def metadata(self, key: str, default: Any = REQUIRED) -> Any:
        """One value of the header; InputError if it is not there and has no default."""
        key = key.format(arch=self.architecture) if "{arch}" in key else key
        field = self._reader.get_field(key)
        if field is not None:
            try:
                return field.contents()
            except (ValueError, IndexError) as error:  # a text that is no UTF-8, an empty list
                raise InputError(f"{self.where}: {key} of the header cannot be read ({first_line(error)})") from error
        if default is REQUIRED:
            raise InputError(f"{self.where}: the header has no {key}")
        return default

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or a slice of it, in float32; linear weights are (out, in)."""
        return self._whole(name)[index]

    def _whole(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        try:
            value = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{self.where}: tensor {name} of type {tensor.tensor_type.name} cannot be dequantized ({error})") from error
        if self.architecture in PERMUTED and (".attn_q." in name or ".attn_k." in name):
            heads = _number(self, "attention.head_count") if ".attn_q." in name else _kv_heads(self)
            if value.shape[0] % (2 * heads):
                raise InputError(f"{self.where}: tensor {name} has {value.shape[0]} rows, expected pairs of rows for {heads} heads")
            return unpermute(value, heads)
        return value


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Puts the rows (or biases) of every head back from neighbouring pairs (2i, 2i + 1) to rotate-half pairs (i, i + h/2)."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return np.swapaxes(pairs, 1, 2).reshape(rows.shape)


def config_from_gguf(file: GgufFile, kinds: Mapping[str, Any]) -> LmConfig:
    """The decoder's shape from a file's header; InputError for an architecture we do not build. `kinds`: dtype, param_dtype, remat."""
    if file.architecture not in ARCHITECTURES:
        raise InputError(f"{file.where}: architecture {file.architecture!r}, expected one of {', '.join(ARCHITECTURES)}")
    if file.metadata("{arch}.expert_count", 0):
        raise InputError(f"{file.where}: {file.architecture}.expert_count > 0: a mixture of experts, expected a dense model")
    number = functools.partial(_number, file)
    width, heads, layers = number("embedding_length"), number("attention.head_count"), number("block_count")
    if layers > len(file.shapes):
        raise InputError(f"{file.where}: {file.architecture}.block_count is {layers:,}, the file has {len(file.shapes):,} tensors")
    window = number("attention.sliding_window", 0, least=0) if file.architecture in PERMUTED else 0
    try:
        return LmConfig(**_shape(file, width, heads, layers), windows=(window,) * layers if window else (), **kinds)
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{file.where}: {error}") from error


def _shape(file: GgufFile, width: int, heads: int, layers: int) -> dict[str, Any]:
    """What LmConfig says of a model's shape."""
    number, embedding = functools.partial(_number, file), file.shapes.get("token_embd.weight")
    return dict(
        vocab_size=embedding[0] if embedding else number("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=_kv_heads(file),
        head_dim=number("attention.key_length", width // heads),
        mlp_width=number("feed_forward_length"),
        norm_eps=_real(file, "attention.layer_norm_rms_epsilon"),
        rope_theta=_real(file, "rope.freq_base", 10_000.0),
        rope_scaling=_rope_scaling(file),
        tied="output.weight" not in file.shapes,
        attention_bias="blk.0.attn_q.bias" in file.shapes,
        output_bias="blk.0.attn_output.bias" in file.shapes,
        mlp_bias="blk.0.ffn_up.bias" in file.shapes,
        qk_norm="blk.0.attn_q_norm.weight" in file.shapes,
        max_positions=number("context_length"),
    )


def _kv_heads(file: GgufFile) -> int:
    return _number(file, "attention.head_count_kv", _number(file, "attention.head_count"))


def _number(file: GgufFile, key: str, default: Any = REQUIRED, *, least: int = 1) -> int:
    value = file.metadata("{arch}." + key, default)
    if not isinstance(value, int) or value < least:
        raise InputError(f"{file.where}: {file.architecture}.{key} is {_shown(value)}, expected a whole number of at least {least}")
    return value


def _real(file: GgufFile, key: str, default: Any = REQUIRED) -> float:
    value = file.metadata("{arch}." + key, default)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InputError(f"{file.where}: {file.architecture}.{key} is {_shown(value)}, expected a number")
    return float(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _rope_scaling(file: GgufFile) -> RopeScaling | None:
    if "rope_freqs.weight" in file.shapes:  # Llama 3.1: what "llama3" scaling comes to, written out per pair
        return RopeScaling("table", divisors=tuple(file.read("rope_freqs.weight").ravel().tolist()))
    kind = file.metadata("{arch}.rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", factor=_real(file, "rope.scaling.factor"))
    if kind != "none":
        raise InputError(f"{file.where}: rope scaling {kind!r}, expected none or linear")
    return None
