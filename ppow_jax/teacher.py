"""What the target has to say about a text: features for the drafter, its law at every position.

Shape letters: B rows, T positions, D width, C taps width, V vocabulary.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import partition
from ppow_jax.models import blocks
from ppow_jax.models.cache import Cache, as_prefix
from ppow_jax.models.target import Target, head_at_hand


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

    def some(hidden_BxLxD: jax.Array, next_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Of some positions: `[B, T, V]` would not fit."""
        logits = target.apply({"params": params}, hidden_BxLxD, method=Target.logits)
        logp_BxLxV = jax.nn.log_softmax(logits)
        entropy_BxL = -jnp.sum(jnp.exp(logp_BxLxV) * logp_BxLxV, -1)
        return jnp.take_along_axis(logp_BxLxV, next_BxL[..., None], 2)[..., 0], entropy_BxL

    params, (B, T) = head_at_hand(target.config, params), tokens_BxT.shape
    parts = blocks.count(partition.share(B, target.config.vocab_size) * T, T)
    log_prob_BxT, entropy_BxT = blocks.mapped(some, parts, hidden_BxTxD, jnp.roll(tokens_BxT, -1, 1))
    return log_prob_BxT.at[:, -1].set(0.0), entropy_BxT


def lesson_of(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> Lesson:
    """The lesson on a batch (see `data.texts.Texts`), from its features or by running the target."""
    if "taps" not in batch:
        return read(target, params, batch["tokens"])[0]
    hidden = batch["hidden"].astype(jnp.float32)
    law = _law(target, params, hidden, batch["tokens"])
    return Lesson(batch["taps"].astype(jnp.float32), hidden, *law)
