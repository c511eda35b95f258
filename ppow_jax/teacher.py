"""What the target has to say about a text: features for the drafter, its law at every position.

Shape letters: B rows, T positions, D width, C taps width, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.cache import Cache, as_prefix
from ppow_jax.models.target import Target


class Lesson(NamedTuple):
    """The target on a text.

    Attributes:
      taps: `[B, T, C]`, the drafter's features.
      hidden: `[B, T, D]`, final hidden states; times the head they are logits.
      log_prob: float32 `[B, T]`, log P(token p + 1 | tokens <= p); 0 at the last position.
      entropy: float32 `[B, T]`, nats, of P(. | tokens <= p).
    """

    taps: jax.Array
    hidden: jax.Array
    log_prob: jax.Array
    entropy: jax.Array


def read(target: Target, params: dict, tokens_BxT: jax.Array) -> tuple[Lesson, Cache]:
    """One forward pass over texts: the lesson, and the cache that drafted windows branch from."""
    B, T = tokens_BxT.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, 1, T))
    out = target.apply({"params": params}, tokens_BxT[:, None], positions)
    hidden_BxTxD = out.hidden[:, 0]

    def law(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """One text at a time: `[B, T, V]` would not fit."""
        hidden_TxD, next_T = row
        return law_of(target.apply({"params": params}, hidden_TxD, method=Target.logits), next_T)

    log_prob_BxT, entropy_BxT = jax.lax.map(law, (hidden_BxTxD, jnp.roll(tokens_BxT, -1, 1)))
    log_prob_BxT = log_prob_BxT.at[:, -1].set(0.0)
    return Lesson(out.taps[:, 0], hidden_BxTxD, log_prob_BxT, entropy_BxT), as_prefix(out.new)


def law_of(logits_xV: jax.Array, next_x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the next token, entropy in nats) of the law that logits stand for."""
    logp_xV = jax.nn.log_softmax(logits_xV)
    log_prob_x = jnp.take_along_axis(logp_xV, next_x[..., None], -1)[..., 0]
    return log_prob_x, -jnp.sum(jnp.exp(logp_xV) * logp_xV, -1)


def lesson_of(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> Lesson:
    """The lesson on a batch (see `data.texts.Texts`): the stored one, or by running the target."""
    if "taps" not in batch:
        return read(target, params, batch["tokens"])[0]
    return Lesson(
        batch["taps"].astype(jnp.float32),
        batch["hidden"].astype(jnp.float32),
        batch["log_prob"],
        batch["entropy"],
    )


def read_batch(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> tuple[Lesson, Cache]:
    """`read`, with the stored law where there is one: under jit the head then need not run."""
    lesson, cache = read(target, params, batch["tokens"])
    if "taps" in batch:
        lesson = lesson._replace(log_prob=batch["log_prob"], entropy=batch["entropy"])
    return lesson, cache
