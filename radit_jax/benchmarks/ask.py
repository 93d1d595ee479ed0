"""What launch/bench.py is asked for: the kinds of work there are, and what is printed of one of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from radit_jax.errors import InputError

STAGES = ("embed", "score", "lm_ft", "lsr_ft", "generate")  # against transformers + torch; those of "all"
SCALES = ("search", "memory", "growth", "utilisation")  # beside faiss; a smaller corpus; fewer records; what the device could do
RECORDS = {"embed": 512, "score": 24, "lsr_ft": 512}  # where none are asked for
FEW = 16  # of the other stages
Result = tuple[dict[str, Any], str]


def kinds(arguments: Sequence[str]) -> tuple[str, ...]:
    """The kinds that the positional arguments name; InputError for anything that is none."""
    if len(arguments) > 1 or not set(arguments) <= {*STAGES, *SCALES, "all"}:
        raise InputError(f"expected one of {', '.join((*STAGES, *SCALES))}, all; found {' '.join(arguments)!r}")
    return STAGES if not arguments or arguments[0] == "all" else (arguments[0],)


def one_by_one(kinds: Sequence[str]) -> int:
    """This command once for each kind, in processes of their own, so that memory and caches are; the largest exit code."""
    flagged = [argument for argument in sys.argv[1:] if argument != "all"]
    return max(subprocess.run([sys.executable, sys.argv[0], kind, *flagged]).returncode for kind in kinds)


def lines(kind: str, given: Mapping[str, Any], config: Any, pipeline: Callable[[], Any]) -> Iterator[str]:
    """What is printed of one kind, as it comes; `given` are the flags by name, `pipeline` is of the config."""
    for result, text in _measured(kind, given, config, pipeline):
        yield json.dumps(result) if given["json"] else text


def _measured(kind: str, given: Mapping[str, Any], config: Any, pipeline: Callable[[], Any]) -> Iterator[Result]:
    # JAX after the flags, so that a wrong one is answered at once.
    if kind == "search":
        from radit_jax.benchmarks import search

        sizes = (given["vectors"], given["dim"], given["queries"])
        found = search.bench(*sizes, kinds=given["indexes"], repetitions=given["repetitions"], peer_python=given["peer_python"])
        yield from ((result, search.text(result)) for result in found)
    elif kind == "memory":
        from radit_jax.benchmarks import memory

        if not all(size.isdigit() for size in given["passages"]):
            raise InputError(f"--passages is {','.join(given['passages'])!r}, expected numbers as 100000,1000000")
        result = memory.bench([int(size) for size in given["passages"]], config.retriever.document_encoder)
        yield result, memory.text(result)
    elif kind == "growth":
        from radit_jax.benchmarks import growth

        found = growth.bench(pipeline(), records=given["records"], repetitions=given["repetitions"], kinds=given["stages"])
        yield from ((result, growth.text(result)) for result in found)
    elif kind == "utilisation":
        from radit_jax.benchmarks import utilisation

        found = utilisation.bench(config, kinds=given["stages"], repetitions=given["repetitions"])
        yield from ((result, utilisation.text(result)) for result in found)
    else:
        from radit_jax.benchmarks import contest, stages

        records = given["records"] or RECORDS.get(kind, FEW)
        result = stages.bench(pipeline(), kind, records=records, repetitions=given["repetitions"], peer_python=given["peer_python"])
        yield result, contest.text([result])
