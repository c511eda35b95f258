"""Group-relative advantages, as pure functions of arrays."""

import jax
import jax.numpy as jnp

_SMALL = 1e-6


def group_relative(rewards_xG: jax.Array) -> jax.Array:
    """(R - mean) / (std + small) over the last axis; exactly 0 for a group without spread.

    GRPO's advantage (Shao et al. 2024) without a critic; the standard deviation is the population's.
    """
    mean = rewards_xG.mean(-1, keepdims=True)
    std = rewards_xG.std(-1, keepdims=True)
    return jnp.where(std > _SMALL, (rewards_xG - mean) / (std + _SMALL), 0.0)


def without_spread(rewards_xG: jax.Array) -> jax.Array:
    """bool `[...]`: groups whose rewards are all alike."""
    return rewards_xG.std(-1) <= _SMALL
