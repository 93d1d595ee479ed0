"""A decoder LM from a checkpoint string: its config read from the checkpoint's own, its parameters filled one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from radit_jax.errors import InputError
from radit_jax.models.flash import REFERENCE
from radit_jax.models.layers import RopeScaling
from radit_jax.models.lm import LM, LmConfig
from radit_jax.weights.gguf import GgufFile, config_from_gguf
from radit_jax.weights.hf import Place, Safetensors, fill, on_default_device, read_json, resolve
from radit_jax.weights.names import GGUF_BUFFERS, GGUF_LM, HF_BUFFERS, HF_LM, HF_TIED_HEAD

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # model_type; SmolLM2 says llama
REQUIRED = object()
MOST_LAYERS = 100_000  # a damaged config may say more, and every layer has a window of its own


def load_lm(
    name: str,
    *,
    dtype: Any = "float32",
    param_dtype: Any = "float32",
    remat: str = "none",
    attention: str = REFERENCE,
    place: Place = on_default_device,
    check: Callable[[LmConfig], None] = lambda config: None,
) -> LM:
    """Returns the LM of a folder, GGUF file, Hub id or ``package:`` checkpoint; `lm.config` is what was read.

    `dtype` is the compute dtype, `param_dtype` the storage dtype: the same "bfloat16" for both casts once, which is what decoding wants.
    `attention` names what reads whole rows (models/flash.py says which kernel suits a platform).
    `place(path, shape, read)` puts each parameter on its devices; `check` sees the config before any is read.
    InputError for everything that is wrong with the checkpoint.
    """
    path = resolve(name)
    kinds = {"dtype": jnp.dtype(dtype).name, "param_dtype": jnp.dtype(param_dtype).name, "remat": remat, "attention": attention}
    if path.suffix == ".gguf":
        tensors, names = GgufFile(path), GGUF_LM
        config, ignore = config_from_gguf(tensors, kinds), GGUF_BUFFERS
    else:
        tensors, names = Safetensors(path), HF_LM
        config = config_from_hf(path / "config.json", kinds)
        ignore = f"{HF_BUFFERS}|{HF_TIED_HEAD}" if config.tied else HF_BUFFERS
    check(config)
    return fill(abstract_lm(config), names, tensors, param_dtype=jnp.dtype(param_dtype), ignore=ignore, place=place)


def abstract_lm(config: LmConfig) -> LM:
    """The module with shapes in place of arrays: costs nothing at any size."""
    return nnx.eval_shape(lambda: LM(config, rngs=nnx.Rngs(0)))


def config_from_hf(file: Path, kinds: Mapping[str, Any]) -> LmConfig:
    """The decoder's shape from a config.json of any transformers version; InputError for what we do not build, by its field."""
    raw = read_json(file)
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{file}: model_type {family!r}, expected one of {', '.join(FAMILIES)}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{file}: hidden_act {raw['hidden_act']!r}, expected silu")
    width, heads, layers = (_number(file, raw, key) for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    if layers > MOST_LAYERS:
        raise InputError(f"{file}: num_hidden_layers is {layers:,}, expected at most {MOST_LAYERS:,}")
    default_head_dim = 128 if family == "qwen3" else width // heads
    bias = bool(raw.get("attention_bias", family == "qwen2"))
    try:
        theta, scaling = _rope(file, raw)
        return LmConfig(
            vocab_size=_number(file, raw, "vocab_size"),
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=_number(file, raw, "num_key_value_heads", 8 if family == "mistral" else heads),
            head_dim=_number(file, raw, "head_dim", default_head_dim),
            mlp_width=_number(file, raw, "intermediate_size"),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tied=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bias,
            output_bias=bias and family != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            windows=_windows(file, raw, layers),
            max_positions=_number(file, raw, "max_position_embeddings", 2048),
            **kinds,
        )
    except InputError:
        raise
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a field of another type than transformers writes
        raise InputError(f"{file}: not the config of a model ({error})") from error


def _number(file: Path, raw: Mapping[str, Any], key: str, default: Any = REQUIRED) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{file}: {key} is {raw.get(key)!r}, expected a positive whole number")
    return value


def _windows(file: Path, raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """Per layer. Mistral: one for all. Qwen: only with use_sliding_window, as layer_types says or from max_window_layers on."""
    family, window = raw["model_type"], raw.get("sliding_window")
    if family == "llama" or not window or (family != "mistral" and not raw.get("use_sliding_window", False)):
        return ()
    if family == "mistral":
        return (window,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = raw.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown or len(kinds) != layers:
        found = f"{len(kinds)} entries, unknown among them: {', '.join(sorted(unknown)) or 'none'}"
        raise InputError(f"{file}: layer_types has {found}; expected {layers} of full_attention or sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(file: Path, raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    fields = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = float(fields.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    partial = fields.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1, 1.0):
        raise InputError(f"{file}: partial_rotary_factor {partial}, expected 1: every dimension of a head is rotated")
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind == "default":
        return theta, None
    try:
        if kind == "linear":
            return theta, RopeScaling("linear", factor=float(fields["factor"]))
        if kind == "llama3":
            original = fields.get("original_max_position_embeddings") or raw["max_position_embeddings"]
            low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
            return theta, RopeScaling("llama3", float(fields["factor"]), low, high, int(original))
    except KeyError as error:
        raise InputError(f"{file}: rope scaling {kind!r} has no {error.args[0]}") from error
    raise InputError(f"{file}: rope scaling {kind!r}, expected default, linear or llama3")
