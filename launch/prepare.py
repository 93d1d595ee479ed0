"""Corpus → passages → vectors → index; with --query, searches it.

python launch/prepare.py --config=configs/radit.py --workdir=runs/demo --query "who built it" --k 10 --json
"""

import json

from absl import flags

from radit_jax import command

CONFIG = command.config_flag()
QUERY = flags.DEFINE_string("query", None, "Search for this and print the passages.")
K = flags.DEFINE_integer("k", 10, "Passages per query.", lower_bound=1)
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(arguments: list[str]) -> None:
    command.no_more(arguments)
    pipeline = command.pipeline(CONFIG)
    if QUERY.value is None:
        searcher = type(pipeline.searcher).__name__
        facts = {"passages": len(pipeline.store), "dim": pipeline.vectors.dim, "searcher": searcher, "workdir": str(pipeline.workdir)}
        print(json.dumps(facts) if JSON.value else "\n".join(f"{key}: {value}" for key, value in facts.items()))
        return
    rows_BxK, scores_BxK = pipeline.searcher.search(pipeline.embed_queries(tuned=False)([QUERY.value]), K.value)
    found = [
        {"id": passage.id, "title": passage.title, "text": passage.text, "score": float(score)}
        for passage, score in zip(pipeline.store.read(rows_BxK[0]), scores_BxK[0])
    ]
    print(
        json.dumps({"query": QUERY.value, "passages": found})
        if JSON.value
        else "\n".join(f"{p['score']:.3f}  {p['id']}  {p['title']}. {p['text']}" for p in found)
    )


if __name__ == "__main__":
    command.run(main)
