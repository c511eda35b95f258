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
      log_prob: float32 `[B, A, G, K]`, log Q of each token as it was sampled.
    """

    anchors: jax.Array
    real: jax.Array
    ids: jax.Array
    tokens: jax.Array
    log_prob: jax.Array


def make_rollout(target: Target, drafter: Drafter, settings: PPOWSettings) -> Callable[..., Rollout]:
    """(params, vocab, target parameters, batch, anchors, real, key) -> Rollout, jitted."""

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

        def choose(step: int, logits: jax.Array):
            B, A, _, N = logits.shape
            logp = jax.nn.log_softmax(logits / settings.rollout_temperature)
            logp = jnp.broadcast_to(logp, (B, A, settings.group, N))
            ids = jax.random.categorical(jax.random.fold_in(key, step), logp)
            chosen = jnp.take_along_axis(logp, ids[..., None], -1)[..., 0]
            return weights.vocab[ids], (ids, weights.vocab[ids], chosen)

        sampled = windows.window_pass(drafter, weights, prefix.keys_values, start, choose, settings.window)
        return Rollout(anchors, real, *sampled)

    return roll
