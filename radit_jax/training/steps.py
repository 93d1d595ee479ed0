"""`lm_step` (LM-ft, Eq. 3) and `lsr_step` (R-ft, Eqs. 4 and 5), and the one place that compiles them.

Both are pure functions (graphdef, tx, state, batch) → (state, metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from radit_jax import sharding
from radit_jax.models.encoder import DualEncoder
from radit_jax.training import losses
from radit_jax.types import LmBatch, LsrBatch, PyTree, TrainState

# The TPU compiler would overlap gathers with partial products whose float32 sums, whole activations, go through memory each time:
# six times the traffic of a LLaMA-7B step on 32 chips (launch/plan.py counts it).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """Step 0: the given parameters and a fresh optimizer state."""
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params))


def begin(
    step: Callable, graphdef: nnx.GraphDef, tx, params: PyTree, mesh: Mesh, rules, *, frozen: Sequence[PyTree] = (), **static
) -> tuple[TrainState, Step]:
    """The state of step 0, born sharded over the mesh, and the compiled step. The parameters' buffers are taken over.

    `frozen` is what does not learn: read by every step, and no part of the state.
    """
    abstract = jax.eval_shape(lambda params: init_state(params, tx), params)
    places = sharding.shardings(abstract, rules, mesh)
    state = jax.jit(lambda params: init_state(params, tx), out_shardings=places, donate_argnums=0)(params)
    frozen = jax.device_put(tuple(frozen), sharding.shardings(tuple(frozen), rules, mesh))
    compiled = compile_step(step, graphdef, tx, state, mesh, rules, frozen=frozen, **static)
    return state, (lambda state, batch: compiled(state, batch, *frozen)) if frozen else compiled


def lm_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, state: TrainState, batch: LmBatch, *frozen: PyTree
) -> tuple[TrainState, Metrics]:
    """One update of the LM on packed rows. batch leaves are (A, B, …): gradients of A micro-batches are summed before the update.

    The loss is Eq. 3 divided by the number of output tokens of all A micro-batches, so A changes memory and not the result.
    `frozen` holds the parameters that are not in the state (models/lora.py): no gradients of them are made, and no moments kept.
    """

    outputs = jnp.sum(batch.weights_BxP)

    def mean_nll(params: PyTree, micro: LmBatch) -> tuple[jax.Array, Metrics]:
        lm = nnx.merge(graphdef, params, *frozen)
        hidden_BxTxD = lm.hidden(micro.tokens_BxT, micro.positions_BxT, micro.segment_ids_BxT, micro.indices_N, micro.reach)
        # Logits only where the next token is an output token: the head is a fifth of a small LM's arithmetic.
        hidden_BxPxD = jnp.take_along_axis(hidden_BxTxD, micro.slots_BxP[..., None], axis=1)
        # The mean is taken here: gradients of all parameters, to be divided after they are made, go through memory twice more.
        weights_BxP = micro.weights_BxP / jnp.maximum(outputs, 1.0)
        nll = losses.blocked_nll(hidden_BxPxD, lm.vocabulary(), micro.labels_BxP, weights_BxP)
        return nll, {"loss": nll}

    metrics, grads = _accumulate(mean_nll, state.params, batch)
    state, update = _update(tx, state, grads)
    tokens = jnp.sum(batch.segment_ids_BxT > 0)
    return state, {**update, **metrics, "output_tokens": outputs, "tokens": tokens, "padding": 1 - tokens / batch.tokens_BxT.size}


def lsr_step(
    graphdef: nnx.GraphDef, tx: optax.GradientTransformation, state: TrainState, batch: LsrBatch, *, options: losses.LsrOptions
) -> tuple[TrainState, Metrics]:
    """One update of the query encoder (Eq. 5). `state.params` holds it alone: E_d enters as the vectors of the batch and is frozen.

    With a DualEncoder as model both encoders are updated, and the passages are embedded from their tokens. batch leaves are (A, B, …):
    gradients of A parts are summed before the update. The loss is a mean over all questions, so A changes memory and not the result.
    """
    questions = jnp.maximum(jnp.sum(batch.weights_B), 1.0)

    def share_of_loss(params: PyTree, part: LsrBatch) -> tuple[jax.Array, Metrics]:
        model = nnx.merge(graphdef, params)
        both = isinstance(model, DualEncoder)
        query = model.query if both else model
        queries_BxE = query(part.query_tokens_BxT, part.query_mask_BxT, part.query_indices_N, unrolled=True)
        objective, metrics = lsr_objective(queries_BxE, part, options, passages_BxKxE=_embedded(model.document, part) if both else None)
        share = jnp.sum(part.weights_B) / questions
        return share * objective, {name: share * value for name, value in metrics.items()}

    metrics, grads = _accumulate(share_of_loss, state.params, batch)
    state, update = _update(tx, state, grads)
    return state, {**metrics, **update}


def _embedded(document: nnx.Module, batch: LsrBatch) -> jax.Array:
    """E_d of every candidate: passages_BxKxE."""
    B, K, T = batch.passage_tokens_BxKxT.shape
    tokens, mask = (rows.reshape(B * K, T) for rows in (batch.passage_tokens_BxKxT, batch.passage_mask_BxKxT))
    vectors = document(tokens, mask, batch.passage_indices_N)
    return vectors.reshape(B, K, -1)


def lsr_objective(
    queries_BxE: jax.Array, batch: LsrBatch, options: losses.LsrOptions, passages_BxKxE: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
    """Scores (Eq. 1) → p_R, p_LSR (Eq. 4) → loss (Eq. 5), with the entropies that show a flat target.

    Passages are the frozen vectors of the batch, unless those of an encoder that learns are given.
    """
    if passages_BxKxE is None:
        passages_BxKxE = jax.lax.stop_gradient(batch.passages_BxKxE)
    scores_BxK = options.score_scale * jnp.einsum("BE,BKE->BK", queries_BxE, passages_BxKxE)
    log_p_r_BxK = losses.retriever_logprobs(scores_BxK, batch.candidates_BxK)
    log_p_lsr_BxK = losses.lsr_target_logprobs(
        batch.lm_logp_BxK,
        batch.target_lengths_B,
        batch.candidates_BxK,
        score=options.score,
        tau=options.tau,
        prior_BxK=options.prior * batch.base_logits_BxK,
    )
    loss = losses.lsr_loss(log_p_r_BxK, log_p_lsr_BxK, batch.weights_B, direction=options.direction)
    objective = loss
    if options.anchor:
        log_p_0_BxK = jax.lax.stop_gradient(losses.retriever_logprobs(batch.base_logits_BxK, batch.candidates_BxK))
        objective += options.anchor * losses.weighted_mean(losses.kl(log_p_r_BxK, log_p_0_BxK), batch.weights_B)
    agree_B = (jnp.argmax(log_p_r_BxK, -1) == jnp.argmax(log_p_lsr_BxK, -1)).astype(jnp.float32)
    return objective, {
        "loss": loss,
        "target_entropy": losses.weighted_mean(losses.entropy(log_p_lsr_BxK), batch.weights_B),
        "retriever_entropy": losses.weighted_mean(losses.entropy(log_p_r_BxK), batch.weights_B),
        "top1_agrees": losses.weighted_mean(agree_B, batch.weights_B),
    }


def compile_step(
    step: Callable,
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    state: TrainState,
    mesh: Mesh,
    rules,
    *,
    frozen: Sequence[PyTree] = (),
    **static,
) -> Step:
    """The only training jit: a function of (state, batch, *frozen), of which `frozen` may be abstract here.

    In and out shardings: parameters and optimizer state by the rule table, batch rows over "data", metrics replicated. The state is donated
    (its buffers become the next state's), the batch is not: it is small and the loop may still name it when a loss is not finite. What is
    frozen is not either: every step reads it.
    Models know no mesh but the one in context: there they say that activations go by rows.
    """
    state_shardings = sharding.shardings(state, rules, mesh)
    rows = NamedSharding(mesh, P(None, sharding.DATA))

    def on_mesh(state: TrainState, batch: Any, *frozen: PyTree) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(graphdef, tx, state, batch, *frozen, **static)

    return jax.jit(
        on_mesh,
        in_shardings=(state_shardings, rows, *sharding.shardings(tuple(frozen), rules, mesh)),
        out_shardings=(state_shardings, sharding.replicated(mesh)),
        donate_argnums=0,
        compiler_options=TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None,
    )


def _accumulate(loss_fn: Callable[[PyTree, Any], tuple[jax.Array, Metrics]], params: PyTree, batch: Any) -> tuple[Metrics, PyTree]:
    """Sums of the metrics beside the loss, and of its gradients, over the leading axis of `batch`."""

    def of_part(part: Any) -> tuple[Metrics, PyTree]:
        grads, metrics = jax.grad(loss_fn, has_aux=True)(params, part)
        return metrics, grads

    first = jax.tree.map(lambda x: x[0], batch)
    if jax.tree.leaves(batch)[0].shape[0] == 1:  # nothing to sum: no second copy of the gradients
        return of_part(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, first))
    return jax.lax.scan(lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None), zeros, batch)[0]


def _update(tx: optax.GradientTransformation, state: TrainState, grads: PyTree) -> tuple[TrainState, Metrics]:
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(state.step + 1, params, opt_state), {"grad_norm": optax.global_norm(grads)}
