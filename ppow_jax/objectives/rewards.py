"""What windows earn, as pure functions of arrays, and the seam for rewards of one's own.

A reward is `reward(accepted, context)`: what a window of accepted length k earns, for any array of them.
Objectives in closed form ask for every k from 0 to K.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import keys
from ppow_jax.errors import ConfigError


class RewardContext(NamedTuple):
    """What a reward may depend on besides k.

    Attributes:
      gamma: cost of a drafter step over that of a target step.
      window: K.
    """

    gamma: float
    window: int


Reward = Callable[[jax.Array, RewardContext], jax.Array]


def speedup(accepted: jax.Array, context: RewardContext) -> jax.Array:
    """Cost-aware speedup k / (k gamma + 1) (PPOW, section 3)."""
    k = accepted.astype(jnp.float32)
    return k / (k * context.gamma + 1.0)


def length(accepted: jax.Array, context: RewardContext) -> jax.Array:
    """The accepted length itself."""
    return accepted.astype(jnp.float32)


REWARDS: dict[str, Reward] = {"speedup": speedup, "length": length}


def reward_function(name: str) -> Reward:
    """A reward by its name, or from `module:function`.

    Raises:
      ConfigError: there is none.
    """
    if name in REWARDS:
        return REWARDS[name]
    complaint = f"reward: found {name!r}, expected {', '.join(REWARDS)}, or module:function"
    reward = keys.imported(name, complaint)
    if not callable(reward):
        raise ConfigError(f"{complaint} ({reward!r} is none)")
    return reward


def accepted_greedy(drafted_xK: jax.Array, preferred_xK: jax.Array, valid_xK: jax.Array) -> jax.Array:
    """Accepted length at temperature 0: the longest prefix equal to the target's continuation.

    Args:
      drafted_xK: drafted ids.
      preferred_xK: the target's own argmax continuation.
      valid_xK: bool, False beyond the end of the text, where nothing can be accepted.

    Returns:
      int32, in 0..K.
    """
    return _leading(valid_xK & (drafted_xK == preferred_xK))


def accepted_sampled(
    target_log_prob_xK: jax.Array,
    draft_log_prob_xK: jax.Array,
    uniform_xK: jax.Array,
    valid_xK: jax.Array,
) -> jax.Array:
    """Accepted length above temperature 0: token j is kept with probability min(1, P / Q).

    Speculative sampling (Leviathan et al. 2023): the first refusal stops.

    Args:
      target_log_prob_xK: log P of the drafted tokens at the verification temperature.
      draft_log_prob_xK: log Q of the drafted tokens, as they were sampled.
      uniform_xK: uniform numbers in [0, 1).
      valid_xK: bool, False beyond the end of the text.
    """
    keep = jnp.log(uniform_xK) < target_log_prob_xK - draft_log_prob_xK
    return _leading(valid_xK & keep)


def _leading(keep_xK: jax.Array) -> jax.Array:
    return jnp.cumprod(keep_xK.astype(jnp.int32), axis=-1).sum(-1)


def proximity(
    accepted: jax.Array,
    preferred_log_prob: jax.Array,
    drafted_log_prob: jax.Array,
    epsilon: float,
) -> jax.Array:
    """1 for wholly refused windows that the target finds nearly as likely as its own, else 0 (PPOW, section
    3).

    Args:
      accepted: k; only windows with k = 0 can score.
      preferred_log_prob: log P of the window that the target wrote, summed over the window.
      drafted_log_prob: log P of the drafted window, likewise.
      epsilon: nats; the gap must be smaller.
    """
    near = preferred_log_prob - drafted_log_prob < epsilon
    return ((accepted == 0) & near).astype(jnp.float32)
