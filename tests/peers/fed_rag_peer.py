"""The peer of `launch/bench.py` that people would install: fed-rag as it ships, on the same records.

    PYTHON_WITH_FED_RAG tests/peers/fed_rag_peer.py job.json

The protocol is torch_peer.py's. `score` is its `compute_target_sequence_proba`, one passage at a time; `embed` its retriever's
`encode_context`. The prompts are given as texts, for it tokenizes itself.
"""

from __future__ import annotations

import math
import sys

import torch
from torch_peer import serve


def score(job: dict):
    """log of the probability that it gives each target after its prompt. Models are loaded in the precision that is asked for."""
    from fed_rag.generators.huggingface import HFPretrainedModelGenerator

    generator = HFPretrainedModelGenerator(job["model"], load_model_kwargs={"dtype": getattr(torch, job["dtype"])})
    generator.model.eval()

    def run():
        logp = []
        for prompt, target in job["texts"]:
            probability = float(generator.compute_target_sequence_proba(prompt, target))
            logp.append(math.log(max(probability, 1e-38)))
        return logp

    return run


def embed(job: dict):
    """Vectors of the texts."""
    from fed_rag.retrievers.huggingface import HFSentenceTransformerRetriever

    retriever = HFSentenceTransformerRetriever(model_name=job["model"])
    return lambda: retriever.encode_context(job["texts"]).tolist()


KINDS = {"embed": embed, "score": score}

if __name__ == "__main__":
    serve(sys.argv[1], KINDS)
