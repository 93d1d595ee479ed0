"""The `score` command: a jsonl file of prompts and targets → a jsonl file of log-probabilities."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from radit_jax import artifacts, distributed, progress, sharding
from radit_jax.data.instances import InstanceMaker
from radit_jax.data.records import BadRecord, BadRecords, json_lines, text_field
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.inference.score import Scorer
from radit_jax.types import Instance
from radit_jax.weights.hf import resolve
from radit_jax.weights.lm import load_lm

CHUNK = 256  # records scored between two writes: what a kill can lose


def score_file(source: Path, output: Path, checkpoint: str, *, dtype: str, batch_tokens: int, mesh: Mesh | None = None) -> dict[str, Any]:
    """Scores every record of `source` and writes {"id", "logprob", "tokens"} lines in its order; returns the facts.

    `logprob` is the natural logarithm of p(target | prompt), summed over the target's `tokens`; prompt and target are taken literally and
    tokenized apart. The whole file is read and checked before the LM runs. What a killed call left in `OUTPUT.partial` is not scored again.

    `mesh` (default: one device) takes the LM and the rows of a batch. Of several processes all score and the leader writes.
    """
    if not output.parent.is_dir():
        raise InputError(f"{output}: the folder {output.parent} is not there")
    tokenizer = load_tokenizer(checkpoint)
    mesh = sharding.mesh_or_one(mesh)
    place, check = sharding.placer(mesh, sharding.LM_RULES), functools.partial(sharding.check_lm, mesh)
    lm = load_lm(checkpoint, dtype=dtype, param_dtype=dtype, place=place, check=check)
    maker = InstanceMaker(tokenizer, lm.config.max_positions)
    records = list(_records(source, maker))
    if not records:
        raise InputError(f"{source}: no records, expected at least one")
    made_from = artifacts.fingerprint({"source": artifacts.identity(source), "lm": artifacts.identity(resolve(checkpoint)), "dtype": dtype})
    partial = output.with_name(output.name + ".partial")
    done = distributed.from_leader(_done(partial, made_from) if distributed.leads() else 0)
    scorer = Scorer(lm.as_read(), batch_tokens=batch_tokens, mesh=mesh)
    with _appending(partial) as write, progress.bar("score", len(records), unit="records", start=done) as advance:
        for chunk in _batched(records[done:], CHUNK):
            logp = scorer([instance for _, instance in chunk])
            write("".join(_line(*record, value) for record, value in zip(chunk, logp)))
            advance(len(chunk))
    if distributed.leads():
        lines = partial.read_text().splitlines(keepends=True)
        partial.write_text("".join(lines[1:]))
        os.replace(partial, output)
    distributed.meet("the scores are written")
    return {
        "records": len(records),
        "records_per_s": round(advance.rate, 2),
        "truncated": maker.truncations.count,
        **scorer.facts(),
    }


def _records(source: Path, maker: InstanceMaker) -> Iterator[tuple[Any, Instance]]:
    """(id as given, instance) of every record; the first bad one stops with file:line."""

    def parse(record: dict[str, Any]) -> tuple[Any, Instance]:
        if "id" not in record:
            raise BadRecord(f'no field "id" (found {", ".join(record) or "no fields"})')
        prompt, target = text_field(record, "prompt", empty_ok=True), text_field(record, "target", empty_ok=True)
        background = text_field(record, "background", empty_ok=True) if record.get("background") is not None else None
        try:
            return record["id"], maker.instance(str(record["id"]), prompt, background, target, close=False)
        except InputError as error:
            raise BadRecord(error) from error

    return (parsed for _, parsed in json_lines(source, parse, BadRecords()))


def _done(partial: Path, made_from: str) -> int:
    """How many records a killed call of the same inputs has written. The first line of the partial file names its inputs."""
    lines = partial.read_text().splitlines(keepends=True) if partial.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if not whole or json.loads(whole[0]) != {"made_from": made_from}:
        whole = [json.dumps({"made_from": made_from}) + "\n"]
    partial.write_text("".join(whole))
    return len(whole) - 1


@contextlib.contextmanager
def _appending(partial: Path) -> Iterator[Callable[[str], None]]:
    """Text goes to the end of the file at once; from a process that does not lead it goes nowhere."""
    with open(partial if distributed.leads() else os.devnull, "a") as file:

        def write(text: str) -> None:
            file.write(text)
            file.flush()

        yield write


def _line(record_id: Any, instance: Instance, logp: float) -> str:
    line = {"id": record_id, "logprob": float(logp), "tokens": len(instance.tokens_T) - instance.target_start}
    return json.dumps(line, ensure_ascii=False) + "\n"


def _batched(items: list, size: int) -> Iterator[list]:
    return (items[start : start + size] for start in range(0, len(items), size))
