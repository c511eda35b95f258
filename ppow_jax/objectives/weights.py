"""Weights of the steps of windows, as pure functions of arrays; none carries a gradient.

The weights multiply losses per position. None of them is normalised: by what a weighted sum is divided
(positions, anchors, the sum of the weights) is its caller's choice.

Shape letters: B texts, A anchors, G windows a group, K steps of a window; `...` stands for any leading axes,
such as `[B, A, G]`. The last axis is always K.
"""

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.errors import ConfigError


def decay(window: int, rate: float) -> jax.Array:
    """rate ** j at step j = 0 .. K - 1, float32 `[K]`: EAGLE-3's weights, with rate 0.8.

    DFlash (arXiv 2602.06036) writes them exp(-j / gamma), which is rate = exp(-1 / gamma).

    Args:
      window: K.
      rate: in 0 .. 1.
    """
    return rate ** jnp.arange(window)


def reach(hits: jax.Array) -> jax.Array:
    """1.0 while every earlier step of the window was a hit, else 0.0; float32 `[..., K]`.

    The weight of step j is the product of hits[i] over i < j, so the first miss still counts and what
    follows it does not. With the drafter's argmax as what hits, this is the support of Spec-AUF, "accept
    until fail" (arXiv 2607.01893).

    Args:
      hits: bool `[..., K]`, whether the drafter was right at each step: its argmax, or a token sampled from
        it (this variant is ours).
    """
    before = jnp.concatenate([jnp.ones_like(hits[..., :1]), hits[..., :-1]], axis=-1)
    return jax.lax.stop_gradient(jnp.cumprod(before.astype(jnp.float32), axis=-1))


def dpace(confidence: jax.Array, alpha: float = 0.5, valid: jax.Array | None = None) -> jax.Array:
    """D-PACE's weights (arXiv 2605.18810, eq. 7 and 8), float32 `[..., K]`.

    With c'_i = (1 - alpha) c_i + alpha, the weight of step j is

        w_j = sum over m >= j of c'_0 c'_1 .. c'_m,

    the derivative with respect to log c'_j of sum_m c'_0 .. c'_m, the expected accepted length if step i is
    accepted with probability c'_i. It multiplies -log c_j (eq. 9). The size of the weights tells how much
    length a window can win, so the authors do not divide by their sum: their code divides by the number of
    texts, SpecForge by that of anchors, speculators by that of valid positions.

    Args:
      confidence: float32 `[..., K]` in 0 .. 1, c, the drafter's probability of the token of the text.
      alpha: in 0 .. 1; with 0 a step of no confidence takes all weight from itself and those after it, with 1
        the weights are K - j. The paper's is 0.5.
      valid: bool `[..., K]`, the steps that have a token; the others count as if certain, and add nothing to
        any sum. None: all of them.

    Returns:
      The weights; 0 at steps that are not valid.

    Raises:
      ValueError: an alpha out of range.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"found the alpha {alpha}, expected a number in 0 .. 1")
    valid = jnp.ones(confidence.shape, bool) if valid is None else jnp.broadcast_to(valid, confidence.shape)
    smooth = jnp.where(valid, (1.0 - alpha) * confidence + alpha, 1.0)
    prefix = jnp.cumprod(smooth, axis=-1)
    weights = jax.lax.cumsum(jnp.where(valid, prefix, 0.0), axis=prefix.ndim - 1, reverse=True)
    return jax.lax.stop_gradient(jnp.where(valid, weights, 0.0))


class Outcomes(NamedTuple):
    """What came of windows, as far as the weights need it.

    Attributes:
      greedy_hits: bool `[..., K]`, whether the drafter's argmax was right; for "reach".
      sampled_hits: bool `[..., K]`, whether a token sampled from the drafter was right; for "reach_sampled".
      confidence: float32 `[..., K]`, the drafter's probability of the token of the text; for "dpace".
      valid: bool `[..., K]`, the steps that have a token; None: all of them.
    """

    greedy_hits: jax.Array | None = None
    sampled_hits: jax.Array | None = None
    confidence: jax.Array | None = None
    valid: jax.Array | None = None


# The name of each weight, and the outcome that it is made from, if any.
WEIGHTS = {
    "uniform": "",
    "decay": "",
    "reach": "greedy_hits",
    "reach_sampled": "sampled_hits",
    "dpace": "confidence",
}


def parse_weights(text: str, key: str) -> tuple[str, ...]:
    """The factors of a product of weights: "decay*reach" gives ("decay", "reach").

    Args:
      text: names of `WEIGHTS` joined by *.
      key: the config's key that holds the text; the message begins with it.

    Raises:
      ConfigError: an unknown name.
    """
    names = tuple(name.strip() for name in text.split("*"))
    for name in names:
        if name not in WEIGHTS:
            known = ", ".join(WEIGHTS)
            raise ConfigError(f"{key}: found the weight {name!r} in {text!r}, expected one of {known}")
    return names


def needed_outcomes(names: Sequence[str]) -> frozenset[str]:
    """The fields of `Outcomes` that `product` of these names needs; `valid` is never among them."""
    return frozenset(WEIGHTS[name] for name in names) - {""}


def product(
    names: Sequence[str],
    window: int,
    outcomes: Outcomes | None = None,
    rate: float = 0.8,
    alpha: float = 0.5,
) -> jax.Array:
    """The product of the named weights, float32 `[..., K]`, or `[K]` where none depends on outcomes.

    Args:
      names: as `parse_weights` gives them.
      window: K.
      outcomes: those that the names need; None: none of them.
      rate: that of `decay`.
      alpha: that of `dpace`.

    Raises:
      ValueError: no names, or an outcome that is needed is missing.
    """
    if not names:
        raise ValueError("found no names, expected at least one")
    outcomes = Outcomes() if outcomes is None else outcomes
    missing = sorted(field for field in needed_outcomes(names) if getattr(outcomes, field) is None)
    if missing:
        raise ValueError(f"found no {', '.join(missing)}, expected it for {'*'.join(names)}")

    def weight(name: str) -> jax.Array:
        if name == "uniform":
            return jnp.ones(window, jnp.float32)
        if name == "decay":
            return decay(window, rate)
        outcome = getattr(outcomes, WEIGHTS[name])
        return dpace(outcome, alpha, outcomes.valid) if name == "dpace" else reach(outcome)

    return functools.reduce(operator.mul, map(weight, names))
