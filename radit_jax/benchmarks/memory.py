"""How host memory grows with the corpus (`launch/bench.py memory`): text → passages → vectors, in a process of its own for every size.

The encoder is tiny and random, so that a million passages take minutes: what is measured is everything around it, tokenizing included.
What stays with every passage is on disk (16 bytes of index, 8 of its document, its vector) and memory-mapped.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax import resident

SAMPLE_S = 0.25  # between two looks at the resident memory
LARGEST_GROWTH = 1.5  # of resident memory, from the first size to the last


def bench(sizes: Sequence[int], tokenizer: str) -> dict[str, Any]:
    """Resident memory (MiB) of each size, and how many times that of the first the last takes."""
    found = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="bench") as folder:
            command = [sys.executable, "-m", __name__, str(size), folder, tokenizer]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    growth = {key: round(found[-1][key] / found[0][key], 3) for key in ("median_mib", "peak_mib")}
    return {"kind": "memory", "sizes": found, "growth": growth, "flat": growth["peak_mib"] <= LARGEST_GROWTH}


def text(result: dict[str, Any]) -> str:
    """The result as people read it."""
    lines = [
        f"memory: {size['passages']:,} passages: resident {size['median_mib']} MiB (median), {size['peak_mib']} MiB (peak), "
        f"before {size['before_mib']} MiB; passages {size['store_s']} s, vectors {size['embed_s']} s"
        for size in result["sizes"]
    ]
    growth = result["growth"]
    return "\n".join([*lines, f"memory: growth {growth['median_mib']:.2f} (median), {growth['peak_mib']:.2f} (peak)"])


def measure(passages: int, folder: Path, tokenizer_name: str) -> dict[str, Any]:
    """Makes a store and vectors of `passages` invented passages in `folder` while the resident memory of this process is watched."""
    from radit_jax import sharding
    from radit_jax.data.corpus import PassageStore, build_store
    from radit_jax.data.invented import Invented
    from radit_jax.data.tokenizer import load_tokenizer
    from radit_jax.retrieval.embed import embed_passages
    from radit_jax.retrieval.encode import encoding

    mesh = sharding.make_mesh(1, 1)
    tokenizer = load_tokenizer(tokenizer_name)
    encode = encoding(_tiny_encoder(tokenizer.vocab_size), mesh)
    for name in ("store", "vectors"):
        (folder / name).mkdir()
    before = resident.now_mib()
    with Watch() as watch:
        build_store(Invented(passages).corpus(), folder / "store", max_words=60)
        split = watch.seconds()
        embed_passages(encode, tokenizer, PassageStore(folder / "store"), folder / "vectors", batch_tokens=8192, max_tokens=256)
        whole = watch.seconds()
    return {
        "passages": passages,
        "before_mib": before,
        "median_mib": round(float(np.median(watch.found))),
        "peak_mib": max(watch.found),
        "store_s": round(split, 1),
        "embed_s": round(whole - split, 1),
    }


class Watch:
    """Looks at the resident memory of this process again and again while the block runs."""

    def __enter__(self) -> Watch:
        self._began = time.monotonic()
        self.found = [resident.now_mib()]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join()
        self.found.append(resident.now_mib())

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def _look(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self.found.append(resident.now_mib())


def _tiny_encoder(vocab_size: int):
    from flax import nnx

    from radit_jax.models.encoder import Encoder, EncoderConfig

    config = EncoderConfig(vocab_size, width=16, layers=1, heads=1, mlp_width=16, max_positions=256, pooling="mean")
    return Encoder(config, rngs=nnx.Rngs(0))


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])))
