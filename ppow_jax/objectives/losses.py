"""Losses per position, as pure functions of arrays.

Symbols: T the target's distribution and q = softmax(logits) the drafter's, both over the draft vocabulary;
a = sum_x min(T(x), q(x)), the probability that a token sampled from q is accepted (Leviathan et al.,
arXiv 2211.17192, section 3.2). Logarithms are natural. What makes T stops gradients, so losses have none
through the target.

Shape letters: N draft vocabulary, V vocabulary; `...` stands for any leading axes, for example those of
windows `[B, A, G]` (B texts, A anchors, G windows a group). Leading axes of target and logits broadcast.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import keys
from ppow_jax.errors import ConfigError
from ppow_jax.models.layers import inner, likeliest, log_softmax, logsumexp

_LOG_ZERO = -1e30  # stands for log 0: finite, so that 0 * log 0 is 0 and no gradient is NaN
_LOG_TINY = math.log(jnp.finfo(jnp.float32).tiny)


class TargetDistribution(NamedTuple):
    """The target's distribution over the draft vocabulary: T(x) = mass * probs(x).

    The two factors stay apart because losses read them apart: a divergence compares q with `probs`, which
    sums to 1 as q does; what is accepted depends on T, whose tokens outside the draft vocabulary q cannot
    propose ("LK losses", arXiv 2602.23881, section 4.4).

    Attributes:
      log_probs: float32 `[..., N]`, log of `probs`; -1e30 stands for log 0.
      probs: float32 `[..., N]`, T given that the token lies in the draft vocabulary; sums to 1. Beside their
        logarithms, so that windows look them up instead of computing them again.
      mass: float32 `[...]`, the probability that the target gives to the draft vocabulary; 1 where T is
        renormalised to it, 0 where a greedy target's token lies outside.
    """

    log_probs: jax.Array
    probs: jax.Array
    mass: jax.Array


def renormalised(target_logits: jax.Array, temperature: float = 1.0) -> TargetDistribution:
    """The target restricted to the draft vocabulary and renormalised, as EAGLE-3 trains.

    Args:
      target_logits: `[..., N]`, the target's logits of the draft vocabulary, of any float dtype.
      temperature: at least 0; 0 gives all probability to the largest logit, the first of equals.

    Raises:
      ValueError: a negative temperature.
    """
    if temperature < 0.0:
        raise ValueError(f"found the temperature {temperature}, expected at least 0")
    target_logits = jax.lax.stop_gradient(target_logits).astype(jnp.float32)
    if temperature == 0.0:
        log_probs = jnp.where(_largest(target_logits), 0.0, _LOG_ZERO)
    else:
        log_probs = log_softmax(target_logits / temperature)
    mass = jnp.ones(target_logits.shape[:-1], jnp.float32)
    return TargetDistribution(log_probs, jnp.exp(log_probs), mass)


def unnormalised(
    target_logits: jax.Array,
    temperature: float = 1.0,
    *,
    log_normaliser: jax.Array | None = None,
    argmax_inside: jax.Array | None = None,
) -> TargetDistribution:
    """The target's true probabilities of the draft vocabulary; the rest of them lies outside.

    Where a greedy target's token lies outside, no loss of the acceptance has a gradient, but divergences
    still draw q to the likeliest token within. SpecForge leaves such positions out: a weight `mass > 0` does.

    Args:
      target_logits: `[..., N]`, the target's logits of the draft vocabulary, of any float dtype.
      temperature: at least 0, as in `renormalised`.
      log_normaliser: float32 `[...]`, logsumexp over all V tokens of the target's logits / temperature. A
        temperature above 0 needs it.
      argmax_inside: bool `[...]`, whether the likeliest of all V tokens is in the draft vocabulary.
        Temperature 0 needs it. The largest of all logits would not do: computed by another matrix product,
        it may differ from the same token's logit here by rounding.

    Raises:
      ValueError: a negative temperature, or the argument that the temperature needs is missing.
    """
    distribution = renormalised(target_logits, temperature)
    if temperature == 0.0:
        if argmax_inside is None:
            raise ValueError("found no argmax_inside, expected it at temperature 0")
        mass = argmax_inside.astype(jnp.float32)
    else:
        if log_normaliser is None:
            raise ValueError("found no log_normaliser, expected it at a temperature above 0")
        inside = logsumexp(target_logits.astype(jnp.float32) / temperature)
        mass = jnp.minimum(jnp.exp(inside - log_normaliser), 1.0)
    mass = jnp.broadcast_to(mass, distribution.mass.shape)
    return distribution._replace(mass=jax.lax.stop_gradient(mass))


def _largest(logits: jax.Array) -> jax.Array:
    """bool `[..., N]`, true at the largest along the last axis, the first of equals."""
    return jnp.arange(logits.shape[-1]) == likeliest(logits)[..., None]


# Divergences: of q from `target.probs`, which sums to 1 whatever the mass.


def cross_entropy(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """-sum_x T(x) log q(x), float32 `[...]`, T renormalised: the loss of EAGLE-3 (arXiv 2503.01840).

    Args:
      target: the target's distribution.
      logits: float32 `[..., N]`, the drafter's; so in every loss below.
    """
    return logsumexp(logits) - inner(target.probs, logits)


def kl(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """KL(T || q) = sum_x T(x) log(T(x) / q(x)), float32 `[...]`, T renormalised.

    Its gradient is that of `cross_entropy`: they differ by the entropy of T.
    """
    return _kl(target.log_probs, target.probs, logits)


@jax.custom_jvp
def _kl(log_probs: jax.Array, probs: jax.Array, logits: jax.Array) -> jax.Array:
    return inner(probs, log_probs - log_softmax(logits))


@_kl.defjvp
def _kl_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Of the logits alone, q - T: the target has no gradient."""
    _, probs, logits = primals
    q = jnp.exp(log_softmax(logits))
    return _kl(*primals), jnp.sum((q - probs) * tangents[2], -1)


def reverse_kl(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """KL(q || T) = sum_x q(x) log(q(x) / T(x)), float32 `[...]`, T renormalised.

    log T(x) counts as at least that of the smallest float32. The floor is ours: the divergence is infinite
    where q has probability and T has none, which at temperature 0 is everywhere.
    """
    log_q = log_softmax(logits)
    return inner(jnp.exp(log_q), log_q - jnp.maximum(target.log_probs, _LOG_TINY))


def jensen_shannon(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """KL(T || m) / 2 + KL(q || m) / 2 with m = (T + q) / 2, float32 `[...]` in 0 .. log 2, T renormalised.

    Lin, "Divergence measures based on the Shannon entropy" (1991), with equal weights.
    """
    p, log_q = target.probs, log_softmax(logits)
    q = jnp.exp(log_q)
    log_m = jnp.log(jnp.maximum((p + q) / 2, jnp.finfo(jnp.float32).tiny))
    return (inner(p, target.log_probs - log_m) + inner(q, log_q - log_m)) / 2


def hard_cross_entropy(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """-log q(y), float32 `[...]`, y the target's likeliest token of the draft vocabulary."""
    of_largest = jnp.sum(jnp.where(_largest(target.log_probs), logits, 0.0), axis=-1)
    return logsumexp(logits) - of_largest


# Losses of the acceptance probability: of q and T = mass * probs.


def acceptance(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """a = sum_x min(T(x), q(x)), float32 `[...]` in 0 .. mass."""
    truth = target.mass[..., None] * target.probs
    return jnp.sum(jnp.minimum(truth, jnp.exp(log_softmax(logits))), axis=-1)


def total_variation(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """1 - a, float32 `[...]` in 0 .. 1; where the mass is 1 that is sum_x |T(x) - q(x)| / 2.

    Where it is not, 1 - a is the total variation over the whole vocabulary, for q is 0 outside the draft
    vocabulary: half the sum of |T(x) - q(x)| within it falls short of that by (1 - mass) / 2. Computed as
    (1 - mass) + sum_x max(T(x) - q(x), 0), which is the same and does not cancel where T and q are close.
    """
    truth = target.mass[..., None] * target.probs
    lacking = jnp.maximum(truth - jnp.exp(log_softmax(logits)), 0.0)
    return (1.0 - target.mass) + jnp.sum(lacking, axis=-1)


def neg_log_acceptance(target: TargetDistribution, logits: jax.Array) -> jax.Array:
    """-log a, float32 `[...]` ("LK losses", arXiv 2602.23881, the likelihood-based loss).

    Its gradient is that of `total_variation` over a, so it does not vanish where a does; for a one-hot T of
    mass 1 it is the cross-entropy. It is summed in log space, so no q is too small for it. The published
    codes sum probabilities and differ in what they do with a near 0: speculators floors a at 1e-5, TorchSpec
    at 1e-8 (no gradient below), SpecForge counts a = 0 as no loss. Positions of mass 0, where nothing can be
    accepted, give 0.
    """
    possible = target.mass > 0.0
    log_mass = jnp.log(jnp.where(possible, target.mass, 1.0))
    log_truth = target.log_probs + log_mass[..., None]
    log_a = jax.nn.logsumexp(jnp.minimum(log_truth, log_softmax(logits)), axis=-1)
    return -jnp.where(possible, log_a, 0.0)


def lk_lambda(mixing_acceptance: jax.Array, scale: float = 1.0, decay: float = 3.0) -> jax.Array:
    """scale * exp(-decay * mixing_acceptance), float32, without gradient: what KL counts in `lk_hybrid`.

    Args:
      mixing_acceptance: float32, the a that lambda follows: a mean of `acceptance` over a whole batch, a
        scalar or one for each step, or the acceptance of each position.
      scale: lambda where nothing is accepted, in 0 .. 1.
      decay: at least 0; the paper's eta.
    """
    return scale * jnp.exp(-decay * jax.lax.stop_gradient(mixing_acceptance))


def lk_hybrid(
    target: TargetDistribution,
    logits: jax.Array,
    mixing_acceptance: jax.Array,
    scale: float = 1.0,
    decay: float = 3.0,
) -> jax.Array:
    """lambda KL(T || q) + (1 - lambda) (1 - a), float32 `[...]`, lambda by `lk_lambda`.

    The hybrid of "LK losses" (arXiv 2602.23881). It begins as KL and turns into 1 - a as more is accepted. KL
    is of the renormalised T, a of the true one (section 4.4). The published codes differ:

    - TorchSpec, after the paper: lambda from the mean acceptance of the batch at each drafting step; scale 1
      and decay 3;
    - SpecForge: the same mean; scale and decay are 1 by default; cross-entropy in place of KL, whose gradient
      is the same;
    - speculators and AngelSpec: lambda from the acceptance of each position; scale 1 and decay 3; T is
      renormalised for a as well.

    A batch that is processed in parts may combine `kl` and `total_variation` itself, once its mean is known.

    Args:
      target, logits: as in `cross_entropy`.
      mixing_acceptance, scale, decay: as in `lk_lambda`; the first broadcasts to `[...]`.
    """
    share = lk_lambda(mixing_acceptance, scale, decay)
    return share * kl(target, logits) + (1.0 - share) * total_variation(target, logits)


# Sums of losses by a config string.

Loss = Callable[[TargetDistribution, jax.Array], jax.Array]
Terms = Sequence[tuple[float, str]]

LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "hard_cross_entropy": hard_cross_entropy,
    "total_variation": total_variation,
    "neg_log_acceptance": neg_log_acceptance,
}
# Those that read `TargetDistribution.probs` alone and not the mass.
OF_RENORMALISED = ("cross_entropy", "kl", "reverse_kl", "jensen_shannon", "hard_cross_entropy")
HYBRIDS = ("lk_batch", "lk_position")  # `lk_hybrid` by the acceptance of the batch, or of each position


def loss_function(name: str, found: str = "") -> Loss:
    """A loss by its name in `LOSSES`, or from `module:function` of one's own.

    Args:
      name: of the loss.
      found: what was found where, for the message; empty: the name.

    Raises:
      ConfigError: there is none.
    """
    if name in LOSSES:
        return LOSSES[name]
    known = ", ".join((*LOSSES, *HYBRIDS))
    complaint = f"{found or f'found the loss {name!r}'}, expected one of {known}, or module:function"
    loss = keys.imported(name, complaint)
    if not callable(loss):
        raise ConfigError(f"{complaint} ({loss!r} is none)")
    return loss


def parse_losses(text: str, key: str) -> tuple[tuple[float, str], ...]:
    """The terms of a sum of losses: "kl+0.5*total_variation" gives ((1.0, "kl"), (0.5, "total_variation")).

    Args:
      text: names of `LOSSES` and `HYBRIDS`, or `module:function`, joined by +, each with an optional positive
        weight and * before.
      key: the config's key that holds the text; the message begins with it.

    Raises:
      ConfigError: an unknown name, or a weight that is no positive number.
    """
    terms = []
    for part in re.split(r"(?<!\d[eE])\+", text):  # the + of 1e+2 ends no term
        before, star, after = part.partition("*")
        weight, name = (before.strip(), after.strip()) if star else ("1", before.strip())
        if name not in HYBRIDS:
            loss_function(name, f"{key}: found the loss {name!r} in {text!r}")
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not 0.0 < number < math.inf:
            raise ConfigError(f"{key}: found the weight {weight!r} in {text!r}, expected a positive number")
        terms.append((number, name))
    return tuple(terms)


def needs_batch_acceptance(terms: Terms) -> bool:
    """Whether one of these terms needs the mean acceptance of the batch."""
    return any(name == "lk_batch" for _, name in terms)


def weighted_sum(
    terms: Terms,
    target: TargetDistribution,
    logits: jax.Array,
    lk_scale: float = 1.0,
    lk_decay: float = 3.0,
) -> jax.Array:
    """The sum of weight * loss over the terms, float32 `[...]`.

    Args:
      terms: as `parse_losses` gives them.
      target, logits: as in `cross_entropy`.
      lk_scale, lk_decay: scale and decay of `lk_lambda`.

    Raises:
      ValueError: no terms, or `lk_batch`, which needs the whole batch.
    """
    if not terms:
        raise ValueError("found no terms, expected at least one")
    if needs_batch_acceptance(terms):
        raise ValueError("found lk_batch, expected losses of each position by itself")

    def loss(name: str) -> jax.Array:
        if name == "lk_position":
            return lk_hybrid(target, logits, acceptance(target, logits), lk_scale, lk_decay)
        return loss_function(name)(target, logits)

    first, *rest = [weight * loss(name) for weight, name in terms]
    return sum(rest, start=first)


# Means, and the surrogate of reinforcement.


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `values` where `mask`, a scalar; 0 if it is nowhere true.

    Args:
      values: float32 `[...]`.
      mask: bool, broadcasts to `[...]`.
    """
    mask = jnp.broadcast_to(mask, values.shape).astype(values.dtype)
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def clipped_policy_loss(
    log_prob: jax.Array, behaviour: jax.Array, advantage: jax.Array, clip: float
) -> jax.Array:
    """-min(r A, clip(r, 1 - c, 1 + c) A) per token, r = exp(log_prob - behaviour), float32 `[...]`.

    The clipped surrogate of PPO (Schulman et al. 2017, eq. 7), negated.

    Args:
      log_prob: float32 `[...]`, nats, of each token under the parameters that learn.
      behaviour: float32 `[...]`, nats, of each token under the parameters that sampled it.
      advantage: float32, broadcasts to `[...]`.
      clip: c, above 0.
    """
    ratio = jnp.exp(log_prob - behaviour)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return -jnp.minimum(ratio * advantage, clipped * advantage)


def clip_fraction(log_prob: jax.Array, behaviour: jax.Array, advantage: jax.Array, clip: float) -> jax.Array:
    """1.0 where the clip of `clipped_policy_loss` stops the gradient, else 0.0; arguments as there."""
    ratio = jnp.exp(log_prob - behaviour)
    stopped = ((ratio > 1.0 + clip) & (advantage > 0)) | ((ratio < 1.0 - clip) & (advantage < 0))
    return stopped.astype(jnp.float32)
