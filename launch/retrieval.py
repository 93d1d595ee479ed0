"""Retrieval quality of question sets over the corpus of a workdir: before R-ft and, where it was trained, after it.

    python launch/retrieval.py --workdir=runs/nq_wiki --questions=dev.jsonl [--k=100] [--folder=found] [--output=retrieval.json]

A question set is a task, a card's name, NAME:PATH, a jsonl file of your own, or beir:FOLDER[#SPLIT]. --folder gets TREC run files and, for
every question that moved, its measures before and after.
"""

from pathlib import Path

from absl import flags

from radit_jax import artifacts, command

CONFIG = command.config_flag()
QUESTIONS = flags.DEFINE_list("questions", None, "Question sets, separated by commas.", required=True)
K = flags.DEFINE_integer("k", 100, "Passages searched for each question.", lower_bound=1)
FOLDER = flags.DEFINE_string("folder", None, "A folder for TREC runs and for the questions that moved.")
OUTPUT = flags.DEFINE_string("output", None, "A JSON file to write.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    from radit_jax import distributed, retrieval_table

    folder = Path(FOLDER.value) if FOLDER.value else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    value = retrieval_table.make(command.pipeline(CONFIG), QUESTIONS.value, k=K.value, folder=folder)
    if OUTPUT.value and distributed.leads():
        artifacts.write_json(Path(OUTPUT.value), value)
    print(retrieval_table.text(value))


if __name__ == "__main__":
    command.run(main)
