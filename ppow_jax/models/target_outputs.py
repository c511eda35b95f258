"""What the target has to say about a text: features for the drafter, its distribution at every position.

Shape letters: B rows, T positions, D width, C taps width, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.models import blocks
from ppow_jax.models.cache import Cache, as_prefix
from ppow_jax.models.layers import inner, likeliest
from ppow_jax.models.target import Target, head_at_hand
from ppow_jax.parallel import partition

Array = TypeVar("Array", jax.Array, np.ndarray)  # on devices, or in memory


class Features(NamedTuple, Generic[Array]):
    """What a drafter learns from, and all that is kept of a pass of the target.

    Attributes:
      taps: `[B, T, C]`, the drafter's features.
      hidden: `[B, T, D]`, final hidden states; times the head they are logits.
    """

    taps: Array
    hidden: Array


class TargetOutputs(NamedTuple):
    """The target on a text; under jit what nobody asks for costs nothing.

    Attributes:
      taps, hidden: as in `Features`.
      log_prob: float32 `[B, T]`, log P(token p + 1 | tokens <= p); 0 at the last position.
    """

    taps: jax.Array
    hidden: jax.Array
    log_prob: jax.Array


def read(target: Target, params: dict, tokens_BxT: jax.Array) -> tuple[TargetOutputs, Cache]:
    """One forward pass over texts: the outputs, and the cache that drafted windows branch from."""
    B, T = tokens_BxT.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, 1, T))
    out = target.apply({"params": params}, tokens_BxT[:, None], positions)
    hidden_BxTxD = out.hidden[:, 0]
    log_prob_BxT = log_prob_of_next(target, params, hidden_BxTxD, tokens_BxT)
    outputs = TargetOutputs(out.taps[:, 0], hidden_BxTxD, log_prob_BxT)
    return outputs, as_prefix(out.new)


def log_prob_of_next(
    target: Target,
    params: dict,
    hidden_BxTxD: jax.Array,
    tokens_BxT: jax.Array,
    log_probs: Callable[[jax.Array], jax.Array] = jax.nn.log_softmax,
) -> jax.Array:
    """float32 `[B, T]`: `TargetOutputs.log_prob`, by `log_probs` of the logits."""

    def some(logits_BxLxV: jax.Array, next_BxL: jax.Array) -> jax.Array:
        logp_BxLxV = log_probs(logits_BxLxV)
        return jnp.take_along_axis(logp_BxLxV, next_BxL[..., None], 2)[..., 0]

    next_BxT = jnp.roll(tokens_BxT, -1, 1)
    return _over_vocabulary(target, params, hidden_BxTxD, some, next_BxT).at[:, -1].set(0.0)


def _over_vocabulary(
    target: Target, params: dict, hidden_BxTxD: jax.Array, of: Callable[..., Any], *more: jax.Array
) -> Any:
    """`of(logits, *more)` by blocks of positions, as all of `[B, T, V]` would not fit."""

    def some(hidden_BxLxD: jax.Array, *more: jax.Array) -> Any:
        return of(target.apply({"params": params}, hidden_BxLxD, method=Target.logits), *more)

    params, (B, T) = head_at_hand(target.config, params), hidden_BxTxD.shape[:2]
    parts = blocks.count(partition.share(B, target.config.vocab_size) * T, T)
    return blocks.mapped(some, parts, hidden_BxTxD, *more)


def outputs_of(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> TargetOutputs:
    """The outputs on a batch (see `data.texts.Texts`), from its features or by running the target."""
    if "taps" not in batch:
        return read(target, params, batch["tokens"])[0]
    hidden = batch["hidden"].astype(jnp.float32)
    log_prob = log_prob_of_next(target, params, hidden, batch["tokens"])
    return TargetOutputs(batch["taps"].astype(jnp.float32), hidden, log_prob)


@functools.partial(jax.jit, static_argnums=0)
def taps_of(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The target's taps `[B, T, C]` on a batch, from its features or by running the target."""
    return outputs_of(target, params, batch).taps


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(target: Target, params: dict, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The target's final hidden states `[B, T, D]`, likewise."""
    return outputs_of(target, params, batch).hidden


def entropy_of(target: Target, params: dict, hidden_BxTxD: jax.Array) -> jax.Array:
    """float32 `[B, T]`, nats: the entropy of P(. | tokens <= p), for a branch that is seldom taken.

    It is no field of `TargetOutputs`: an array that a branch of `lax.cond` reads from outside is computed
    whether the branch is taken or not.
    """

    def some(logits_BxLxV: jax.Array) -> jax.Array:
        logp_BxLxV = jax.nn.log_softmax(logits_BxLxV)
        return -inner(jnp.exp(logp_BxLxV), logp_BxLxV)

    return _over_vocabulary(target, params, hidden_BxTxD, some)


def log_normaliser(target: Target, params: dict, hidden_BxTxD: jax.Array, temperature: float) -> jax.Array:
    """float32 `[B, T]`: logsumexp over all V tokens of logits / temperature, which is above 0."""

    def some(logits_BxLxV: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(logits_BxLxV / temperature, -1)

    return _over_vocabulary(target, params, hidden_BxTxD, some)


def likeliest_tokens(target: Target, params: dict, hidden_BxTxD: jax.Array) -> jax.Array:
    """int32 `[B, T]`: the likeliest of all V tokens."""
    return _over_vocabulary(target, params, hidden_BxTxD, likeliest)
