"""Makes encoder_references.npz: vectors of transformers' encoders in float32, for tests/test_encoder.py.

Needs torch, transformers and sentence-transformers, which the project itself does not. From the repository root:

    python tests/references/make_encoder_references.py MINILM_FOLDER

The tiny encoders have the shapes of DRAGON+ and of XLM-RoBERTa in small, and random weights that `tiny_checkpoint` makes again in
the tests. Outputs: minilm_{tokens,mask,vectors}, and {kind}_{tokens,mask,vectors} of each tiny kind.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np

OUTPUT = Path(__file__).with_name("encoder_references.npz")

TEXTS = (
    "who wrote the first history of the valley",
    "The mill was built in 1742. It burned down twice, and it was never insured.",
    "",
    "def area(r):\n    return 3.14159 * r ** 2  # not exact",
    "Ünïcödé ÄND áccents; naïve café",
    "東京は日本の首都です。 서울은 한국의 수도이다",
    "emoji 🙂🚀 and    odd \t spaces\u00a0here",
    "[CLS] literal [SEP] marks [MASK]",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "long " * 400 + "tail that is cut",
)
MAX_TOKENS = 256

# kind -> (seed, model_type, pooling, normalize)
TINY = {
    "dragon_query": (1, "bert", "cls", False),
    "dragon_document": (2, "bert", "cls", False),
    "contriever": (3, "bert", "mean", False),
    "roberta": (4, "xlm-roberta", "mean", True),
}


def tiny_config(model_type: str) -> dict:
    """config.json of a tiny encoder with nothing square, so that a transposed or swapped tensor cannot fit."""
    return {
        "model_type": model_type,
        "vocab_size": 211,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 112,
        "max_position_embeddings": 66 if model_type == "xlm-roberta" else 64,
        "type_vocab_size": 1 if model_type == "xlm-roberta" else 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "pad_token_id": 1 if model_type == "xlm-roberta" else 0,
    }


def tiny_tensors(model_type: str, seed: int) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face names; large enough that every part matters, norms and biases too."""
    c, random = tiny_config(model_type), np.random.RandomState(seed)
    width, inner = c["hidden_size"], c["intermediate_size"]
    shapes = {
        "embeddings.word_embeddings.weight": (c["vocab_size"], width),
        "embeddings.position_embeddings.weight": (c["max_position_embeddings"], width),
        "embeddings.token_type_embeddings.weight": (c["type_vocab_size"], width),
        **_norm("embeddings.LayerNorm", width),
    }
    for layer in range(c["num_hidden_layers"]):
        at = f"encoder.layer.{layer}."
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            shapes |= {f"{at}{part}.weight": (width, width), f"{at}{part}.bias": (width,)}
        shapes |= {f"{at}intermediate.dense.weight": (inner, width), f"{at}intermediate.dense.bias": (inner,)}
        shapes |= {f"{at}output.dense.weight": (width, inner), f"{at}output.dense.bias": (width,)}
        shapes |= _norm(f"{at}attention.output.LayerNorm", width) | _norm(f"{at}output.LayerNorm", width)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: _scaled(name, value) for name, value in tensors.items()}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _scaled(name: str, value: np.ndarray) -> np.ndarray:
    if "LayerNorm.weight" in name:
        return 1 + np.float32(0.2) * value
    return value * np.float32(0.5 if value.ndim == 1 else 2 * value.shape[1] ** -0.5)


def tiny_checkpoint(folder: Path, model_type: str, seed: int) -> None:
    """Writes config.json and model.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(tiny_config(model_type)))
    save_file(tiny_tensors(model_type, seed), folder / "model.safetensors")


def tiny_batch(model_type: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens_BxT and mask_BxT with rows of every length; padding is the pad id."""
    c, random = tiny_config(model_type), np.random.RandomState(99)
    tokens = random.randint(5, c["vocab_size"], (6, 23))
    mask = np.arange(23)[None] < np.array([23, 1, 2, 9, 16, 22])[:, None]
    return np.where(mask, tokens, c["pad_token_id"]).astype(np.int32), mask


def main(minilm: str) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    def vectors(model, tokens, mask, pooling, normalize):
        with torch.inference_mode():
            ids, mask = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
            weights = mask[..., None].float()
            pooled = hidden[:, 0] if pooling == "cls" else (hidden * weights).sum(1) / weights.sum(1)
            return (torch.nn.functional.normalize(pooled) if normalize else pooled).numpy()

    found = {}
    for kind, (seed, model_type, pooling, normalize) in TINY.items():
        tokens, mask = tiny_batch(model_type)
        with tempfile.TemporaryDirectory() as folder:
            tiny_checkpoint(Path(folder), model_type, seed)
            model = AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
        found |= {f"{kind}_tokens": tokens, f"{kind}_mask": mask, f"{kind}_vectors": vectors(model, tokens, mask, pooling, normalize)}

    whole = SentenceTransformer(minilm, device="cpu")
    batch = whole.tokenizer(list(TEXTS), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="np")
    tokens, mask = batch["input_ids"].astype(np.int32), batch["attention_mask"].astype(bool)
    model = AutoModel.from_pretrained(minilm, attn_implementation="eager", dtype=torch.float32).eval()
    found |= {"minilm_tokens": tokens, "minilm_mask": mask, "minilm_vectors": vectors(model, tokens, mask, "mean", True)}
    apart = np.abs(whole.encode(list(TEXTS)) - found["minilm_vectors"]).max()
    print(f"sentence-transformers' own encode differs by at most {apart:.2e}")
    np.savez_compressed(OUTPUT, **found)
    print(f"{OUTPUT.name}: {', '.join(f'{key} {value.shape}' for key, value in found.items())}")


if __name__ == "__main__":
    main(sys.argv[1])
