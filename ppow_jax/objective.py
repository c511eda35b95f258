"""Losses, as pure functions of arrays."""

import jax
import jax.numpy as jnp


def cross_entropy(target_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """-sum P log Q over the last axis, P = softmax(target_logits), float32.

    Both run over the draft vocabulary, so P is the target's law restricted to it and renormalised.
    """
    p = jax.nn.softmax(target_logits, axis=-1)
    return -jnp.sum(p * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def kl(target_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(P || Q) over the last axis, P = softmax(target_logits), Q = softmax(logits), nats."""
    logp = jax.nn.log_softmax(target_logits, axis=-1)
    return jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(logits, axis=-1)), axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array, count: jax.Array | None = None) -> jax.Array:
    """Mean of `values` where `mask`; 0 if it is nowhere true.

    With the count of a whole batch, the share of a part of it in that batch's mean.
    """
    mask = jnp.broadcast_to(mask, values.shape).astype(values.dtype)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask) if count is None else count, 1.0)


def clipped_policy_loss(
    log_prob: jax.Array, behaviour: jax.Array, advantage: jax.Array, clip: float
) -> jax.Array:
    """-min(r A, clip(r, 1 - c, 1 + c) A) per token, r = exp(log_prob - behaviour).

    The clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated.
    """
    ratio = jnp.exp(log_prob - behaviour)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def clip_fraction(log_prob: jax.Array, behaviour: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """1.0 where the clip stops the gradient, else 0.0."""
    ratio = jnp.exp(log_prob - behaviour)
    stopped = ((ratio > 1.0 + clip) & (advantage > 0)) | ((ratio < 1.0 - clip) & (advantage < 0))
    return stopped.astype(jnp.float32)
