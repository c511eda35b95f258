"""Which drafted tokens the target keeps."""

import jax
import jax.numpy as jnp


def accepted_prefix(matches_xK: jax.Array) -> jax.Array:
    """Length of the leading run of True along the last axis, int32."""
    return jnp.cumprod(matches_xK.astype(jnp.int32), axis=-1).sum(-1)


def emitted(
    preferred_BxJ: jax.Array, accepted_B: jax.Array, room_B: jax.Array, stops: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """How many of a round's tokens are kept, and whether the text ends with them.

    Args:
      preferred_BxJ: the target's choices; the first `accepted + 1` are the round's tokens.
      accepted_B: drafted tokens that agreed.
      room_B: tokens that may still be emitted.
      stops: ids that end the text; the first of them is emitted, nothing after it.

    Returns:
      int32 `[B]` count (at most accepted + 1) and bool `[B]` stopped.
    """
    is_stop = jnp.isin(preferred_BxJ, jnp.asarray(stops))
    until_stop = accepted_prefix(~is_stop) + 1
    count = jnp.minimum(jnp.minimum(accepted_B + 1, until_stop), room_B)
    stopped = (until_stop <= count) | (count == room_B)
    return count, stopped
