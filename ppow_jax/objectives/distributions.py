"""The target's distribution over the draft vocabulary along windows of the text, for objectives that compare
the drafter with it.

Shape letters: B texts, T positions, A anchors, K steps of a window, L some positions or anchors, N draft
vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ppow_jax.models import blocks
from ppow_jax.models.layers import product
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives.base import Models, at
from ppow_jax.objectives.losses import TargetDistribution
from ppow_jax.parallel import partition

# Distributions are kept if an array of them takes no more memory than so many blocks; others are computed
# where they are read.
_KEPT_BLOCKS = 2

# (target logits [B, L, N], their positions [B, L]) -> the distribution, leaves [B, L, ...]
FromLogits = Callable[[jax.Array, jax.Array], TargetDistribution]


@dataclasses.dataclass(frozen=True)
class AlongWindows:
    """The target's distributions along windows.

    Attributes:
      where: int32 `[B, A, K]`, where to look up that of each token.
      look_up: that for the windows of a group, which share it: `where` of some anchors at a step `[B, L]` ->
        leaves `[B, L, 1, ...]`.
    """

    where: jax.Array
    look_up: Callable[[jax.Array], TargetDistribution]


def where_read(
    outputs: TargetOutputs, anchors_BxA: jax.Array, window: int, of: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """`[B, T]`: `of` the target's hidden states, `[B, L, D]` -> `[B, L]`, at positions that windows read.

    Others are 0 if it was spared to compute them, as what reads the whole vocabulary is dear.
    """
    (B, A), T = anchors_BxA.shape, outputs.hidden.shape[1]
    if A * window >= T:
        return of(outputs.hidden)
    read_BxL = _read(anchors_BxA, window, T).reshape(B, -1)
    found_BxL = of(at(outputs.hidden, read_BxL))
    return jnp.zeros((B, T), found_BxL.dtype).at[jnp.arange(B)[:, None], read_BxL].set(found_BxL)


def _read(anchors_BxA: jax.Array, window: int, length: int) -> jax.Array:
    """int32 `[B, A, K]`: the positions at which the target has foretold the tokens of windows."""
    return jnp.minimum(anchors_BxA[..., None] + 1 + jnp.arange(window), length - 1)


def along_windows(
    models: Models, outputs: TargetOutputs, anchors_BxA: jax.Array, window: int, of: FromLogits
) -> AlongWindows:
    """The distributions of the tokens of windows of the text.

    They are computed once for all steps, of every position of the texts or of those that the windows read,
    whichever are fewer; or, where they would not fit at once, when they are looked up.

    Args:
      models: whose `head_NxD` is used.
      outputs: the target's on the texts.
      anchors_BxA: where the windows begin.
      window: K.
      of: makes a distribution of logits.
    """
    (B, A), T = anchors_BxA.shape, outputs.hidden.shape[1]
    read_BxAxK = _read(anchors_BxA, window, T)

    def compute(positions_BxL: jax.Array) -> TargetDistribution:
        return of(product(at(outputs.hidden, positions_BxL), models.head_NxD), positions_BxL)

    def per_group(found: TargetDistribution) -> TargetDistribution:
        return jax.tree.map(lambda leaf: leaf[:, :, None], found)

    rows = min(T, A * window)
    if blocks.count(partition.share(B, len(models.head_NxD)) * rows, rows) > _KEPT_BLOCKS:
        return AlongWindows(read_BxAxK, lambda where_BxL: per_group(compute(where_BxL)))
    if A * window >= T:
        table, where_BxAxK = compute(jnp.broadcast_to(jnp.arange(T), (B, T))), read_BxAxK
    else:
        table = compute(read_BxAxK.reshape(B, -1))
        where_BxAxK = jnp.broadcast_to(jnp.arange(A * window).reshape(A, window), read_BxAxK.shape)

    def look_up(where_BxL: jax.Array) -> TargetDistribution:
        return per_group(jax.tree.map(lambda leaf: at(leaf, where_BxL), table))

    return AlongWindows(where_BxAxK, look_up)
