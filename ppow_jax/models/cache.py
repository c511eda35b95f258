"""The key/value cache: an argument and a result, never hidden state.

A cache holds, for every layer, keys and values `[B, G, S, E]` of S slots; slot p of a row belongs to
position p of that row. Models read the cache and return the keys and values of the tokens they were
given; the caller writes those it wants to keep, so a rejected draft never needs to be undone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import KeyValues

Cache = tuple[KeyValues, ...]


def empty(layers: int, batch: int, kv_heads: int, slots: int, head_size: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros; separate arrays, so that a jitted loop can update each in place."""
    shape = (batch, kv_heads, slots, head_size)
    return tuple(KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def write(cache: Cache, new: Sequence[KeyValues], start_B: jax.Array) -> Cache:
    """Writes `new` (`[B, G, 1, K, E]` a layer) to the slots `start .. start + K` of each row.

    A start for which the block would not fit is moved back by XLA's clamping; callers allocate enough
    slots (`slots >= start + K`).
    """

    def put(row_GxSxE: jax.Array, block_Gx1xKxE: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(row_GxSxE, block_Gx1xKxE[:, 0], (0, start, 0))

    return jax.tree.map(
        lambda old, block: jax.vmap(put)(old, block.astype(old.dtype), start_B), cache, tuple(new)
    )


def as_prefix(new: Sequence[KeyValues]) -> Cache:
    """The keys and values of a whole text (`[B, G, 1, T, E]`) as a cache of T slots."""
    return tuple(KeyValues(kv.keys[:, :, 0], kv.values[:, :, 0]) for kv in new)


def visible(length_B: jax.Array, slots: int) -> jax.Array:
    """bool `[B, 1, S]`: the slots below each row's length."""
    return (jnp.arange(slots) < length_B[:, None])[:, None]
