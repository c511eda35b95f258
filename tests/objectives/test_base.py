"""What all objectives share: weights that are normalised over the batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.objectives import base


@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
def test_weights_sum_to_1_however_small_they_are(scale):
    """As importances are, which may add up to less than 1."""
    weights = scale * np.random.default_rng(0).random((2, 3, 1, 4)).astype(np.float32)
    weights[..., 2] = 0.0
    by_step = base.per_step(jnp.asarray(weights))
    np.testing.assert_allclose(by_step.sum((0, 1, 2)), [1, 1, 0, 1], rtol=1e-6)
    np.testing.assert_allclose(by_step[..., 0], weights[..., 0] / weights[..., 0].sum(), rtol=1e-6)
    whole = base.per_token(jnp.asarray(weights))
    np.testing.assert_allclose(whole, weights / weights.sum(), rtol=1e-6)
    np.testing.assert_array_equal(base.per_token(jnp.zeros((1, 2, 1, 3))), np.zeros((1, 2, 1, 3)))
