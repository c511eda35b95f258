"""Group-relative advantages, as pure functions of arrays."""

import jax
import jax.numpy as jnp

_SMALL = 1e-6


def standardised(rewards_xG: jax.Array) -> jax.Array:
    """(R - mean) / (std + small) over the last axis; exactly 0 for a group without spread.

    GRPO's advantage (Shao et al. 2024, arXiv 2402.03300) without a critic; the standard deviation is the
    population's.
    """
    std = rewards_xG.std(-1, keepdims=True)
    return jnp.where(std > _SMALL, centred(rewards_xG) / (std + _SMALL), 0.0)


def centred(rewards_xG: jax.Array) -> jax.Array:
    """R - mean over the last axis: its policy gradient is that of the expected reward, times (G - 1) / G."""
    return rewards_xG - rewards_xG.mean(-1, keepdims=True)


def without_spread(rewards_xG: jax.Array) -> jax.Array:
    """bool `[...]`: groups whose rewards are all alike."""
    return rewards_xG.std(-1) <= _SMALL


ADVANTAGES = {"standardised": standardised, "centred": centred}
