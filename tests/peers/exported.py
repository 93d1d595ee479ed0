"""Exported models in transformers and sentence-transformers, on real questions: do they say and embed what ours do?

    .venv/bin/python tests/peers/exported.py ours --workdir=runs/demo --output=ours.json --questions=50
    PEER_PYTHON tests/peers/exported.py theirs --models=models --input=ours.json

The first asks our tuned models: the answer to each of k prompts a question, and the vectors of questions and passages. The second, in an
environment with torch, asks the exported folders the same and prints how much agrees.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

NEW_TOKENS = 16


def ours(workdir: str, output: str, questions: int) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from radit_jax import processor

    processor.prepare()  # before JAX starts
    from configs import common
    from radit_jax.evaluation.evaluate import EvaluateOptions, prompts
    from radit_jax.inputs import stored_config
    from radit_jax.pipeline import Pipeline

    pipeline = Pipeline(stored_config(workdir, common.base(), {}), workdir)
    c = pipeline.config
    examples = pipeline.test_examples
    _, retrieval = pipeline.retrieved("test", examples, max(c.evaluate.k, min(10, c.retrieval.k)), tuned=True)
    members, ensemble = list(retrieval)[:questions], pipeline.ensemble(True, max_new_tokens=NEW_TOKENS)
    options = EvaluateOptions(k=c.evaluate.k, score_scale=c.retriever.score_scale)
    prompted = [prompts(ensemble, member.example, member.example.prompt, member, options) for member in members]
    answers = ensemble.generate(prompted)
    passages = [passage.content for member in members for passage in member.passages[: c.evaluate.k]]
    rows = np.concatenate([member.rows_K[: c.evaluate.k] for member in members])
    told = {
        "prompts": [[int(i) for i in ids] for of in prompted for ids in of.prompts],
        "answers": [text for answer in answers for text in answer.own_texts],
        "queries": [member.example.query for member in members],
        "query_vectors": pipeline.embed_queries(True)([member.example.query for member in members]).tolist(),
        "passages": passages,
        "passage_vectors": np.asarray(pipeline.vectors[rows], np.float32).tolist(),
    }
    Path(output).write_text(json.dumps(told))


def theirs(models: str, given: str) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    told = json.loads(Path(given).read_text())
    tokenizer = AutoTokenizer.from_pretrained(f"{models}/lm")
    lm = AutoModelForCausalLM.from_pretrained(f"{models}/lm", dtype=torch.float32)
    same = 0
    for ids, answer in zip(told["prompts"], told["answers"], strict=True):
        out = lm.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
        text = tokenizer.decode(out, skip_special_tokens=True).split("\n")[0].strip()
        same += text == answer
    print(f"answers: {same} of {len(told['answers'])} the same")
    for side, texts, vectors in (("query", "queries", "query_vectors"), ("document", "passages", "passage_vectors")):
        found = SentenceTransformer(f"{models}/{side}_encoder").encode(told[texts])
        print(f"{side}_encoder: vectors of {len(found)} texts, most apart by {np.abs(found - np.asarray(told[vectors])).max():.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=("ours", "theirs"))
    for name in ("workdir", "output", "models", "input"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--questions", type=int, default=50)
    given = parser.parse_args()
    ours(given.workdir, given.output, given.questions) if given.side == "ours" else theirs(given.models, given.input)
