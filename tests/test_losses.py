"""The loss of LM-ft in blocks of slots: the plain form's value and gradients, without the plain form's logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radit_jax.models import vocabulary
from radit_jax.models.vocabulary import Head
from radit_jax.training import losses


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("slots", [5, 16, 40])
def test_the_loss_in_blocks_and_its_gradients_are_those_of_the_whole(monkeypatch, transposed, slots):
    monkeypatch.setattr(vocabulary, "CPU_LOGITS", 3 * 50 * 8)  # blocks of 8 slots
    keys = jax.random.split(jax.random.key(0), 4)
    hidden, kernel = jax.random.normal(keys[0], (3, slots, 12)), jax.random.normal(keys[1], (50, 12) if transposed else (12, 50))
    labels = jax.random.randint(keys[2], (3, slots), 0, 50)
    weights = (jnp.arange(slots)[None] < jnp.asarray([4, 0, 11])[:, None]).astype(jnp.float32)  # the last blocks hold nothing

    def whole(hidden, kernel):
        return 3.0 * losses.output_nll(hidden @ (kernel.T if transposed else kernel), labels, weights)

    def blocks(hidden, kernel):
        return 3.0 * losses.blocked_nll(hidden, Head(kernel, transposed, "float32"), labels, weights)

    expected, found = (jax.value_and_grad(loss, argnums=(0, 1))(hidden, kernel) for loss in (whole, blocks))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_no_array_of_all_logits_is_there():
    hidden, kernel = jnp.ones((2, 48, 16)), jnp.ones((70_000, 16))
    labels, weights = jnp.zeros((2, 48), jnp.int32), jnp.ones((2, 48))
    loss = jax.grad(lambda h: losses.blocked_nll(h, Head(kernel, True, "float32"), labels, weights))
    text = jax.jit(loss).lower(hidden).compile().as_text()
    assert "[70000," in text
    assert not any(array in text for shape in ("2,48", "96", "48,2") for array in (f"[{shape},70000]", f"[70000,{shape}]"))
