"""Losses by hand, their gradients where the clip bites and where it does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax import objective

P = np.array([0.5, 0.25, 0.25])
Q = np.array([0.25, 0.5, 0.25])


def test_cross_entropy_and_kl_by_hand_in_nats():
    """H(P, Q) = .5 ln 4 + .25 ln 2 + .25 ln 4; H(P) = .5 ln 2 + .5 ln 4; any level of the logits."""
    logits = np.log(P) + 7.0, np.log(Q) - 3.0
    cross, entropy = 1.75 * np.log(2), 1.5 * np.log(2)
    assert float(objective.cross_entropy(*logits)) == pytest.approx(cross, rel=1e-5)
    assert float(objective.kl(*logits)) == pytest.approx(cross - entropy, rel=1e-5)
    assert float(objective.kl(logits[1], logits[0])) == pytest.approx(0.25 * np.log(2), rel=1e-5)
    assert float(objective.kl(logits[0], logits[0])) == pytest.approx(0.0, abs=1e-6)


def test_cross_entropy_and_kl_pull_the_drafter_towards_the_target():
    """d/d logits is softmax(logits) - P for both."""
    for loss in (objective.cross_entropy, objective.kl):
        gradient = jax.grad(loss, argnums=1)(jnp.log(P), jnp.log(Q))
        np.testing.assert_allclose(gradient, Q - P, atol=1e-6)


def test_kl_is_finite_where_the_target_never_goes():
    target = jnp.array([0.0, -1e4, -60.0])
    assert float(objective.kl(target, jnp.zeros(3))) == pytest.approx(np.log(3), rel=1e-4)


def test_masked_mean_counts_what_the_mask_shows():
    values = np.array([[1.0, 2.0], [4.0, 100.0]])
    mask = np.array([[True, True], [True, False]])
    assert float(objective.masked_mean(values, mask)) == pytest.approx(7 / 3)
    assert float(objective.masked_mean(values, mask[:, :1])) == pytest.approx(107 / 4)  # broadcast
    assert float(objective.masked_mean(values, np.zeros((2, 2), bool))) == 0.0


CASES = [  # ratio, advantage, loss, d loss / d log_prob, clipped
    (1.5, 2.0, -2.4, 0.0, 1.0),
    (1.5, -2.0, 3.0, 3.0, 0.0),
    (0.5, 2.0, -1.0, -1.0, 0.0),
    (0.5, -2.0, 1.6, 0.0, 1.0),
    (1.1, 2.0, -2.2, -2.2, 0.0),
    (0.9, -2.0, 1.8, 1.8, 0.0),
    (1.5, 0.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope", "clipped"), CASES)
def test_the_clipped_loss_of_every_sign_and_side(ratio, advantage, loss, slope, clipped):
    """Clip 0.2. It stops the gradient only where it would push the ratio further out."""
    behaviour = -1.3
    log_prob = behaviour + np.log(ratio)
    args = (behaviour, advantage, 0.2)
    got, gradient = jax.value_and_grad(objective.clipped_policy_loss)(log_prob, *args)
    assert float(got) == pytest.approx(loss, rel=1e-5)
    assert float(gradient) == pytest.approx(slope, rel=1e-5, abs=1e-6)
    assert float(objective.clip_fraction(log_prob, *args)) == clipped
