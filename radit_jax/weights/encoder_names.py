"""Names of the encoder's parameters in BERT-family checkpoints, in all the spellings that are about."""

from __future__ import annotations

from collections.abc import Collection

from radit_jax.weights.hf import Name

# fmt: off
_ENCODER = (
    # ours                          Hugging Face                                                  stored (out, in)
    ("embed/word/embedding",        "embeddings.word_embeddings.weight",                          False),
    ("embed/position/embedding",    "embeddings.position_embeddings.weight",                      False),
    ("embed/type/embedding",        "embeddings.token_type_embeddings.weight",                    False),
    ("embed/norm/scale",            "embeddings.LayerNorm.weight",                                False),
    ("embed/norm/bias",             "embeddings.LayerNorm.bias",                                  False),
    ("blocks/attention/q/kernel",   "encoder.layer.{layer}.attention.self.query.weight",          True),
    ("blocks/attention/q/bias",     "encoder.layer.{layer}.attention.self.query.bias",            False),
    ("blocks/attention/k/kernel",   "encoder.layer.{layer}.attention.self.key.weight",            True),
    ("blocks/attention/k/bias",     "encoder.layer.{layer}.attention.self.key.bias",              False),
    ("blocks/attention/v/kernel",   "encoder.layer.{layer}.attention.self.value.weight",          True),
    ("blocks/attention/v/bias",     "encoder.layer.{layer}.attention.self.value.bias",            False),
    ("blocks/attention/o/kernel",   "encoder.layer.{layer}.attention.output.dense.weight",        True),
    ("blocks/attention/o/bias",     "encoder.layer.{layer}.attention.output.dense.bias",          False),
    ("blocks/attention_norm/scale", "encoder.layer.{layer}.attention.output.LayerNorm.weight",    False),
    ("blocks/attention_norm/bias",  "encoder.layer.{layer}.attention.output.LayerNorm.bias",      False),
    ("blocks/mlp/up/kernel",        "encoder.layer.{layer}.intermediate.dense.weight",            True),
    ("blocks/mlp/up/bias",          "encoder.layer.{layer}.intermediate.dense.bias",              False),
    ("blocks/mlp/down/kernel",      "encoder.layer.{layer}.output.dense.weight",                  True),
    ("blocks/mlp/down/bias",        "encoder.layer.{layer}.output.dense.bias",                    False),
    ("blocks/mlp_norm/scale",       "encoder.layer.{layer}.output.LayerNorm.weight",              False),
    ("blocks/mlp_norm/bias",        "encoder.layer.{layer}.output.LayerNorm.bias",                False),
)
# fmt: on

HF_ENCODER = tuple(Name(*row) for row in _ENCODER)

# Tensors that are no parameters of ours: a pooler over [CLS] that no retriever uses, pre-training heads, a stored arange.
HF_ENCODER_UNUSED = r"(\w+\.)?(pooler\..*|embeddings\.position_ids)|(cls|lm_head)\..*"


def encoder_names(tensors: Collection[str]) -> tuple[Name, ...]:
    """The table as `tensors` spell it: under ``bert.`` or ``roberta.`` in models with a head, gamma and beta in the oldest files."""
    prefixes = [p for p in ("", "bert.", "roberta.") if any(name.startswith(p + "embeddings.") for name in tensors)]
    prefix = prefixes[0] if prefixes else ""
    old = any(name.endswith("LayerNorm.gamma") for name in tensors)
    return tuple(Name(row.path, prefix + (_old_norm(row.tensor) if old else row.tensor), row.transpose) for row in HF_ENCODER)


def _old_norm(name: str) -> str:
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
