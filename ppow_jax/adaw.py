"""Adaptive divergence-aware windowing, as pure functions of arrays (PPOW, ADAW).

Shape letters: B rows, T positions, A anchors, K window.
"""

import jax
import jax.numpy as jnp


def criticality(entropy: jax.Array, divergence: jax.Array, vocab_size: int) -> jax.Array:
    """v = C(P) KL(P || Q) with C(P) = 1 - H(P) / log |V|, the target's confidence.

    Args:
      entropy: H(P), nats.
      divergence: KL(P || Q), nats.
      vocab_size: |V|.
    """
    return (1.0 - entropy / jnp.log(vocab_size)) * divergence


def anchor_scores(values_BxT: jax.Array, anchors_BxT: jax.Array, window: int) -> jax.Array:
    """Mean of the criticality over the window of each anchor; 0 where there is no anchor.

    Args:
      values_BxT: criticality at position t: of the prediction made from anchor t, token t + 2.
      anchors_BxT: bool, the positions that may be anchors. A window covers t .. t + K - 1; its mean
        runs over those of them that are anchors, so a window cut by the end of the text is not
        punished for being short.
      window: K.
    """
    weight = anchors_BxT.astype(values_BxT.dtype)
    pad = ((0, 0), (0, window))

    def running(x_BxT: jax.Array) -> jax.Array:
        total = jnp.cumsum(jnp.pad(x_BxT, pad), axis=1)
        total = jnp.concatenate([jnp.zeros_like(total[:, :1]), total], 1)
        return total[:, window : window + x_BxT.shape[1]] - total[:, : x_BxT.shape[1]]

    mean = running(values_BxT * weight) / jnp.maximum(running(weight), 1.0)
    return jnp.where(anchors_BxT, jnp.maximum(mean, 0.0), 0.0)


def sample_anchors(key: jax.Array, weights_BxT: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draws anchors of each row without replacement, in proportion to the weights (Gumbel top-k).

    Returns:
      int32 `[B, A]` positions, and bool `[B, A]`, False where a row has fewer than A positive weights
      (the position there is 0 and must be masked).
    """
    gumbel = jax.random.gumbel(key, weights_BxT.shape)
    score = jnp.where(weights_BxT > 0, jnp.log(jnp.maximum(weights_BxT, 1e-30)) + gumbel, -jnp.inf)
    top, positions = jax.lax.top_k(score, count)
    real = jnp.isfinite(top)
    return jnp.where(real, positions, 0).astype(jnp.int32), real
