"""The peer of `launch/bench.py generate` that people write first: transformers' `model.generate` as it ships, k prompts a call.

    PYTHON_WITH_TORCH tests/peers/transformers_generate_peer.py job.json

The protocol is protocol.py's. `model.generate` knows no mixture over prompts: it gives one answer a passage. Returned is what the
passages vote for: the answer whose passages have the greatest p_R together, with the log of that weight in place of its probability.
"""

from __future__ import annotations

import collections
import math
import sys

import torch
from torch_peer import pad, serve, settings, text_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def generate(job: dict):
    """{text, logprob} of every question."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(job["model"], **settings(job)).eval()
    stops = job["stops"]
    how = {"max_new_tokens": job["max_new_tokens"], "do_sample": False, "eos_token_id": stops, "pad_token_id": stops[0]}

    def answer(question: dict) -> dict:
        tokens, mask = pad(question["prompts"], left=True)
        ids = model.generate(input_ids=tokens, attention_mask=mask, **how)[:, tokens.shape[1] :]
        weights = collections.Counter()
        for row, logw in zip(ids, question["logw"]):
            weights[text_of(tokenizer, row)] += math.exp(logw)
        text, weight = weights.most_common(1)[0]
        return {"text": text, "logprob": math.log(weight)}

    @torch.inference_mode()
    def run():
        return [answer(question) for question in job["questions"]]

    return run


if __name__ == "__main__":
    serve(sys.argv[1], {"generate": generate})
