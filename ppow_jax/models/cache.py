"""The key/value cache: an argument and a result, never hidden state.

A cache holds, for every layer, keys `[B, G, E, S]` and values `[B, G, S, E]` of S slots; slot p of a row
belongs to position p of that row. Models read the cache and return the keys and values of the tokens they
were given; the caller writes those it wants to keep, so a rejected draft never needs to be undone.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import KeyValues

Cache = tuple[KeyValues, ...]


def empty(layers: int, batch: int, kv_heads: int, slots: int, head_size: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros; separate arrays, so that a jitted loop can update each in place."""
    keys, values = (batch, kv_heads, head_size, slots), (batch, kv_heads, slots, head_size)
    return tuple(KeyValues(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(layers))


def write(cache: Cache, new: Cache, start_B: jax.Array, when: jax.Array | bool = True) -> Cache:
    """Writes a cache of K slots, the new tokens, to the slots `start .. start + K` of each row.

    Args:
      cache: what is updated.
      new: keys and values of K slots.
      start_B: int32. A start for which the block would not fit is moved back by XLA's clamping; callers
        allocate enough slots (`slots >= start + K`).
      when: False: nobody will read what is written, and writing may be left out. In a decoding loop, whether
        any text goes on; see `_write_rows` for what this is good for.
    """
    return jax.lax.platform_dependent(
        cache, new, start_B, jnp.asarray(when), cpu=_write_rows, default=_scatter
    )


def _scatter(cache: Cache, new: Cache, start_B: jax.Array, _: jax.Array) -> Cache:
    """All rows at once; splits over a mesh by rows."""

    def put(old: KeyValues, block: KeyValues, start: jax.Array) -> KeyValues:
        return KeyValues(
            jax.lax.dynamic_update_slice(old.keys, block.keys.astype(old.keys.dtype), (0, 0, start)),
            jax.lax.dynamic_update_slice(old.values, block.values.astype(old.values.dtype), (0, start, 0)),
        )

    return tuple(jax.vmap(put)(old, block, start_B) for old, block in zip(cache, new, strict=True))


def _write_rows(cache: Cache, new: Cache, start_B: jax.Array, when: jax.Array) -> Cache:
    """Row by row: as one scatter, XLA's CPU backend copies the whole cache twice.

    To write in place the compiler must also see that all reads of the old cache come first. `when` tells
    it so: it follows from the last layer's output, and the loop cannot begin before it is known.
    """

    def into(old: jax.Array, block: jax.Array, row: jax.Array, at: tuple) -> jax.Array:
        block = jax.lax.dynamic_slice_in_dim(block, row, 1).astype(old.dtype)
        return jax.lax.dynamic_update_slice(old, block, (row, *at))

    def put(row: jax.Array, cache: Cache) -> Cache:
        start = start_B[row]
        return tuple(
            KeyValues(
                into(old.keys, block.keys, row, (0, 0, start)),
                into(old.values, block.values, row, (0, start, 0)),
            )
            for old, block in zip(cache, new, strict=True)
        )

    return jax.lax.fori_loop(0, jnp.where(when, start_B.shape[0], 0), put, cache)


def append(old: KeyValues | None, new: KeyValues) -> KeyValues:
    """`old` (None: nothing) followed by `new`."""
    if old is None:
        return new
    return KeyValues(jnp.concatenate([old.keys, new.keys], -1), jnp.concatenate([old.values, new.values], -2))


def grow(cache: Cache, slots: int) -> Cache:
    """The cache with `slots` slots, at least as many as it has."""
    more = slots - cache[0].values.shape[2]
    keys, values = ((0, 0), (0, 0), (0, 0), (0, more)), ((0, 0), (0, 0), (0, more), (0, 0))
    return tuple(KeyValues(jnp.pad(kv.keys, keys), jnp.pad(kv.values, values)) for kv in cache)


def as_prefix(new: Sequence[KeyValues]) -> Cache:
    """Keys and values of one window a row (a whole text, say) as a cache."""
    return tuple(KeyValues(kv.keys[:, :, 0], kv.values[:, :, 0]) for kv in new)


def visible(length_B: jax.Array, slots: int) -> jax.Array:
    """bool `[B, 1, S]`: the slots below each row's length."""
    return (jnp.arange(slots) < length_B[:, None])[:, None]
