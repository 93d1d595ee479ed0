"""The rows of the table for what a workdir holds: untuned models, and tuned ones where they were trained. With --tasks, any task by them.

python launch/evaluate.py --workdir=runs/demo --output eval.json [--rows "LM-ft only,both"] [--tasks "nq:nq-dev-kilt.jsonl,boolq"]
"""

from pathlib import Path

from absl import flags

from radit_jax import artifacts, command

CONFIG = command.config_flag()
OUTPUT = flags.DEFINE_string("output", None, "The JSON file to write: {rows, config}.", required=True)
ROWS = flags.DEFINE_list("rows", None, "Rows to make; default: those whose models are there.")
TASKS = flags.DEFINE_list("tasks", None, "Tasks in place of the config's questions: NAME, NAME:PATH or a jsonl file of your own.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    from radit_jax import distributed, protocol, table

    pipeline = command.pipeline(CONFIG)
    if not Path(OUTPUT.value).absolute().parent.is_dir():
        raise command.InputError(f"--output {OUTPUT.value}: its folder is not there")
    rows = table.chosen(pipeline, ROWS.value)
    if TASKS.value:
        value, shown, kept = protocol.make(pipeline, rows, TASKS.value), protocol.text, ("rows", "metrics", "shots", "paper", "config")
    else:
        value, shown, kept = table.make(pipeline, rows), table.text, ("rows", "differences", "config")
    if distributed.leads():
        artifacts.write_json(Path(OUTPUT.value), {name: value[name] for name in kept})
    print(shown(value))


if __name__ == "__main__":
    command.run(main)
