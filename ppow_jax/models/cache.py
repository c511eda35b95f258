"""The key/value cache: an argument and a result, never hidden state.

A cache holds, for every layer, keys `[B, F, E, S]` (or `in_blocks`) and values `[B, F, S, E]` of S slots. A
slot belongs to the position of the same number in its row; but where all rows go on in step, one token
each, a round's tokens lie in the same slot of all of them (`decode.loop`). Models read the cache and return
the keys and values of the tokens they were given; the caller writes those it wants to keep, so a rejected
draft never needs to be undone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValues(NamedTuple):
    """Keys and values of one attention layer.

    Keys lie transposed, as the scores' matrix product reads them: on a CPU, where a batched product with a
    transposed operand copies it first, a decoding step of 256 rows attends 3 times faster.

    Attributes:
      keys: `[B, F, E, S]` of a prefix that all windows share, or the same in blocks (`cache.in_blocks`),
        `[B, F, S / Z, E, Z]`; `[B, F, W, E, K]` of windows.
      values: `[B, F, S, E]`, or `[B, F, W, K, E]`.
    """

    keys: jax.Array
    values: jax.Array


Cache = tuple[KeyValues, ...]


def empty(layers: int, batch: int, kv_heads: int, slots: int, head_size: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros; separate arrays, so that a jitted loop can update each in place."""
    keys, values = (batch, kv_heads, head_size, slots), (batch, kv_heads, slots, head_size)
    return tuple(KeyValues(jnp.zeros(keys, dtype), jnp.zeros(values, dtype)) for _ in range(layers))


def write(cache: Cache, new: Cache, start: jax.Array, when: jax.Array | bool = True) -> Cache:
    """Writes a cache of K slots, the new tokens, to the slots `start .. start + K`.

    Args:
      cache: what is updated.
      new: keys and values of K slots.
      start: int32 `[B]`, or `[]`, the same for all rows, which is cheaper (keys in blocks take no other). A
        start for which the block would not fit is moved back by XLA's clamping; callers allocate enough
        slots (`slots >= start + K`).
      when: False: nobody will read what is written, and it may be anything. In a decoding loop, whether
        any text goes on: to write in place the compiler must see that all reads of the old cache come
        first, and `when` tells it so, as it follows from the last layer's output.
    """
    when = jnp.asarray(when)
    if start.ndim == 0:
        return _put(cache, new, jnp.where(when, start, 0))
    return jax.lax.platform_dependent(cache, new, start, when, cpu=_write_rows, default=_scatter)


def _put(cache: Cache, new: Cache, start: jax.Array) -> Cache:
    """The same slots of every row; the rows' axis may be missing."""

    def into(old: jax.Array, block: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, block.astype(old.dtype), start, old.ndim + axis)

    def into_keys(old: jax.Array, block: jax.Array) -> jax.Array:
        if old.ndim == block.ndim:
            return into(old, block, -1)
        number, slot = jnp.divmod(start, old.shape[-1])  # one slot alone never straddles two blocks
        return jax.lax.dynamic_update_slice(old, block[:, :, None].astype(old.dtype), (0, 0, number, 0, slot))

    return tuple(
        KeyValues(into_keys(old.keys, block.keys), into(old.values, block.values, -2))
        for old, block in zip(cache, new, strict=True)
    )


def _scatter(cache: Cache, new: Cache, start_B: jax.Array, _: jax.Array) -> Cache:
    """Each row's own slots, all rows at once; splits over a mesh by rows."""
    return jax.vmap(_put)(cache, new, start_B)


def _write_rows(cache: Cache, new: Cache, start_B: jax.Array, when: jax.Array) -> Cache:
    """Row by row: as one scatter, XLA's CPU backend copies the whole cache twice."""

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
    """The cache with `slots` slots, at least as many as it has; in blocks, a multiple of theirs."""

    def extend(x: jax.Array, axis: int, more: int) -> jax.Array:
        return jnp.pad(x, [(0, more if at == axis else 0) for at in range(x.ndim)])

    def grown(kv: KeyValues) -> KeyValues:
        more = slots - kv.values.shape[2]
        axis, each = (3, 1) if kv.keys.ndim == 4 else (2, kv.keys.shape[-1])
        return KeyValues(extend(kv.keys, axis, more // each), extend(kv.values, 2, more))

    return tuple(map(grown, cache))


def in_blocks(cache: Cache, size: int) -> Cache:
    """The cache with keys `[B, F, S / Z, E, Z]`, in blocks of Z = `size` slots that divide its own.

    With many rows a block, which lies in one piece, is read faster on a CPU (docs/performance.md). To such a
    cache `write` adds one slot at a time, the same for all rows.
    """

    def cut(keys: jax.Array) -> jax.Array:
        B, F, E, S = keys.shape
        return keys.reshape(B, F, E, S // size, size).swapaxes(2, 3)

    return tuple(KeyValues(cut(kv.keys), kv.values) for kv in cache)


def pick(new: Cache, slots_BxK: jax.Array) -> Cache:
    """The slots of each row that are named, in that order."""
    keys, values = slots_BxK[:, None, None, :], slots_BxK[:, None, :, None]
    take = jnp.take_along_axis
    return tuple(KeyValues(take(kv.keys, keys, 3), take(kv.values, values, 2)) for kv in new)


def as_prefix(new: Sequence[KeyValues]) -> Cache:
    """Keys and values of one window a row (a whole text, say) as a cache."""
    return tuple(KeyValues(kv.keys[:, :, 0], kv.values[:, :, 0]) for kv in new)


def visible(length_B: jax.Array, slots: int) -> jax.Array:
    """bool `[B, 1, S]`: the slots below each row's length."""
    return (jnp.arange(slots) < length_B[:, None])[:, None]
