"""The peer of `launch/bench.py`: the same work in transformers + torch, batched by hand, on the same records and in the same precision.

    PYTHON_WITH_TORCH tests/peers/torch_peer.py job.json

Runs as a process of an environment of its own and imports nothing of radit_jax. Says one JSON line when its model is loaded, then for every
line "run" on stdin does the whole work once and answers with one JSON line: seconds, CPU seconds, peak memory, and the outputs that show
that both did the same. What a careful person would do is done: all cores, inference mode, SDPA attention, rows of similar length batched
together, logits only where they are needed, a KV cache, the fused AdamW.
"""

from __future__ import annotations

import json
import sys

import torch
from protocol import answer_runs, say
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

SETTINGS = {"attn_implementation": "sdpa", "local_files_only": True}


def serve(path: str, kinds: dict) -> None:
    """Does the work of the job in this file as often as stdin says."""
    with open(path) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    run = kinds[job["kind"]](job)
    say({"ready": True, "torch": torch.__version__, "threads": torch.get_num_threads()})
    answer_runs(run)


def settings(job: dict) -> dict:
    return SETTINGS | {"dtype": getattr(torch, job["dtype"])}


def pad(rows: list[list[int]], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, mask), both rows × longest."""
    width = max(len(row) for row in rows)
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return tokens, mask


def batches(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers, longest first, in batches of at most `batch_tokens` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found, start = [], 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        found.append(order[start : start + size])
        start += size
    return found


# -- embed --------------------------------------------------------------------------------------------------------------------------


def embed(job: dict):
    """Texts → vectors by masked mean pooling or [CLS], with unit norm where the checkpoint has it. Tokenization is part of the work."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"], local_files_only=True)
    model = AutoModel.from_pretrained(job["model"], **settings(job)).eval()

    @torch.inference_mode()
    def run():
        ids = tokenizer(job["texts"], truncation=True, max_length=job["max_tokens"])["input_ids"]
        vectors = torch.empty(len(ids), model.config.hidden_size)
        for rows in batches([len(row) for row in ids], job["batch_tokens"]):
            tokens, mask = pad([ids[row] for row in rows])
            hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
            if job["pooling"] == "cls":
                pooled = hidden[:, 0]
            else:
                weights = mask[..., None].to(hidden.dtype)
                pooled = (hidden * weights).sum(1) / weights.sum(1)
            vectors[rows] = (F.normalize(pooled, dim=-1) if job["normalize"] else pooled).float()
        return vectors.tolist()

    return run


# -- score --------------------------------------------------------------------------------------------------------------------------


def score(job: dict):
    """log p(target | prompt) of every instance {tokens, target_start}."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], **settings(job)).eval()
    instances = job["instances"]

    @torch.inference_mode()
    def run():
        logp = torch.zeros(len(instances))
        for rows in batches([len(instance["tokens"]) for instance in instances], job["batch_tokens"]):
            chosen = [instances[row] for row in rows]
            of, picked = target_logprobs(model, chosen)
            logp[rows] = torch.zeros(len(rows)).index_add(0, of, picked)
        return logp.tolist()

    return run


def target_logprobs(model, chosen: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """(instance number, log p) of every target token of a padded batch; the head sees the positions before target tokens alone."""
    tokens, mask = pad([instance["tokens"] for instance in chosen])
    hidden = model.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    places = [(i, t) for i, instance in enumerate(chosen) for t in range(instance["target_start"], len(instance["tokens"]))]
    of, at = (torch.tensor(part) for part in zip(*places))
    return of, -F.cross_entropy(model.lm_head(hidden[of, at - 1]).float(), tokens[of, at], reduction="none")


# -- LM-ft --------------------------------------------------------------------------------------------------------------------------


def lm_ft(job: dict):
    """Steps of AdamW on the given instances, the loss on output tokens only; a step's instances go in padded groups of similar length."""
    model = AutoModelForCausalLM.from_pretrained(job["model"], **SETTINGS, dtype=torch.float32).train()
    o = job["optimizer"]
    adamw = optimizer(model, o)

    def step(instances: list[dict]) -> float:
        outputs = sum(len(instance["tokens"]) - instance["target_start"] for instance in instances)
        total = 0.0
        for group in similar(instances):
            with torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
                loss = -target_logprobs(model, group)[1].sum() / outputs
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), o["clip_norm"], foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return total

    return lambda: [step(instances) for instances in job["steps"]]


def optimizer(model, o: dict) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": o["weight_decay"]}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o["lr"], betas=(o["b1"], o["b2"]), eps=o["eps"], fused=True)


def similar(instances: list[dict]) -> list[list[dict]]:
    """Groups of instances whose shortest has at least three quarters of the longest's tokens: little padding, few passes."""
    groups: list[list[dict]] = []
    for instance in sorted(instances, key=lambda instance: -len(instance["tokens"])):
        if groups and len(instance["tokens"]) >= 0.75 * len(groups[-1][0]["tokens"]):
            groups[-1].append(instance)
        else:
            groups.append([instance])
    return groups


# -- R-ft ---------------------------------------------------------------------------------------------------------------------------


def lsr_ft(job: dict):
    """Steps of AdamW on the query encoder: KL between softmax(scale · q·c) and the target that the stored LM scores make.

    In float32, whatever the job says: with autocast, for so few tokens, they take a twelfth longer (AMX).
    """
    model = AutoModel.from_pretrained(job["model"], **SETTINGS, dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # ours has none
    adamw = optimizer(model, job["optimizer"])
    arrays = ("passages", "logp", "base")
    given = [batch | {name: torch.tensor(batch[name]) for name in arrays} for batch in job["batches"]]

    def step(batch: dict) -> float:
        tokens, mask = pad(batch["ids"])
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        pooled = hidden[:, 0] if job["pooling"] == "cls" else (hidden * weights).sum(1) / weights.sum(1)
        queries = F.normalize(pooled, dim=-1) if job["normalize"] else pooled
        log_p = torch.log_softmax(job["score_scale"] * torch.einsum("be,bke->bk", queries, batch["passages"]), -1)
        score = batch["logp"].exp() if job["score"] == "prob" else batch["logp"]
        target = torch.log_softmax(score / job["tau"] + job["prior"] * batch["base"], -1)
        first, second = (log_p, target) if job["direction"] == "retriever_first" else (target, log_p)
        loss = (first.exp() * (first - second)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), job["optimizer"]["clip_norm"], foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return float(loss)

    return lambda: [step(batch) for batch in given]


# -- generate -----------------------------------------------------------------------------------------------------------------------


def generate(job: dict):
    """Sequence level: every prompt decodes greedily, each distinct answer gets its p_R-weighted probability under all k prompts."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(job["model"], local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(job["model"], **settings(job)).eval()
    questions, stops = job["questions"], torch.tensor(job["stops"])
    k = len(questions[0]["prompts"])

    @torch.inference_mode()
    def run():
        answers: list[dict] = [{}] * len(questions)
        longest = [max(len(prompt) for prompt in question["prompts"]) for question in questions]
        for rows in batches(longest, job["batch_tokens"] // k):
            for row, answer in zip(rows, answer_batch([questions[row] for row in rows])):
                answers[row] = answer
        return answers

    def answer_batch(chosen: list[dict]) -> list[dict]:
        tokens, mask = pad([prompt for question in chosen for prompt in question["prompts"]], left=True)
        first = model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask), logits_to_keep=1)
        last, cache = first.logits[:, -1], first.past_key_values
        ids = decode(model, last, cache, mask, stops, job["max_new_tokens"])
        cut(cache, tokens.shape[1])
        distinct = []
        for q in range(len(chosen)):
            texts: dict[str, list[int]] = {}
            for row in ids[q * k : (q + 1) * k]:
                texts.setdefault(text_of(tokenizer, row), row)
            distinct.append(texts)
        logp = candidates(model, [list(texts.values()) for texts in distinct], k, last, cache, mask, stops)
        result = []
        for question, texts, logp_KxC in zip(chosen, distinct, logp):
            mixed = torch.logsumexp(logp_KxC + torch.tensor(question["logw"])[:, None], dim=0)
            best = int(mixed.argmax())
            result.append({"text": list(texts)[best], "logprob": float(mixed[best])})
        return result

    return run


def text_of(tokenizer, ids: list[int]) -> str:
    """The first line, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).split("\n")[0].strip()


def cut(cache: DynamicCache, length: int) -> None:
    """Leaves the first `length` tokens."""
    if (more := cache.get_seq_length() - length) > 0:
        cache.crop(-more)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def decode(model, last: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, stops: torch.Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy ids of every row without their end, over the prompts' cache; ends when every row has ended."""
    rows, lengths = len(last), mask.sum(-1)
    ids: list[list[int]] = [[] for _ in range(rows)]
    done = torch.zeros(rows, dtype=torch.bool)
    for s in range(new_tokens):
        token = last.argmax(-1)
        done |= torch.isin(token, stops)
        for i in (~done).nonzero()[:, 0].tolist():
            ids[i].append(int(token[i]))
        if bool(done.all()) or s + 1 == new_tokens:
            break
        mask = F.pad(mask, (0, 1), value=1)
        last = model(
            input_ids=token[:, None], attention_mask=mask, position_ids=(lengths + s)[:, None], past_key_values=cache
        ).logits[:, -1]
    return ids


def candidates(
    model, listed: list[list[list[int]]], k: int, last: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, stops: torch.Tensor
) -> list[torch.Tensor]:
    """log p(candidate and its end) of every question's candidates under its k prompts: (k, C) each. One pass per candidate rank."""
    width = mask.shape[1]
    logp = [torch.empty(k, len(texts)) for texts in listed]
    for rank in range(max(len(texts) for texts in listed)):
        members = [q for q, texts in enumerate(listed) if rank < len(texts)]
        rows = torch.tensor([q * k + j for q in members for j in range(k)])
        tokens, new = pad([listed[q][rank] or [0] for q in members for _ in range(k)])
        counts = torch.tensor([len(listed[q][rank]) for q in members for _ in range(k)])
        if len(rows) == len(last):  # every question has such a candidate: the cache itself, cut back afterwards
            part = cache
        else:
            part = DynamicCache([(layer.keys[rows], layer.values[rows]) for layer in cache.layers])
        seen = mask[rows]
        at = seen.sum(-1)[:, None] + torch.arange(tokens.shape[1])[None]
        logits = model(input_ids=tokens, attention_mask=torch.cat([seen, new], 1), position_ids=at, past_key_values=part).logits
        cut(cache, width)
        logits = torch.cat([last[rows][:, None], logits], 1)  # the prompt's last logits stand in front: logits[t] predicts token t
        norm = logits.logsumexp(-1)
        picked = logits[:, :-1].gather(-1, tokens[..., None])[..., 0] - norm[:, :-1]
        real = torch.arange(tokens.shape[1])[None] < counts[:, None]
        end = torch.take_along_dim(logits[..., stops].logsumexp(-1) - norm, counts[:, None], 1)[:, 0]
        total = (picked * real).sum(-1) + end
        for i, q in enumerate(members):
            logp[q][:, rank] = total[i * k : (i + 1) * k]
    return logp


KINDS = {"embed": embed, "score": score, "lm_ft": lm_ft, "lsr_ft": lsr_ft, "generate": generate}

if __name__ == "__main__":
    serve(sys.argv[1], KINDS)
