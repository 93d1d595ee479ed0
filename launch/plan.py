"""Compiles what a config runs for TPU chips that are not there, and says what it would need and cost on them.

    python launch/plan.py --config=configs/lm_ft.py:llama_65b --topology=v5p:4x4x4 --config.mesh.data=8 --config.mesh.model=8
    python launch/plan.py --config=configs/lsr_ft.py:dragon_plus --topology=v5p-128 --programs=search --corpus=399000000
    python launch/plan.py --table=all --quick

The mesh takes all chips: config.mesh.data of 1 (the default) or −1 is what config.mesh.model leaves.
v5p-64 is Google's name, whose number counts TensorCores: 32 chips, the same as v5p:2x4x4.
"""

from absl import flags

from radit_jax import command
from radit_jax.planning import ask, topology

CONFIG = command.config_flag()
TOPOLOGY = flags.DEFINE_string("topology", None, "Chips: v5e:8x8, v5p:4x4x4, v6e-64, v4:2x2x2 …")
PROGRAMS = flags.DEFINE_list("programs", None, "embed, search, score, lm_step, lsr_step, prefill, decode; default: what the goal needs.")
FIT = flags.DEFINE_bool("fit", False, "Look for a mesh and micro-batches that fit.")
ATTENTION = flags.DEFINE_enum("attention", "auto", ["auto", "reference", "both"], "With the chip's flash kernel, without, or both.")
CORPUS = flags.DEFINE_integer("corpus", 0, "Passages to embed and search.", lower_bound=0)
DIM = flags.DEFINE_integer("dim", 768, "Of their vectors.", lower_bound=1)
QUICK = flags.DEFINE_bool("quick", False, "Stop the compiler before it generates code: all figures, in a tenth of the time.")
JSON = flags.DEFINE_bool("json", False, "Print JSON.")
TABLE = flags.DEFINE_string("table", None, "The README's table: all, or the rows whose name has this in it.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    topology.require_compiler()
    if TABLE.value is not None:
        return ask.table(TABLE.value, full=not QUICK.value)
    options = {"attention": ATTENTION.value, "look": FIT.value, "full": not QUICK.value, "as_json": JSON.value}
    return ask.plan(CONFIG.value, TOPOLOGY.value, PROGRAMS.value, {"corpus": CORPUS.value, "dim": DIM.value}, **options)


if __name__ == "__main__":
    command.run(main)
