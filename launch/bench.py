"""Ours against transformers + torch float32 on the same records, in one run: embed, score, lm_ft, generate, or all four ratios.

    python launch/bench.py all --peer_python=PYTHON_WITH_TORCH [--records 64] [--json] [--config.lm.dtype=float32]
"""

import json
import os
import subprocess
import sys

from absl import flags

from radit_jax import command

KINDS = ("embed", "score", "lm_ft", "generate")
CONFIG = command.config_flag()
PEER_PYTHON = flags.DEFINE_string("peer_python", os.environ.get("RADIT_PEER_PYTHON"), "A Python that has torch; none: ours alone.")
RECORDS = flags.DEFINE_integer("records", None, "Passages (embed) or questions; default 512, 24 (score), 16.", lower_bound=1)
REPETITIONS = flags.DEFINE_integer("repetitions", 3, "Counted runs of each side, after one that warms up.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or not set(arguments) <= {*KINDS, "all"}:
        raise command.InputError(f"expected one of {', '.join(KINDS)}, all; found {' '.join(arguments)!r}")
    kind = arguments[0] if arguments else "all"
    if kind == "all":  # a process for each, so that memory and caches are its own
        flagged = [argument for argument in sys.argv[1:] if argument != "all"]
        sys.exit(max(subprocess.run([sys.executable, sys.argv[0], one, *flagged]).returncode for one in KINDS))
    from radit_jax import bench

    records = RECORDS.value or {"embed": 512, "score": 24}.get(kind, 16)
    pipeline = command.pipeline(CONFIG)
    result = bench.bench(pipeline, kind, records=records, repetitions=REPETITIONS.value, peer_python=PEER_PYTHON.value)
    print(json.dumps(result) if JSON.value else bench.text([result]), flush=True)


if __name__ == "__main__":
    command.run(main)
