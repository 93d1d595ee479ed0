"""Trains what the config asks for: LM-ft, R-ft, or all of RA-DIT with its table.

python launch/train.py --config=configs/radit.py --workdir=runs/demo [--config.lm_ft.steps=60]
"""

from radit_jax import command

CONFIG = command.config_flag()


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    pipeline = command.pipeline(CONFIG)
    pipeline.check_batches()
    goal = pipeline.config.goal
    if goal == "lm_ft":
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
