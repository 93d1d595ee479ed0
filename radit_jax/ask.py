"""The `ask` command: one question through retriever and ensemble, with what each passage contributed."""

from __future__ import annotations

from typing import Any

import numpy as np

from radit_jax.data.prompts import evaluation_example
from radit_jax.data.questions import Question
from radit_jax.inference.ensemble import passage_logweights
from radit_jax.logbook import say
from radit_jax.pipeline import Pipeline


def ask(pipeline: Pipeline, question: str, *, untuned: bool = False) -> dict[str, Any]:
    """{"question", "answer", "passages": [{"id", "title", "text", "score", "weight", "answer", "logprob"}]}, best passage first.

    Uses what the workdir holds: tuned models where they were trained, else the checkpoints as they are (said on stderr).
    """
    lm_tuned, retriever_tuned = (not untuned and pipeline.has(stage) for stage in ("lm_ft", "lsr_ft"))
    say(f"ask: {'tuned' if lm_tuned else 'untuned'} LM, {'tuned' if retriever_tuned else 'untuned'} query encoder")
    example = evaluation_example(Question("asked", question.strip(), ("",)))
    query_1xE = pipeline.embed_queries(retriever_tuned)([example.query])
    rows_1xK, scores_1xK = pipeline.searcher.search(query_1xE, pipeline.config.evaluate.k)
    passages = pipeline.store.read(rows_1xK[0])
    logw_K = passage_logweights(scores_1xK[0], pipeline.config.retriever.score_scale)
    ensemble = pipeline.ensemble(lm_tuned)
    prompted = ensemble.prompted(example.id, example.prompt, [passage.content for passage in passages], logw_K)
    answer = ensemble.generate([prompted], level="sequence")[0]
    parts = zip(passages, scores_1xK[0], np.exp(logw_K), answer.own_texts, answer.own_logprobs)
    listed = [
        {"id": p.id, "title": p.title, "text": p.text, "score": float(score), "weight": float(weight), "answer": own, "logprob": logprob}
        for p, score, weight, own, logprob in parts
    ]
    return {"question": question, "answer": answer.text, "passages": listed}
