"""Names of the decoder's parameters in checkpoints: ours, Hugging Face's, GGUF's, and whether the kernel is stored (out, in).

Llama, Mistral, Qwen2 and Qwen3 share these names; rows that a model does not have are passed over.
"""

from __future__ import annotations

from radit_jax.weights.hf import Name

# fmt: off
_LM = (
    # ours                             Hugging Face                                          GGUF                             transposed
    ("embed/embedding",                "model.embed_tokens.weight",                          "token_embd.weight",             False),
    ("blocks/attention_norm/scale",    "model.layers.{layer}.input_layernorm.weight",        "blk.{layer}.attn_norm.weight",  False),
    ("blocks/attention/q/kernel",      "model.layers.{layer}.self_attn.q_proj.weight",       "blk.{layer}.attn_q.weight",     True),
    ("blocks/attention/q/bias",        "model.layers.{layer}.self_attn.q_proj.bias",         "blk.{layer}.attn_q.bias",       False),
    ("blocks/attention/k/kernel",      "model.layers.{layer}.self_attn.k_proj.weight",       "blk.{layer}.attn_k.weight",     True),
    ("blocks/attention/k/bias",        "model.layers.{layer}.self_attn.k_proj.bias",         "blk.{layer}.attn_k.bias",       False),
    ("blocks/attention/v/kernel",      "model.layers.{layer}.self_attn.v_proj.weight",       "blk.{layer}.attn_v.weight",     True),
    ("blocks/attention/v/bias",        "model.layers.{layer}.self_attn.v_proj.bias",         "blk.{layer}.attn_v.bias",       False),
    ("blocks/attention/o/kernel",      "model.layers.{layer}.self_attn.o_proj.weight",       "blk.{layer}.attn_output.weight", True),
    ("blocks/attention/o/bias",        "model.layers.{layer}.self_attn.o_proj.bias",         "blk.{layer}.attn_output.bias",  False),
    ("blocks/attention/q_norm/scale",  "model.layers.{layer}.self_attn.q_norm.weight",       "blk.{layer}.attn_q_norm.weight", False),
    ("blocks/attention/k_norm/scale",  "model.layers.{layer}.self_attn.k_norm.weight",       "blk.{layer}.attn_k_norm.weight", False),
    ("blocks/mlp_norm/scale",          "model.layers.{layer}.post_attention_layernorm.weight", "blk.{layer}.ffn_norm.weight", False),
    ("blocks/mlp/gate/kernel",         "model.layers.{layer}.mlp.gate_proj.weight",          "blk.{layer}.ffn_gate.weight",   True),
    ("blocks/mlp/gate/bias",           "model.layers.{layer}.mlp.gate_proj.bias",            "blk.{layer}.ffn_gate.bias",     False),
    ("blocks/mlp/up/kernel",           "model.layers.{layer}.mlp.up_proj.weight",            "blk.{layer}.ffn_up.weight",     True),
    ("blocks/mlp/up/bias",             "model.layers.{layer}.mlp.up_proj.bias",              "blk.{layer}.ffn_up.bias",       False),
    ("blocks/mlp/down/kernel",         "model.layers.{layer}.mlp.down_proj.weight",          "blk.{layer}.ffn_down.weight",   True),
    ("blocks/mlp/down/bias",           "model.layers.{layer}.mlp.down_proj.bias",            "blk.{layer}.ffn_down.bias",     False),
    ("final_norm/scale",               "model.norm.weight",                                  "output_norm.weight",            False),
    ("head/kernel",                    "lm_head.weight",                                     "output.weight",                 True),
)
# fmt: on

HF_LM = tuple(Name(path, tensor, transpose) for path, tensor, _, transpose in _LM)
GGUF_LM = tuple(Name(path, tensor, transpose) for path, _, tensor, transpose in _LM)

# Tensors that are no parameters: rotary tables that old checkpoints stored, and the head that tied ones store a second time.
HF_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
HF_TIED_HEAD = r"lm_head\.weight"
GGUF_BUFFERS = r"rope_freqs\.weight"  # read into the config
