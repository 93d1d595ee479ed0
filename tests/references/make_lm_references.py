"""Makes lm_references.npz with transformers and torch in float32: run once, in an environment that has them, never by the tests.

    python tests/references/make_lm_references.py PATH/TO/SmolLM2-135M-Instruct.Q4_1.gguf

Stored: the logits of every tiny family (and the shapes of its tensors), and of the real SmolLM2 every STRIDE-th logit and the
log-sum-exp over all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tiny_lms import FAMILIES, draw, tokens

STRIDE = 97
TEXT = "The capital of France is Paris. Photosynthesis is the process by which plants turn light into"


def tiny(config: dict) -> tuple[np.ndarray, dict]:
    fields = dict(config)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(fields.pop("model_type"), **fields), attn_implementation="eager", dtype=torch.float32
    ).eval()
    weights = {name: torch.from_numpy(draw(name, tuple(value.shape))) for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    stored = {name: list(value.shape) for name, value in weights.items()}
    if config["tie_word_embeddings"]:  # the tied head was filled last: put the embedding back
        del stored["lm_head.weight"]
        model.get_input_embeddings().weight.data.copy_(weights["model.embed_tokens.weight"])
    with torch.no_grad():
        return model(torch.from_numpy(tokens(config["vocab_size"])).long()).logits.numpy(), stored


def smollm2(file: Path) -> dict[str, np.ndarray]:
    load = {"gguf_file": file.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, attn_implementation="eager", **load).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = np.asarray([tokenizer(TEXT, add_special_tokens=False)["input_ids"]], np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids).long()).logits
    lse = torch.logsumexp(logits, -1).numpy()
    return {"smollm2_real/tokens": ids, "smollm2_real/logits": logits[..., ::STRIDE].numpy(), "smollm2_real/lse": lse}


def main() -> None:
    out: dict[str, np.ndarray] = {}
    for name, config in FAMILIES.items():
        logits, shapes = tiny(config)
        out[f"{name}/logits"], out[f"{name}/shapes"] = logits, np.asarray(json.dumps(shapes))
    out |= smollm2(Path(sys.argv[1]))
    np.savez_compressed(Path(__file__).with_name("lm_references.npz"), **out)


if __name__ == "__main__":
    main()
