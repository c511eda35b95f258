"""Grouped rollouts: G windows from every anchor, sampled from the drafter (PPOW, section 3).

Shape letters: B texts, A anchors, G windows a group, K window, N draft vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import teacher, windows
from ppow_jax.models.drafter import Drafter, weights_of
from ppow_jax.models.target import Target
from ppow_jax.settings import PPOWSettings


class Rollout(NamedTuple):
    """Sampled windows.

    Attributes:
      anchors: int32 `[B, A]`; real: bool `[B, A]`, False for padding.
      ids: int32 `[B, A, G, K]` draft ids; tokens: the same as target ids.
      log_prob: float32 `[B, A, G, K]`, log Q of each token as it was sampled: given the tokens before it, or,
        where the group is `drafted_as_one`, the text before it.
    """

    anchors: jax.Array
    real: jax.Array
    ids: jax.Array
    tokens: jax.Array
    log_prob: jax.Array


def drafted_as_one(settings: PPOWSettings) -> bool:
    """Whether all windows of a group follow the text, so that one pass over it serves them all.

    At temperature 0 a window is accepted as far as it repeats the text: up to its first refusal, that one
    included, its tokens are drawn from the laws along the text, and nothing behind it matters unless
    proximity or the credit looks there. The law of k and of all that is learnt from is the same; the
    drafter's work is that of one window instead of G.
    """
    return settings.temperature == 0 and settings.proximity_weight == 0 and settings.credit == "accepted"


def make_rollout(target: Target, drafter: Drafter, settings: PPOWSettings) -> Callable[..., Rollout]:
    """(params, vocab, target parameters, batch, anchors, real, key) -> Rollout, jitted."""
    as_one = drafted_as_one(settings)

    @jax.jit
    def roll(
        params: dict,
        vocab: jax.Array,
        target_params: dict,
        batch: Mapping[str, jax.Array],
        anchors: jax.Array,
        real: jax.Array,
        key: jax.Array,
    ) -> Rollout:
        lesson = teacher.lesson_of(target, target_params, batch)
        weights = weights_of(params, target_params, vocab)
        prefix = windows.text_prefix(drafter, weights, lesson.taps, batch["tokens"])
        start = windows.text_starts(prefix, batch["tokens"], anchors)

        def given(step: int):
            uniform = jax.random.uniform(jax.random.fold_in(key, step), (*anchors.shape, settings.group))
            return uniform, windows.text_ahead(batch["tokens"], anchors, step)

        def choose(step: int, logits: jax.Array, told: tuple[jax.Array, jax.Array]):
            uniform, ahead = told
            logp = jax.nn.log_softmax(logits / settings.rollout_temperature)
            ids = draw(uniform, logp)
            logp = jnp.broadcast_to(logp, (*ids.shape, logp.shape[-1]))
            chosen = jnp.take_along_axis(logp, ids[..., None], -1)[..., 0]
            return ahead if as_one else weights.vocab[ids], (ids, weights.vocab[ids], chosen)

        sampled = windows.window_pass(
            drafter, weights, prefix.keys_values, start, choose, settings.window, given
        )
        return Rollout(anchors, real, *sampled)

    return roll


def draw(uniform_BxAxG: jax.Array, logp_BxAxGxN: jax.Array) -> jax.Array:
    """int32 ids `[B, A, G]`, one from each law, or all of a group from the one that it shares `[B, A, 1, N]`.

    By inverting the distribution function: a random number in [0, 1) a token, where Gumbel's trick takes N.
    """
    below = jnp.cumsum(jnp.exp(logp_BxAxGxN), -1)
    u = uniform_BxAxG[..., None] * below[..., -1:]
    return jnp.minimum((below <= u).sum(-1), below.shape[-1] - 1)
