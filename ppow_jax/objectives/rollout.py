"""Grouped rollouts: G windows from every anchor, sampled from the drafter (PPOW, section 3).

Shape letters: B texts, A anchors, G windows a group, K window, N draft vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.drafters import windows
from ppow_jax.models.layers import at_ids, log_softmax, logsumexp
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives.base import Batch, Models


class Rollout(NamedTuple):
    """Sampled windows.

    Attributes:
      anchors: int32 `[B, A]`; real: bool `[B, A]`, False for padding.
      ids: int32 `[B, A, G, K]` draft ids; tokens: the same as target ids.
      log_prob: float32 `[B, A, G, K]`, log Q of each token as it was sampled: given the tokens before it, or,
        along the text, the text before it.
    """

    anchors: jax.Array
    real: jax.Array
    ids: jax.Array
    tokens: jax.Array
    log_prob: jax.Array


def roll(
    models: Models,
    batch: Batch,
    outputs: TargetOutputs,
    anchors_BxA: jax.Array,
    real_BxA: jax.Array,
    key: jax.Array,
    group: int,
    window: int,
    temperature: float,
    along_text: bool,
) -> Rollout:
    """Samples `group` windows of `window` tokens from every anchor, at a temperature of the drafter.

    Args:
      models, batch, outputs: as in `base.Objective.signal`.
      anchors_BxA, real_BxA: where windows begin, and which of them count.
      key: of this step.
      group, window: G and K.
      temperature: above 0.
      along_text: every window reads on the text itself, whatever it sampled, so that one pass over it serves
        the whole group. Its tokens have the same distribution up to the first that differs from the text,
        that one included.
    """
    prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, batch["tokens"])
    start = windows.text_starts(prefix, batch["tokens"], anchors_BxA)

    def given(step: int):
        uniform = jax.random.uniform(jax.random.fold_in(key, step), (*anchors_BxA.shape, group))
        return uniform, windows.text_ahead(batch["tokens"], anchors_BxA, step)

    def choose(step: int, hidden: jax.Array, logits: jax.Array, given: tuple[jax.Array, jax.Array]):
        uniform, ahead = given
        logits /= temperature
        ids = draw(uniform, log_softmax(logits))
        tokens = models.weights.vocab[ids]
        return ahead if along_text else tokens, (ids, tokens, log_prob_of(logits, ids))

    sampled = windows.window_pass(
        models.drafter, models.weights, prefix.keys_values, start, choose, window, given
    )
    return Rollout(anchors_BxA, real_BxA, *sampled)


def log_prob_of(logits_BxAxGxN: jax.Array, ids_BxAxG: jax.Array) -> jax.Array:
    """`[B, A, G]`, nats: of each token, by its own logits or those that its group shares `[B, A, 1, N]`."""
    total = logsumexp(logits_BxAxGxN)
    if total.shape == ids_BxAxG.shape:
        return at_ids(logits_BxAxGxN, ids_BxAxG) - total
    return jnp.take_along_axis(logits_BxAxGxN[:, :, 0], ids_BxAxG, -1, mode="clip") - total


def draw(uniform_BxAxG: jax.Array, logp_BxAxGxN: jax.Array) -> jax.Array:
    """int32 ids `[B, A, G]`, each from its own distribution or the one that its group shares `[B, A, 1, N]`.

    By inverting the distribution function: a random number in [0, 1) a token, where Gumbel's trick takes N.
    """
    below = jnp.cumsum(jnp.exp(logp_BxAxGxN), -1)
    u = uniform_BxAxG[..., None] * below[..., -1:]
    return jnp.minimum((below <= u).sum(-1), below.shape[-1] - 1)
