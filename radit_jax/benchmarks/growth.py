"""How what we take grows with the tokens (`launch/bench.py growth`): embed, score and lm_ft on n records and on 8n, by turns in one run.

No record is there twice, and no two questions of `score` have a passage in common: what is read once for two would make the larger set
cheaper. Tokens are those of the records, padding not counted, so that half-empty batches show: an n that fills a few is to be asked for.
"""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from radit_jax.benchmarks import peer, stages
from radit_jax.benchmarks.contest import Work
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.logbook import say
from radit_jax.pipeline import Pipeline

FACTOR = 8  # records of the larger set to one of the smaller
LINEAR = 0.1  # what a token may cost more or less among FACTOR times as many
MAKERS = {"embed": stages.KINDS["embed"], "score": functools.partial(stages.KINDS["score"], apart=True), "lm_ft": stages.KINDS["lm_ft"]}
RECORDS = {"embed": 180, "score": 6, "lm_ft": 16}  # n where none is asked for: 8n are in the default config


def bench(pipeline: Pipeline, *, records: int | None, repetitions: int, kinds: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields a result of each kind. InputError where 8n records are not there, or for an unknown kind."""
    kinds = kinds or tuple(MAKERS)
    if unknown := [kind for kind in kinds if kind not in MAKERS]:
        raise InputError(f"bench growth: stage {unknown[0]!r}, expected {', '.join(MAKERS)}")
    for kind in kinds:
        yield _one(pipeline, kind, records or RECORDS[kind], repetitions)  # a call each: what one holds is gone before the next


def _one(pipeline: Pipeline, kind: str, count: int, repetitions: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        works = {n: MAKERS[kind](pipeline, n, Path(folder)) for n in (count, FACTOR * count)}
        tokens = {n: _tokens(work, pipeline) for n, work in works.items()}
        return measure(kind, works, tokens, repetitions) | {"dtype": stages.dtype_of(kind, pipeline)}


def measure(kind: str, works: Mapping[int, Work], tokens: Mapping[int, int], repetitions: int) -> dict[str, Any]:
    """Medians of both sizes (works and tokens by number of records, smaller first), and how many times as much a token takes in the larger.

    The first run of each compiles; it is not counted.
    """
    runs: dict[int, list[peer.Run]] = {n: [] for n in works}
    for i in range(repetitions + 1):
        found = {n: peer.timed(work.run)[1] for n, work in works.items()}
        shown = ", ".join(f"{n} records {run['seconds']:.2f} s" for n, run in found.items())
        say(f"bench growth {kind}: {f'run {i}' if i else 'warm-up'}: {shown}")
        for n, run in found.items():
            runs[n] += [run] if i else []
    sizes = [_size(n, tokens[n], runs[n]) for n in works]
    small, large = sizes
    ratio = round(large["us_per_token"] / small["us_per_token"], 3)
    return {
        "kind": f"growth {kind}",
        "sizes": sizes,
        "tokens": round(large["tokens"] / small["tokens"], 3),  # times as many
        "ratio": ratio,
        "cpu_ratio": round(large["cpu_us_per_token"] / small["cpu_us_per_token"], 3),
        "linear": 1 - LINEAR <= ratio <= 1 + LINEAR,
    }


def text(result: dict[str, Any]) -> str:
    """A result as people read it."""
    shown = " → ".join(f"{size['tokens']:,} ({size['records']:,} records) at {size['us_per_token']:g} µs" for size in result["sizes"])
    verdict = "linear" if result["linear"] else "not linear"
    return f"{result['kind']}: tokens {shown} each; ratio {result['ratio']:.2f} (by CPU time {result['cpu_ratio']:.2f}): {verdict}"


def _size(records: int, tokens: int, runs: Sequence[peer.Run]) -> dict[str, Any]:
    seconds, cpu_seconds = (statistics.median(run[what] for run in runs) for what in ("seconds", "cpu_seconds"))
    return {
        "records": records,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "us_per_token": round(seconds / tokens * 1e6, 3),
        "cpu_us_per_token": round(cpu_seconds / tokens * 1e6, 3),
    }


def _tokens(work: Work, pipeline: Pipeline) -> int:
    """Of the records, specials included, as cut; no padding."""
    if work.unit == "tokens":
        return work.amount
    tokenizer = load_tokenizer(pipeline.config.retriever.document_encoder)
    return int(tokenizer.encode_with_specials(work.job["texts"], work.job["max_tokens"])[1].sum())
