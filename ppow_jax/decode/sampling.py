"""The distribution that texts are sampled from: temperature, top-k, top-p.

Shape letters: V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppow_jax.models.layers import likeliest


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is picked from logits.

    Attributes:
      temperature: 0 takes the likeliest token, and the other two say nothing; above 0 logits are divided by
        it.
      top_k: only the k likeliest tokens remain; 0: all.
      top_p: of those, the fewest likeliest ones whose probabilities reach this sum (nucleus sampling:
        Holtzman et al. 2020); 1: all.

    Tokens as likely as the last one that remains do, too.

    Raises:
      ValueError: a negative temperature or top_k, a top_p outside (0, 1].
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"found {self}, expected temperature >= 0, top_k >= 0 and 0 < top_p <= 1")


GREEDY = Sampling()


def log_probs(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 log-probabilities `[..., V]`, -inf where top-k or top-p exclude.

    At temperature 0, where nothing is drawn, those of the logits as they are.
    """
    if sampling.temperature == 0:
        return jax.nn.log_softmax(logits)
    z = logits / sampling.temperature
    if sampling.top_k:
        z = _at_least(z, _threshold(z, jnp.ones_like(z), sampling.top_k))
    if sampling.top_p < 1:
        z = _at_least(z, _threshold(z, jax.nn.softmax(z), sampling.top_p))
    return jax.nn.log_softmax(z)


def pick(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 `[B]`: a token for each row of logits `[B, V]`."""
    if sampling.temperature == 0:
        return likeliest(logits)
    return draw(keys, log_probs(logits, sampling))


def draw(keys: jax.Array, log_probs_BxV: jax.Array) -> jax.Array:
    """int32 `[B]`: a sample of each row of `[B, V]`, which need not be normalised."""
    return jax.vmap(jax.random.categorical)(keys, log_probs_BxV).astype(jnp.int32)


def _at_least(z: jax.Array, threshold: jax.Array) -> jax.Array:
    return jnp.where(_ordered(z) >= threshold, z, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the same order as the float32 values."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(z: jax.Array, weight: jax.Array, goal: float) -> jax.Array:
    """The largest number, `[..., 1]` as `_ordered` gives it, that values of a total weight of `goal` reach.

    Found bit by bit: 32 sums, where XLA's CPU backend takes 9 ms to sort a vocabulary of 49,152.
    """
    ordered = _ordered(z)

    def with_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        higher = found | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        reached = jnp.where(ordered >= higher, weight, 0).sum(-1, keepdims=True) >= goal
        return jnp.where(reached, higher, found)

    return jax.lax.fori_loop(0, 32, with_bit, jnp.zeros((*z.shape[:-1], 1), jnp.uint32))
