"""The peer of `launch/bench.py embed`: sentence-transformers' `encode` as it ships. The protocol is protocol.py's.

PYTHON_WITH_SENTENCE_TRANSFORMERS tests/peers/sentence_transformers_peer.py job.json
"""

from __future__ import annotations

import sys

import torch
from torch_peer import serve


def embed(job: dict):
    """Vectors of the texts."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(job["model"], model_kwargs={"dtype": getattr(torch, job["dtype"])})
    model.max_seq_length = job["max_tokens"]
    return lambda: model.encode(job["texts"], convert_to_numpy=False, convert_to_tensor=True).float().tolist()


if __name__ == "__main__":
    serve(sys.argv[1], {"embed": embed})
