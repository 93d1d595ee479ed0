"""An encoder from a checkpoint string: architecture from config.json, pooling and unit norm from what sentence-transformers wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from radit_jax.errors import InputError
from radit_jax.models.encoder import POOLINGS, Encoder, EncoderConfig
from radit_jax.weights.encoder_names import HF_ENCODER_UNUSED, encoder_names
from radit_jax.weights.hf import Place, Safetensors, fill, on_default_device, read_json, resolve

FAMILIES = ("bert", "roberta", "xlm-roberta")  # model_type; DRAGON+, Contriever, MiniLM, E5 and BGE say bert
MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers: what we compute
MODE = "pooling_mode"


def load_encoder(
    name: str,
    *,
    pooling: str | None = None,
    normalize: bool | None = None,
    dtype: Any = "float32",
    param_dtype: Any = "float32",
    remat: str = "none",
    place: Place = on_default_device,
    check: Callable[[EncoderConfig], None] = lambda config: None,
) -> Encoder:
    """Returns the encoder of a folder, Hub id or ``package:`` checkpoint; `encoder.config` is what was read.

    `pooling` ("cls" | "mean") and `normalize` override what the checkpoint says of itself, and `pooling` is required where it says
    nothing (DRAGON+: "cls", Contriever: "mean"). `dtype` is the compute dtype, `param_dtype` the storage dtype, and
    `place(path, shape, read)` puts each parameter on its devices; `check` sees the config before any is read.
    InputError for everything that is wrong with the checkpoint.
    """
    folder = resolve(name)
    if folder.is_file():
        raise InputError(f"{name}: an encoder is a folder with config.json and safetensors, not a GGUF file")
    said_pooling, said_normalize = read_pooling(folder, needed=pooling is None)
    pooling = pooling or said_pooling
    if pooling is None:
        raise InputError(f"{folder}: has no modules.json that says how to pool: set pooling to {' or '.join(POOLINGS)}")
    kinds = {"dtype": jnp.dtype(dtype).name, "param_dtype": jnp.dtype(param_dtype).name, "remat": remat}
    normalize = said_normalize if normalize is None else normalize
    config = encoder_config(folder / "config.json", {"pooling": pooling, "normalize": normalize, **kinds})
    check(config)
    tensors = Safetensors(folder)
    names = encoder_names(tensors.shapes)
    module = abstract_encoder(config)
    return fill(module, names, tensors, param_dtype=jnp.dtype(param_dtype), ignore=HF_ENCODER_UNUSED, place=place)


def abstract_encoder(config: EncoderConfig) -> Encoder:
    """The module with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))


def encoder_config(file: Path, chosen: Mapping[str, Any]) -> EncoderConfig:
    """The encoder's shape from a config.json; InputError for what we do not build, by its field. `chosen`: pooling, dtypes."""
    raw = read_json(file)
    family = raw.get("model_type")
    for key, found, expected in (
        ("model_type", family, FAMILIES),
        ("hidden_act", raw.get("hidden_act", "gelu"), ("gelu",)),
        ("position_embedding_type", raw.get("position_embedding_type", "absolute"), ("absolute",)),
    ):
        if found not in expected:
            raise InputError(f"{file}: {key} {found!r}, expected {' or '.join(expected)}")
    # RoBERTa counts positions from the id of its padding token plus one.
    offset = 0 if family == "bert" else int(raw.get("pad_token_id", 1)) + 1
    try:
        return EncoderConfig(
            vocab_size=_number(file, raw, "vocab_size"),
            width=_number(file, raw, "hidden_size"),
            layers=_number(file, raw, "num_hidden_layers"),
            heads=_number(file, raw, "num_attention_heads"),
            mlp_width=_number(file, raw, "intermediate_size"),
            max_positions=_number(file, raw, "max_position_embeddings") - offset,
            position_offset=offset,
            types=_number(file, raw, "type_vocab_size"),
            norm_eps=float(raw.get("layer_norm_eps", 1e-12)),
            **chosen,
        )
    except ValueError as error:
        raise error if isinstance(error, InputError) else InputError(f"{file}: {error}") from error


def _number(file: Path, raw: Mapping[str, Any], key: str) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or value < 1:
        raise InputError(f"{file}: {key} is {value!r}, expected a positive whole number")
    return value


def check_pair(query: str, document: str) -> None:
    """InputError if the two encoders of a retriever do not share one vector space's size: told from their configs, before any work."""
    files = [resolve(name) / "config.json" for name in (query, document)]
    widths = [_number(file, read_json(file), "hidden_size") for file in files]
    if widths[0] != widths[1]:
        raise InputError(f"query encoder {query} has vectors of {widths[0]}, document encoder {document} of {widths[1]}: expected the same")


def read_pooling(folder: Path, *, needed: bool = True) -> tuple[str | None, bool]:
    """(pooling or None, normalize) as modules.json and 1_Pooling/config.json have it; (None, False) without modules.json.

    InputError for modules and, if the pooling is `needed`, for poolings that we do not compute.
    """
    file = folder / "modules.json"
    if not file.exists():
        return None, False
    modules = {entry["type"].rsplit(".", 1)[-1]: entry["path"] for entry in _entries(file)}
    unknown = sorted(set(modules) - set(MODULES))
    if unknown:
        raise InputError(f"{file}: module {unknown[0]} is not one of {', '.join(MODULES)}")
    normalize = "Normalize" in modules
    if not needed or "Pooling" not in modules:
        return None, normalize
    return _pooling_mode(folder / modules["Pooling"] / "config.json"), normalize


def _entries(file: Path) -> list[dict[str, str]]:
    """modules.json: a list of {"type": dotted class, "path": folder}."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        if all({"type", "path"} <= entry.keys() for entry in entries):
            return entries
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not readable as a list of modules") from error
    raise InputError(f"{file}: a module has no type or no path")


def _pooling_mode(file: Path) -> str:
    """Old files have one flag per mode, new ones name it."""
    raw = read_json(file)
    flags = [key for key, on in raw.items() if key.startswith(MODE + "_") and on is True]
    named = raw.get(MODE, [re.sub(r"_tokens?$", "", key.removeprefix(MODE + "_")) for key in flags])
    modes = [named] if isinstance(named, str) else list(named)
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise InputError(f"{file}: pooling {' + '.join(modes) or 'nothing'}, expected {' or '.join(POOLINGS)}")
    return modes[0]
