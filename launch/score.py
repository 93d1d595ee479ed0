"""Log-probabilities of targets: {"id", "prompt", "target", "background"?} lines in, {"id", "logprob", "tokens"} lines out.

python launch/score.py --input in.jsonl --output out.jsonl [--checkpoint FOLDER|FILE.gguf|HUB_ID|package:…] [--dtype float32]
"""

from pathlib import Path

from absl import flags

from radit_jax import command

INPUT = flags.DEFINE_string("input", None, "A jsonl(.gz) file.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "The jsonl file to write.", required=True)
CHECKPOINT = flags.DEFINE_string("checkpoint", "", "The LM; default: the one of configs/common.py.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype.")
MESH = flags.DEFINE_list("mesh", ["1", "1"], "Devices along data and model, as 4,2.")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 2048, "Padded tokens of one call.", lower_bound=1)


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    from configs.common import SMOLLM2
    from radit_jax import sharding
    from radit_jax.inference.score_file import score_file
    from radit_jax.logbook import say

    if len(MESH.value) != 2 or not all(part.isdigit() for part in MESH.value):
        raise command.InputError(f"--mesh is {','.join(MESH.value)!r}, expected two numbers as 4,2")
    options = {"dtype": DTYPE.value, "batch_tokens": BATCH_TOKENS.value, "mesh": sharding.make_mesh(*map(int, MESH.value))}
    facts = score_file(Path(INPUT.value), Path(OUTPUT.value), CHECKPOINT.value or SMOLLM2, **options)
    say(f"score: {facts}")


if __name__ == "__main__":
    command.run(main)
