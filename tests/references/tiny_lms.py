"""Tiny random checkpoints of every decoder family, the same with and without torch: a config and a rule that draws each tensor.

`make_lm_references.py` runs them through transformers; the tests write them as checkpoint folders and compare.
"""

from __future__ import annotations

import zlib

import numpy as np

ROWS, TOKENS = 2, 24
_BASE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
# Of the four pairs of a head, at rope_theta 500, one is kept, one blended and two stretched.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LLAMA = _BASE | {"model_type": "llama"}
_TIED = {"tie_word_embeddings": True}
_SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


def _rope(theta: float) -> dict:
    """How transformers 5 writes it; the other configs are as earlier versions wrote them."""
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}


FAMILIES = {
    "llama1": _LLAMA | {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama2": _LLAMA | {"rope_theta": 10000.0, "rope_scaling": None},
    "llama3": _LLAMA | {"rope_theta": 500.0, "rope_scaling": _LLAMA3_ROPE},
    "llama_biased": _LLAMA | {"attention_bias": True, "mlp_bias": True} | _rope(300.0),
    "llama_linear": _LLAMA | {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "smollm2": _LLAMA | {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 24, "rope_theta": 100000.0} | _TIED,
    "mistral": _BASE | {"model_type": "mistral", "sliding_window": 5, "rope_theta": 10000.0},
    "mistral_wide_heads": _BASE | {"model_type": "mistral", "sliding_window": None, "head_dim": 12, "rope_theta": 1000000.0},
    "qwen2": _BASE | {"model_type": "qwen2", "rope_theta": 1000000.0, "sliding_window": 5, "use_sliding_window": False} | _TIED,
    "qwen2_sliding": _BASE | {"model_type": "qwen2", "rope_theta": 1000000.0} | _SLIDING,
    "qwen3": _BASE | {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1000000.0} | _TIED,
    "qwen3_sliding": _BASE | {"model_type": "qwen3", "head_dim": 16} | _rope(10000.0) | _SLIDING,
}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weights of one tensor, from its name alone: large enough that every part of the model shows in the logits."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = rng.standard_normal(shape)
    return (1 + 0.3 * values if "norm" in name else 0.3 * values).astype(np.float32)


def tokens(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, vocab_size, (ROWS, TOKENS)).astype(np.int32)
