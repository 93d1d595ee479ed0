"""An encoder as a function on a mesh: batch rows over "data", vectors back on every device (Eq. 1)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from radit_jax import sharding
from radit_jax.types import PyTree


def program(graphdef: nnx.GraphDef, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted (params, tokens_BxT, mask_BxT, indices_N) → vectors_BxE; it is called and lowered with the mesh in context."""
    return jax.jit(lambda params, *texts: nnx.merge(graphdef, params)(*texts), out_shardings=sharding.replicated(mesh))


def on_mesh(graphdef: nnx.GraphDef, mesh: Mesh) -> Callable[..., jax.Array]:
    """(params, tokens_BxT, mask_BxT, indices_N) → vectors_BxE for parameters that change (R-ft); B is a multiple of the mesh's data axis.

    `indices_N` are of the real tokens, where they are read in one line (sharding.in_line), or None.
    """
    run = program(graphdef, mesh)

    def encode(params: PyTree, tokens_BxT: np.ndarray, mask_BxT: np.ndarray, indices_N: np.ndarray | None = None) -> jax.Array:
        with jax.set_mesh(mesh):
            return run(params, sharding.put_rows(mesh, tokens_BxT), sharding.put_rows(mesh, mask_BxT), indices_N)

    return encode


def encoding(encoder: nnx.Module, mesh: Mesh) -> Callable[[np.ndarray, np.ndarray, np.ndarray | None], jax.Array]:
    """(tokens_BxT, mask_BxT, indices_N) → vectors_BxE by this encoder, whose parameters lie on the mesh. It is for reading from here on."""
    graphdef, params = nnx.split(encoder.as_read())
    return functools.partial(on_mesh(graphdef, mesh), params)
