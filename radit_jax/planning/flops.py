"""Floating-point operations of a program, counted from its contractions: 2 for each multiply-add, loops as often as they run.

What is counted is what the program says: a rematerialised layer twice in the backward pass, as it is computed. Elementwise work, some per
cent of a transformer's, is left out, since the matrix units' peak is what the count is divided by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

from radit_jax.models.lm import LmConfig

# A float32 product in full precision is so many bfloat16 products on a TPU's matrix units.
PASSES = {jax.lax.Precision.HIGH: 3, jax.lax.Precision.HIGHEST: 6}


class Operations(NamedTuple):
    """Of one call over all devices: `counted` as mathematics, `passed` through bfloat16 matrix units (more, for float32 products)."""

    counted: int
    passed: int

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.counted + other.counted, self.passed + other.passed)

    def __rmul__(self, times: int) -> Operations:
        return Operations(times * self.counted, times * self.passed)


NONE = Operations(0, 0)


class Times(NamedTuple):
    """How often products with weights are computed, and those of attention: a backward pass has the gradients of both operands."""

    products: int
    attention: int


FORWARD, TRAINING, FROZEN = Times(1, 1), Times(3, 3), Times(2, 3)  # FROZEN: the gradients of weights are not asked for


def of(program: core.ClosedJaxpr, endless: int = 1) -> Operations:
    """The operations of a traced program. Loops that end by what they compute (decoding) are taken to run `endless` times."""
    return _count(program.jaxpr, endless)


def asked(config: LmConfig, tokens: int, outputs: int, pairs: int, times: Times) -> int:
    """What a task asks for, however it is computed: products of `tokens` with the layers and of `outputs` with the vocabulary, attention
    over `pairs` of tokens. Low-rank maps (models/lora.py), some per cent of that, are left out.
    """
    products = tokens * matrices(config) + outputs * config.width * config.vocab_size
    attention = 2 * pairs * config.layers * config.heads * config.head_dim  # scores, and the sum of values
    return 2 * (times.products * products + times.attention * attention)


def matrices(config: LmConfig) -> int:
    """Parameters of the layers' linear maps."""
    heads = 2 * (config.heads + config.kv_heads) * config.head_dim
    return config.layers * config.width * (heads + 3 * config.mlp_width)


def _count(jaxpr: core.Jaxpr, endless: int) -> Operations:
    total = NONE
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot(equation)
        elif name == "scan":
            total += parameters["length"] * _count(parameters["jaxpr"].jaxpr, endless)
        elif name == "while":
            total += endless * _count(parameters["body_jaxpr"].jaxpr, endless)
        elif name == "cond":
            total += max((_count(branch.jaxpr, endless) for branch in parameters["branches"]), default=NONE)
        elif name == "shard_map":  # its body is what one device does
            total += parameters["mesh"].size * _count(parameters["jaxpr"], endless)
        elif name == "pallas_call":
            total += math.prod(parameters["grid_mapping"].grid) * _count(parameters["jaxpr"], endless)
        else:
            for inner in _inner(parameters):
                total += _count(inner, endless)
    return total


def _dot(equation) -> Operations:
    """2 × (elements of the result) × (length of what is summed)."""
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    counted = 2 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
    precision = equation.params["precision"]
    passes = PASSES.get(precision[0], 1) if isinstance(precision, tuple) and left.dtype == "float32" else 1
    return Operations(counted, passes * counted)


def _inner(parameters: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The programs inside an equation (calls, custom derivatives, rematerialisation)."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := parameters.get(name)) is not None:
            yield getattr(inner, "jaxpr", inner)
