"""The three losses of RA-DIT, each one equation (paper sections 2.2 to 2.4)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from radit_jax.errors import InputError
from radit_jax.models.layers import contract
from radit_jax.models.vocabulary import Head, in_blocks, out_of_blocks

NEGATIVE = -1e30  # stands for log 0 where -inf would make 0 · inf = nan in a gradient


@dataclasses.dataclass(frozen=True)
class LsrOptions:
    """How LM scores become the target of the retriever; the defaults are the paper's (section 2.4 and appendix)."""

    score: Literal["prob", "logprob", "mean_logprob"] = "prob"  # Eq. 4 as printed, its logarithm, or that per token (Atlas)
    tau: float = 0.01  # temperature of the target
    direction: Literal["retriever_first", "target_first"] = "retriever_first"  # KL(p_R ‖ p_LSR) as Eq. 5, or KL(p_LSR ‖ p_R)
    score_scale: float = 1.0  # multiplies s(x, c); part of the retriever (unit vectors need about 20)
    prior: float = 0.0  # weight of the untuned retriever's scores in the target; 0 as in the paper
    anchor: float = 0.0  # weight of KL(p_R ‖ p_R of the untuned retriever); 0 as in the paper

    def __post_init__(self):
        allowed = {"score": ("prob", "logprob", "mean_logprob"), "direction": ("retriever_first", "target_first")}
        for field, values in allowed.items():
            if getattr(self, field) not in values:
                raise InputError(f"lsr_ft.{field} is {getattr(self, field)!r}, expected one of {', '.join(values)}")
        if not self.tau > 0:
            raise InputError(f"lsr_ft.tau is {self.tau}, expected a number above 0")


def output_nll(logits_BxPxV: jax.Array, labels_BxP: jax.Array, weights_BxP: jax.Array) -> jax.Array:
    """Eq. 3: − Σ_i Σ_j log p_LM(y_i | c_ij ∘ x_i), summed over the output tokens whose weight is 1. Scalar float32, in nats.

    logits_BxPxV are those of the position *before* each label (types.LmBatch); prompt tokens have no slot, so they have no loss.
    """
    return jnp.sum(weights_BxP * -token_logprobs(logits_BxPxV, labels_BxP))


@jax.custom_vjp
def blocked_nll(hidden_BxPxD: jax.Array, head: Head, labels_BxP: jax.Array, weights_BxP: jax.Array) -> jax.Array:
    """`output_nll` of the head's logits, without all of them ever being there.

    Slots are gone through in blocks; a block in which no slot has weight is passed by: rows have room for more output tokens than they
    hold. The gradients are made on the way forward, while a block's logits are at hand.
    """
    return _blocked_forward(hidden_BxPxD, head, labels_BxP, weights_BxP)[0]


def _blocked_forward(hidden_BxPxD, head: Head, labels_BxP, weights_BxP):
    kernel, letters, dtype = head.kernel, head.letters, head.dtype

    def gone_through(carry, hidden_Bxpx, labels_Bxp, weights_Bxp):
        total, kernel_bar = carry
        logits_VxBxp = head.logits_in_front(hidden_Bxpx)
        norm_Bxp = jax.nn.logsumexp(logits_VxBxp, axis=0)
        total += jnp.sum(weights_Bxp * (norm_Bxp - head.token_logits(hidden_Bxpx, labels_Bxp)))
        one_VxBxp = jnp.arange(head.vocab_size)[:, None, None] == labels_Bxp[None]
        logits_bar = weights_Bxp[None] * (jnp.exp(logits_VxBxp - norm_Bxp[None]) - one_VxBxp)
        hidden_bar = contract(f"vbp,{letters}->bpd", logits_bar, kernel, dtype)
        operands = (logits_bar, hidden_Bxpx) if head.transposed else (hidden_Bxpx, logits_bar)
        kernel_bar += contract(f"{'vbp,bpd' if head.transposed else 'bpd,vbp'}->{letters}", *operands, dtype)
        return (total, kernel_bar), hidden_bar

    def body(carry, of_block):
        return jax.lax.cond(
            jnp.any(of_block[2] != 0), gone_through, lambda carry, hidden, *_: (carry, jnp.zeros(hidden.shape)), carry, *of_block
        )

    B, P, _ = hidden_BxPxD.shape
    blocks = [in_blocks(array, head.block(B, P)) for array in (hidden_BxPxD, labels_BxP, weights_BxP)]
    zero = (jnp.zeros(()), jnp.zeros(kernel.shape))
    (total, kernel_bar), hidden_bars = jax.lax.scan(body, zero, tuple(blocks))
    hidden_bar = out_of_blocks(hidden_bars, P)
    return total, (hidden_bar.astype(hidden_BxPxD.dtype), dataclasses.replace(head, kernel=kernel_bar.astype(kernel.dtype)))


def _blocked_backward(bars, cotangent):
    return (*jax.tree.map(lambda bar: bar * cotangent.astype(bar.dtype), bars), None, None)


blocked_nll.defvjp(_blocked_forward, _blocked_backward)


def token_logprobs(logits_xV: jax.Array, labels_x: jax.Array) -> jax.Array:
    """log p(label) under softmax(logits), float32; labels have the leading shape of the logits."""
    logits_xV = logits_xV.astype(jnp.float32)
    picked_x = jnp.take_along_axis(logits_xV, labels_x[..., None], axis=-1)[..., 0]
    return picked_x - jax.nn.logsumexp(logits_xV, axis=-1)


def retriever_logprobs(scores_BxK: jax.Array, candidates_BxK: jax.Array) -> jax.Array:
    """log p_R(c | x): softmax of (scaled) s(x, c) over the k candidates only (Eq. 2). Missing candidates get NEGATIVE."""
    return _log_softmax(scores_BxK, candidates_BxK)


def lsr_target_logprobs(
    lm_logp_BxK: jax.Array,
    target_lengths_B: jax.Array,
    candidates_BxK: jax.Array,
    *,
    score: str,
    tau: float,
    prior_BxK: jax.Array | float = 0.0,
) -> jax.Array:
    """Eq. 4: log p_LSR(c | x, y) = log softmax over the candidates of score / τ. A constant of R-ft: no gradient.

    "prob": the score is the raw sequence probability p_LM(y | c∘x), not its logarithm. "logprob": log p. "mean_logprob": log p per token.
    With "logprob", τ = 1 and the untuned scores as `prior_BxK`, the target is Bayes' posterior p(c | x, y) ∝ p_R(c | x) p_LM(y | c∘x):
    where the LM finds no passage better than another it is the untuned p_R, and teaches nothing instead of flattening it.
    """
    lengths_Bx1 = jnp.maximum(target_lengths_B, 1)[:, None].astype(jnp.float32)
    scores = {"prob": jnp.exp, "logprob": lambda logp: logp, "mean_logprob": lambda logp: logp / lengths_Bx1}
    return jax.lax.stop_gradient(_log_softmax(scores[score](lm_logp_BxK) / tau + prior_BxK, candidates_BxK))


def kl(log_p_BxK: jax.Array, log_q_BxK: jax.Array) -> jax.Array:
    """KL(p ‖ q) = Σ_k p (log p − log q) per row, in nats: a sum over the k candidates, never a mean."""
    return jnp.sum(jnp.exp(log_p_BxK) * (log_p_BxK - log_q_BxK), axis=-1)


def entropy(log_p_BxK: jax.Array) -> jax.Array:
    """H(p) per row in nats; log k says that a target of k candidates is flat and teaches nothing."""
    return -jnp.sum(jnp.exp(log_p_BxK) * log_p_BxK, axis=-1)


def lsr_loss(log_p_r_BxK: jax.Array, log_p_lsr_BxK: jax.Array, weights_B: jax.Array, *, direction: str) -> jax.Array:
    """Eq. 5: E KL(p_R ‖ p_LSR), the retriever's distribution first ("retriever_first"); "target_first" is KL(p_LSR ‖ p_R).

    A sum over candidates and a weighted mean over examples. Scalar float32.
    """
    pair = (log_p_r_BxK, log_p_lsr_BxK) if direction == "retriever_first" else (log_p_lsr_BxK, log_p_r_BxK)
    return weighted_mean(kl(*pair), weights_B)


def weighted_mean(values_B: jax.Array, weights_B: jax.Array) -> jax.Array:
    """Mean over the rows that are there: padding rows have weight 0."""
    return jnp.sum(values_B * weights_B) / jnp.maximum(jnp.sum(weights_B), 1e-9)


def _log_softmax(scores_BxK: jax.Array, mask_BxK: jax.Array) -> jax.Array:
    masked_BxK = jnp.where(mask_BxK, scores_BxK.astype(jnp.float32), NEGATIVE)
    return jnp.where(mask_BxK, jax.nn.log_softmax(masked_BxK, axis=-1), NEGATIVE)
