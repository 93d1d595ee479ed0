"""Ours against a peer on the same records, in one run.

    python launch/bench.py all --peer_python=PYTHON_WITH_TORCH [--records 64] [--json] [--config.lm.dtype=float32]
    python launch/bench.py search --peer_python=PYTHON_WITH_FAISS [--vectors 1000000] [--dim 384] [--queries 1000] [--json]
    python launch/bench.py memory [--passages 100000,1000000] [--json]
    python launch/bench.py growth [--stages embed,score,lm_ft] [--records 64] [--json]
    python launch/bench.py utilisation [--stages lm_step,score,prefill,decode] [--config.lm.checkpoint=meta-llama/Llama-3.2-1B] [--json]

embed, score, lm_ft, lsr_ft and generate (or all) meet transformers + torch in the config's precision; search meets faiss; memory: what
grows with the corpus; growth: what a token costs among eight times as many; utilisation: what share of the device's peak our programs
use, on random weights of any shape. embed also meets sentence-transformers, generate
transformers' own `generate`, embed, score and lm_ft fed-rag, as they ship.
"""

import os

from absl import flags

from radit_jax import command
from radit_jax.benchmarks import ask

CONFIG = command.config_flag()
FLAGS = [
    flags.DEFINE_string("peer_python", os.environ.get("RADIT_PEER_PYTHON"), "A Python with torch, or faiss; none: ours alone."),
    flags.DEFINE_integer("records", None, "Passages (embed) or questions; default 512, 24 (score), 512 (lsr_ft), 16.", lower_bound=1),
    flags.DEFINE_list("stages", None, "growth, utilisation: which; default all. growth: --records is the smaller number of each."),
    flags.DEFINE_integer("repetitions", 3, "Counted runs of each side, after one that warms up.", lower_bound=1),
    flags.DEFINE_integer("vectors", 100_000, "search: vectors.", lower_bound=10),
    flags.DEFINE_integer("dim", 384, "search: dimension of the vectors.", lower_bound=1),
    flags.DEFINE_integer("queries", 1_000, "search: queries.", lower_bound=1),
    flags.DEFINE_list("indexes", ["exact", "scann"], "search: exact, scann or both."),
    flags.DEFINE_list("passages", ["100000", "1000000"], "memory: invented passages, smallest first."),
    flags.DEFINE_bool("json", False, "Print JSON."),
]


def main(arguments: list[str]) -> int | None:
    kinds = ask.kinds(arguments)
    if len(kinds) > 1:
        return ask.one_by_one(kinds)
    given = {flag.name: flag.value for flag in FLAGS}
    for line in ask.lines(kinds[0], given, CONFIG.value, lambda: command.pipeline(CONFIG)):
        print(line, flush=True)


if __name__ == "__main__":
    command.run(main)
