"""The target's distributions along windows: the same wherever they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.models import blocks
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import losses
from ppow_jax.objectives.base import models_of
from ppow_jax.objectives.distributions import along_windows

B, T = 2, 9
HIDDEN = np.random.default_rng(0).normal(size=(B, T, small.TINY.width)).astype(np.float32)


@pytest.mark.parametrize("how", ["every position", "those that are read", "when looked up"])
def test_distributions_are_those_of_the_tokens_of_windows(tiny, how, monkeypatch):
    A, K = (5, 3) if how == "every position" else (2, 3)
    anchors = np.array([[4, 0, 7, 2, 6], [1, 3, 7, 0, 5]], np.int32)[:, :A]  # from 7 on beyond the text's end
    if how == "when looked up":
        monkeypatch.setitem(blocks.VALUES, "cpu", 8)
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
    outputs = TargetOutputs(jnp.zeros(()), jnp.asarray(HIDDEN), jnp.zeros((B, T)))
    asked = []

    def of(target_logits, positions):
        asked.append(positions.shape)
        return losses.renormalised(target_logits + positions[..., None] * jnp.arange(3.0).repeat(8))

    found = along_windows(models, outputs, jnp.asarray(anchors), K, of)
    for step in range(K):
        log_probs = found.look_up(found.where[..., step]).log_probs
        for b, a in np.ndindex(B, A):
            position = min(anchors[b, a] + 1 + step, T - 1)
            logits = HIDDEN[b, position] @ np.asarray(models.head_NxD).T + position * np.arange(3).repeat(8)
            wanted = jax.nn.log_softmax(logits)
            np.testing.assert_allclose(log_probs[b, a, 0], wanted, rtol=1e-5, atol=1e-5)
    shapes = {"every position": [(B, T)], "those that are read": [(B, A * K)], "when looked up": [(B, A)] * K}
    assert asked == shapes[how]


def test_logits_in_bfloat16_are_normalised_in_float32():
    """Between 16 and 32 bfloat16 knows eighths: a normaliser of that precision is off by up to 0.06."""
    logits = jnp.asarray(16 + 16 * np.random.default_rng(0).random((5, 40)), jnp.bfloat16)
    exact = np.float64(logits)
    total = np.log(np.exp(exact).sum(-1))
    found = losses.renormalised(logits)
    assert found.probs.dtype == jnp.float32
    np.testing.assert_allclose(found.log_probs, exact - total[:, None], atol=1e-5)
    np.testing.assert_allclose(found.probs.sum(-1), 1, atol=1e-5)
    outside = losses.unnormalised(logits, log_normaliser=jnp.asarray(total + 0.5))
    np.testing.assert_allclose(outside.mass, np.exp(-0.5), rtol=1e-5)
