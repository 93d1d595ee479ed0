"""Trains what the config asks for: LM-ft, R-ft, or all of RA-DIT with its table.

python launch/train.py --config=configs/radit.py --workdir=runs/demo [--config.lm_ft.steps=60]
"""

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
DRY = flags.DEFINE_bool("dry-run", False, "Print the stages, which of them are there, and about how long the others take; make nothing.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    pipeline = command.pipeline(CONFIG, dry=DRY.value)
    pipeline.check_trainings()
    goal = pipeline.config.goal
    if DRY.value:
        from radit_jax import rehearsal

        print(rehearsal.text(rehearsal.rehearse(pipeline)))
    elif goal == "radit" and not pipeline.config.test.source:
        from radit_jax import trainings

        print(trainings.both(pipeline))
    elif goal == "lm_ft":
        print(pipeline.tuned_lm.path)
    elif goal == "lsr_ft":
        print(pipeline.tuned_retriever.path)
    elif goal == "radit":
        from radit_jax import table

        print(table.text(table.make(pipeline)))
    else:
        raise command.InputError(f"config.goal is {goal!r}, expected lm_ft, lsr_ft or radit")


if __name__ == "__main__":
    command.run(main)
