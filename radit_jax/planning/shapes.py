"""The shape of a config's models, from names alone: no weights are read, and none need be there.

Published checkpoints that the configs name stand in a table, since a plan is made before anything is downloaded; of all others the
config.json (or the GGUF header) is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from radit_jax.errors import InputError
from radit_jax.models.encoder import EncoderConfig
from radit_jax.models.layers import RopeScaling
from radit_jax.models.lm import LmConfig
from radit_jax.weights import encoder as encoders
from radit_jax.weights.gguf import GgufFile, config_from_gguf
from radit_jax.weights.hf import first_line, resolve
from radit_jax.weights.lm import config_from_hf

CONFIG = "config.json"


def _llama(width: int, layers: int, heads: int, mlp_width: int, **changes: Any) -> dict[str, Any]:
    """LLaMA (Touvron et al. 2023, table 2); the MLP widths and vocabulary are those of the published config.json files."""
    shape = {"vocab_size": 32_000, "width": width, "layers": layers, "heads": heads, "kv_heads": heads, "head_dim": 128}
    return {**shape, "mlp_width": mlp_width, "norm_eps": 1e-6, **changes}


LMS: Mapping[str, Mapping[str, Any]] = {
    "huggyllama/llama-7b": _llama(4096, 32, 32, 11_008),
    "huggyllama/llama-13b": _llama(5120, 40, 40, 13_824),
    "huggyllama/llama-65b": _llama(8192, 80, 64, 22_016, norm_eps=1e-5),
    "meta-llama/Meta-Llama-3-8B": _llama(
        4096, 32, 32, 14_336, vocab_size=128_256, kv_heads=8, rope_theta=500_000.0, norm_eps=1e-5, max_positions=8192
    ),
    "meta-llama/Llama-3.2-1B": _llama(
        2048, 16, 32, 8192, vocab_size=128_256, kv_heads=8, head_dim=64, rope_theta=500_000.0, norm_eps=1e-5, tied=True,
        rope_scaling=RopeScaling("llama3", factor=32.0), max_positions=131_072,
    ),
}  # fmt: skip
BERT_BASE = {"vocab_size": 30_522, "width": 768, "layers": 12, "heads": 12, "mlp_width": 3072}
ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "facebook/dragon-plus-query-encoder": BERT_BASE,
    "facebook/dragon-plus-context-encoder": BERT_BASE,
}


def lm_config(name: str, **kinds: Any) -> LmConfig:
    """The decoder of a checkpoint name; `kinds` are dtypes, remat and attention."""
    if name in LMS:
        return LmConfig(**LMS[name], **kinds)
    path = _local(name, LMS)
    return config_from_gguf(GgufFile(path), kinds) if path.suffix == ".gguf" else config_from_hf(path, kinds)


def encoder_config(name: str, **kinds: Any) -> EncoderConfig:
    """The encoder of a checkpoint name; `kinds` are dtypes, remat, pooling and normalize."""
    return EncoderConfig(**ENCODERS[name], **kinds) if name in ENCODERS else encoders.encoder_config(_local(name, ENCODERS), kinds)


def _local(name: str, known: Mapping[str, Any]) -> Path:
    """The config.json or GGUF file of a checkpoint that is here, or the config.json alone from the Hub."""
    if name.startswith("package:") or Path(name).expanduser().exists() or name.startswith(("/", ".", "~")):
        path = resolve(name)
        return path if path.is_file() else path / CONFIG
    try:
        return Path(hf_hub_download(name, CONFIG))
    except Exception as error:  # network, cache, id, permission: each has its own class and a page of text
        raise InputError(
            f"{name}: no such folder, and no {CONFIG} from the Hub ({first_line(error)}); known without one are {', '.join(known)}"
        ) from error
