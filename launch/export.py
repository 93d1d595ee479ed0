"""The tuned models as folders for other software, each with a model card (README.md).

DIR/lm is for transformers, vLLM and llama.cpp's converter, DIR/query_encoder and DIR/document_encoder for sentence-transformers.

python launch/export.py --workdir=runs/demo --output DIR [--dtype bfloat16]
"""

from pathlib import Path

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the LM's tensors.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    from radit_jax.exports import export

    pipeline = command.pipeline(CONFIG)
    command.alone()
    print(export(pipeline, Path(OUTPUT.value), DTYPE.value))


if __name__ == "__main__":
    command.run(main)
