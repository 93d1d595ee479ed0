"""The last map of the LM in its other forms: the plain logits, their normalizers, single logits, and those of some tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax.models import vocabulary
from radit_jax.models.layers import over_rows
from radit_jax.models.vocabulary import Head


@pytest.fixture(params=[True, False], ids=["embedding", "head"])
def head(request) -> Head:
    kernel = jax.random.normal(jax.random.key(0), (50, 12))
    return Head(kernel if request.param else kernel.T, request.param, "float32")


HIDDEN_BxPxD = jax.random.normal(jax.random.key(1), (3, 21, 12))
TOKENS_BxP = jax.random.randint(jax.random.key(2), (3, 21), 0, 50)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_every_form_is_of_the_plain_logits(monkeypatch, head):
    monkeypatch.setattr(vocabulary, "CPU_LOGITS", 3 * 50 * 8)  # blocks of 8 positions, the last one part empty
    plain = head.logits(HIDDEN_BxPxD)
    close(jnp.moveaxis(head.logits_in_front(HIDDEN_BxPxD), 0, -1), plain)
    close(head.normalizers(HIDDEN_BxPxD), jax.nn.logsumexp(plain, axis=-1))
    close(head.token_logits(HIDDEN_BxPxD, TOKENS_BxP), jnp.take_along_axis(plain, TOKENS_BxP[..., None], -1)[..., 0])
    some = jnp.asarray([7, 0, 49])
    close(head.of(some).logits(HIDDEN_BxPxD), plain[..., some])
    assert head.vocab_size == 50 and head.of(some).vocab_size == 3


def test_normalizers_hold_no_array_of_all_logits():
    head = Head(jnp.ones((70_000, 16)), True, "float32")
    text = jax.jit(head.normalizers).lower(jnp.ones((2, 300, 16))).compile().as_text()
    assert "[70000," in text and not any(f"[70000,{shape}]" in text for shape in ("2,300", "600"))


def test_a_vector_over_rows_has_the_sum_of_the_rows_as_gradient():
    x, vector = jax.random.normal(jax.random.key(3), (4, 5, 12)), jnp.arange(12.0)

    def loss(spread):
        return lambda vector: jnp.sum(jnp.sin(x * spread(vector)) * x)

    found = jax.grad(loss(lambda vector: over_rows(vector, x.shape)))(vector)
    close(found, jax.grad(loss(lambda vector: jnp.broadcast_to(vector[None, None], x.shape)))(vector))
    assert over_rows(vector.astype(jnp.bfloat16), x.shape).dtype == jnp.bfloat16
