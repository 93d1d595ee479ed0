"""The paper's tables at the scale of a config: systems by numbers of passages and seeds, and its ablations. Resumable.

python launch/reproduce.py --config=configs/radit.py:nq_wiki --workdir=runs/nq_wiki [--parts=dual,instruction] [--seeds=0,1,2]

Parts: dual, recipe, folds, instruction, passages, ensemble, data, encoders, target, length, adapters (radit_jax/reproduction.py). Several
runs may share a workdir, each with seeds of its own; one with all seeds then puts the tables together.
"""

from pathlib import Path

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
PARTS = flags.DEFINE_list("parts", None, "Which tables; default: all.")
FIGURES = flags.DEFINE_string("figures", None, "Where the tables go as figures, an SVG file each; default: nowhere.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every training.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    if not all(seed.isdigit() for seed in SEEDS.value):
        raise command.InputError(f"--seeds is {','.join(SEEDS.value)!r}, expected numbers as 0,1,2")
    from radit_jax import reproduction

    pipeline = command.pipeline(CONFIG)
    pipeline.check_trainings()
    value = reproduction.make(pipeline, PARTS.value or list(reproduction.PARTS), list(map(int, SEEDS.value)))
    if FIGURES.value:
        reproduction.draw(value, Path(FIGURES.value))
    print(reproduction.text(value))


if __name__ == "__main__":
    command.run(main)
