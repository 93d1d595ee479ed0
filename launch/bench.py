"""Ours against a peer on the same records, in one run.

    python launch/bench.py all --peer_python=PYTHON_WITH_TORCH [--records 64] [--json] [--config.lm.dtype=float32]
    python launch/bench.py search --peer_python=PYTHON_WITH_FAISS [--vectors 1000000] [--dim 384] [--queries 1000] [--json]
    python launch/bench.py memory [--passages 100000,1000000] [--json]

embed, score, lm_ft and generate (or all four) against transformers + torch in float32; search against faiss; memory: how the resident
memory of embedding grows with the corpus.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable

from absl import flags

from radit_jax import command

KINDS = ("embed", "score", "lm_ft", "generate")  # those of "all"
SCALES = ("search", "memory")
CONFIG = command.config_flag()
PEER_PYTHON = flags.DEFINE_string("peer_python", os.environ.get("RADIT_PEER_PYTHON"), "A Python with torch, or faiss; none: ours alone.")
RECORDS = flags.DEFINE_integer("records", None, "Passages (embed) or questions; default 512, 24 (score), 16.", lower_bound=1)
REPETITIONS = flags.DEFINE_integer("repetitions", 3, "Counted runs of each side, after one that warms up.", lower_bound=1)
VECTORS = flags.DEFINE_integer("vectors", 100_000, "search: vectors.", lower_bound=10)
DIM = flags.DEFINE_integer("dim", 384, "search: dimension of the vectors.", lower_bound=1)
QUERIES = flags.DEFINE_integer("queries", 1_000, "search: queries.", lower_bound=1)
INDEXES = flags.DEFINE_list("indexes", ["exact", "scann"], "search: exact, scann or both.")
PASSAGES = flags.DEFINE_list("passages", ["100000", "1000000"], "memory: invented passages, smallest first.")
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or not set(arguments) <= {*KINDS, *SCALES, "all"}:
        raise command.InputError(f"expected one of {', '.join((*KINDS, *SCALES))}, all; found {' '.join(arguments)!r}")
    kind = arguments[0] if arguments else "all"
    if kind == "all":  # a process for each, so that memory and caches are its own
        flagged = [argument for argument in sys.argv[1:] if argument != "all"]
        sys.exit(max(subprocess.run([sys.executable, sys.argv[0], one, *flagged]).returncode for one in KINDS))
    for line in MEASURES.get(kind, against_torch)(kind):
        print(line, flush=True)


def against_torch(kind: str) -> list[str]:
    from radit_jax import bench, contest

    records = RECORDS.value or {"embed": 512, "score": 24}.get(kind, 16)
    pipeline = command.pipeline(CONFIG)
    result = bench.bench(pipeline, kind, records=records, repetitions=REPETITIONS.value, peer_python=PEER_PYTHON.value)
    return [json.dumps(result) if JSON.value else contest.text([result])]


def search(kind: str) -> Iterable[str]:
    from radit_jax import bench_search

    sizes = VECTORS.value, DIM.value, QUERIES.value
    results = bench_search.bench(*sizes, kinds=INDEXES.value, repetitions=REPETITIONS.value, peer_python=PEER_PYTHON.value)
    return map(json.dumps if JSON.value else bench_search.text, results)


def memory(kind: str) -> list[str]:
    from radit_jax import bench_memory

    if not all(size.isdigit() for size in PASSAGES.value):
        raise command.InputError(f"--passages is {','.join(PASSAGES.value)!r}, expected numbers as 100000,1000000")
    result = bench_memory.bench([int(size) for size in PASSAGES.value], CONFIG.value.retriever.document_encoder)
    return [json.dumps(result) if JSON.value else bench_memory.text(result)]


MEASURES = {"search": search, "memory": memory}


if __name__ == "__main__":
    command.run(main)
