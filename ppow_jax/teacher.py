"""What the target has to say about a text: features for the drafter, its law at every position.

Shape letters: B rows, T positions, D width, C taps width, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.cache import Cache, as_prefix
from ppow_jax.models.target import Target


class Features(NamedTuple):
    """What a drafter learns from, and all that is kept of a pass of the target.

    Attributes:
      taps: `[B, T, C]`, the drafter's features.
      hidden: `[B, T, D]`, final hidden states; times the head they are logits.
    """

    taps: jax.Array
    hidden: jax.Array


class Lesson(NamedTuple):
    """The target on a text: features, and its law, which costs nothing under jit where nobody asks for it.

    Attributes:
      taps, hidden: as in `Features`.
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
    lesson = Lesson(out.taps[:, 0], hidden_BxTxD, *_law(target, params, hidden_BxTxD, tokens_BxT))
    return lesson, as_prefix(out.new)


def _law(
    target: Target, params: dict, hidden_BxTxD: jax.Array, tokens_BxT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each next token and entropy, `[B, T]` both."""

    def one(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """One text at a time: `[B, T, V]` would not fit."""
        hidden_TxD, next_T = row
        logits = target.apply({"params": params}, hidden_TxD, method=Target.logits)
        logp_TxV = jax.nn.log_softmax(logits)
        entropy_T = -jnp.sum(jnp.exp(logp_TxV) * logp_TxV, -1)
        return jnp.take_along_axis(logp_TxV, next_T[:, None], 1)[:, 0], entropy_T

    log_prob_BxT, entropy_BxT = jax.lax.map(one, (hidden_BxTxD, jnp.roll(tokens_BxT, -1, 1)))
    return log_prob_BxT.at[:, -1].set(0.0), entropy_BxT


def lesson_of(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> Lesson:
    """The lesson on a batch (see `data.texts.Texts`), from its features or by running the target."""
    if "taps" not in batch:
        return read(target, params, batch["tokens"])[0]
    hidden = batch["hidden"].astype(jnp.float32)
    law = _law(target, params, hidden, batch["tokens"])
    return Lesson(batch["taps"].astype(jnp.float32), hidden, *law)
