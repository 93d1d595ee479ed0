"""The tuned models as folders for other software.

DIR/lm is for transformers and vLLM, DIR/query_encoder and DIR/document_encoder for sentence-transformers.

python launch/export.py --workdir=runs/demo --output DIR
"""

from pathlib import Path

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    from radit_jax.data.tokenizer import load_tokenizer
    from radit_jax.weights.export import export_encoder, export_lm

    pipeline = command.pipeline(CONFIG)
    command.alone()
    folder, retriever = Path(OUTPUT.value), pipeline.config.retriever
    lm_tuned, retriever_tuned = pipeline.has("lm_ft"), pipeline.has("lsr_ft")
    export_lm(pipeline.lm(lm_tuned, full_precision=True), pipeline.tokenizer, folder / "lm")
    export_encoder(pipeline.query_encoder(retriever_tuned), load_tokenizer(retriever.query_encoder), folder / "query_encoder")
    export_encoder(pipeline.document_encoder(), load_tokenizer(retriever.document_encoder), folder / "document_encoder")
    print(f"{folder}: {'tuned' if lm_tuned else 'untuned'} LM, {'tuned' if retriever_tuned else 'untuned'} query encoder, document encoder")


if __name__ == "__main__":
    command.run(main)
