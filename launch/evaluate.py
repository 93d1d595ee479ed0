"""The rows of the table for what a workdir holds: untuned models, and tuned ones where they were trained.

python launch/evaluate.py --workdir=runs/demo --output eval.json [--rows "LM-ft only,both"]
"""

from pathlib import Path

from absl import flags

from radit_jax import artifacts, command

CONFIG = command.config_flag()
OUTPUT = flags.DEFINE_string("output", None, "The JSON file to write: {rows, config}.", required=True)
ROWS = flags.DEFINE_list("rows", None, "Rows to make; default: those whose models are there.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    from radit_jax import distributed, table

    pipeline = command.pipeline(CONFIG)
    if not Path(OUTPUT.value).absolute().parent.is_dir():
        raise command.InputError(f"--output {OUTPUT.value}: its folder is not there")
    value = table.make(pipeline, table.chosen(pipeline, ROWS.value))
    if distributed.leads():
        artifacts.write_json(Path(OUTPUT.value), {"rows": value["rows"], "differences": value["differences"], "config": value["config"]})
    print(table.text(value))


if __name__ == "__main__":
    command.run(main)
