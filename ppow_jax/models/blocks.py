"""Large intermediate arrays in blocks, one at a time, so that no more than a block is ever held.

Shape letters: B rows, L length of the axis that is cut.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax.parallel import partition

# Of an intermediate array that a device holds at once: 128 MB of float32 on a CPU, 512 on accelerators,
# which like larger products.
VALUES = {"cpu": 2**25, "default": 2**27}


def count(values: int, length: int) -> int:
    """Into how many blocks an axis of `length` is cut where a device would hold `values` values at once."""
    return min(length, -(-values // partition.suited(VALUES)))


def mapped(of: Callable[..., Any], blocks: int, *trees: Any, fill: str = "edge") -> Any:
    """`of(*trees)` by blocks along axis 1 of all leaves `[B, L, ...]`, of arguments and results alike.

    Every position must be computed by itself. The backward pass computes each block again, so that it holds
    no more either. One block: plain `of`. A leaf of the results may have length 1: what a block has once.

    Args:
      of: what is computed.
      blocks: how many.
      trees: its arguments.
      fill: what stands behind the last position where blocks are not even: the last position itself ("edge"),
        as of made-up values a gradient may be NaN, or zeros ("constant").
    """
    if blocks == 1:
        return of(*trees)
    length = jax.tree.leaves(trees)[0].shape[1]
    even = next(n for n in range(blocks, length + 1) if length % n == 0)
    blocks = even if even < 2 * blocks else blocks  # without padding, if that is to be had
    size = -(-length // blocks)
    blocks = -(-length // size)

    def cut(x: jax.Array) -> jax.Array:
        around = [(0, size * blocks - length if axis == 1 else 0) for axis in range(x.ndim)]
        padded = jnp.pad(x, around, mode=fill) if length < size * blocks else x
        return jnp.moveaxis(padded.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]

    return jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda block: of(*block)), jax.tree.map(cut, trees)))
