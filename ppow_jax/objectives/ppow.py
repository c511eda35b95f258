"""`ppow`: reinforcement of whole windows (PPOW, arXiv 2605.14978).

Anchors are chosen (ADAW), G windows rolled out from each, verified by the target, and rewarded; rewards
become group-relative advantages, and the update is a clipped policy gradient with a KL to the target.

Shape letters: B texts, A anchors, G windows a group, K window, N draft vocabulary, D width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.errors import ConfigError
from ppow_jax.keys import key
from ppow_jax.models.layers import product, softmax_entropy
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import losses, rewards
from ppow_jax.objectives.advantages import ADVANTAGES, without_spread
from ppow_jax.objectives.anchors import AnchorRule, blank_table, pick_anchors
from ppow_jax.objectives.base import (
    Batch,
    Memory,
    Metrics,
    Models,
    Objective,
    Signal,
    Sizes,
    Stats,
    along_text,
    per_token,
)
from ppow_jax.objectives.distributions import along_windows
from ppow_jax.objectives.rollout import Rollout, log_prob_of, roll
from ppow_jax.objectives.verification import Verified, verify, windows_at_once


class Extra(NamedTuple):
    """What the update asks for besides windows and weights.

    Attributes:
      ids: int32 `[B, A, G, K]`, draft ids of the sampled tokens.
      behaviour: float32 `[B, A, G, K]`, their log-probabilities when they were sampled.
      advantage: float32 `[B, A, G]`.
      valid: bool `[B, A, G, K]`, tokens that count.
      context: `[B, A, G, K, D]`, the target's hidden states that predict them; None at temperature 0, where
        they are the text's.
    """

    ids: jax.Array
    behaviour: jax.Array
    advantage: jax.Array
    valid: jax.Array
    context: jax.Array | None


@dataclasses.dataclass(frozen=True)
class PPOW(Objective):
    """Grouped rollouts, verified and rewarded, and a clipped policy gradient.

    eta, epsilon, beta, the clip range and the learning rate are not published. beta and the learning rate
    come from the sweep in docs/log.md; at that rate a clip of 0.2 stops nothing. eta and epsilon have
    not been swept.
    """

    anchors: int = key(16, "windows' beginnings a text", at_least=1)
    group: int = key(8, "G, windows an anchor; the paper's", at_least=2)
    window: int = key(10, "K; the paper's", at_least=1)
    temperature: float = key(0.0, "of verification: 0 or 1 in the paper")
    rollout_temperature: float = key(1.0, "of the drafter's sampling", above=0)
    gamma: str = key(
        "0.12", "Cost of a drafter step over a target step: a number (the paper's: 0.12), or measured."
    )
    reward: str = key("speedup", "speedup, k / (k gamma + 1); length, k; or module:function of one's own")
    speedup_weight: float = key(1.0, "of that reward")
    proximity_weight: float = key(
        0.1,
        "eta, of the proximity reward. With 0, which switches it off, and temperature 0 a group costs the "
        "drafter no more than one window.",
    )
    proximity_epsilon: float = key(20.0, "nats over the whole window")
    kl_weight: float = key(5.0, "beta of the KL to the target")
    clip: float = key(0.2, "of the ratio of probabilities")
    advantage: str = key("standardised", "of a group's rewards", choices=tuple(ADVANTAGES))
    credit: str = key(
        "accepted",
        "Which tokens of a window its advantage credits: accepted, those that could change the reward (the "
        "accepted ones and the first refused), or window, all.",
        choices=("accepted", "window"),
    )
    updates: int = key(2, "optimiser steps on each rollout", at_least=1)
    anchor_rule: AnchorRule = dataclasses.field(default_factory=lambda: AnchorRule(rule="adaw"))

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        rewards.reward_function(self.reward)

    @property
    def along_text(self) -> bool:
        """Whether all windows of a group read on the text, so that one pass over it serves them all.

        At temperature 0 a window is accepted as far as it repeats the text: up to its first refusal, that one
        included, its tokens are drawn from the distributions along the text, and nothing behind it matters
        unless proximity or the credit looks there. The distribution of k and of all that is learnt from is
        the same; the drafter's work is that of one window instead of G.
        """
        return self.temperature == 0 and self.proximity_weight == 0 and self.credit == "accepted"

    @property
    def scores_windows(self) -> bool:
        """Whether the target is asked how likely windows are."""
        return self.proximity_weight > 0

    def rounds(self, texts: int) -> int:
        """How often the loop that scores the windows of so many texts runs at most."""
        if not self.scores_windows and self.temperature == 0:
            return 1
        return self.anchors * self.group // windows_at_once(texts, self.anchors, self.group, self.window)

    def init(self, sizes: Sizes, params: dict) -> Memory:
        """ADAW's table."""
        return blank_table(self.anchor_rule, sizes)

    def signal(
        self,
        models: Models,
        batch: Batch,
        outputs: TargetOutputs,
        memory: Memory,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[Signal, Memory, Metrics]:
        """Anchors, rollout, verification, rewards, advantages."""
        keys = jax.random.split(key, 3)
        about = (models, batch, outputs)
        picked, memory = pick_anchors(
            self.anchor_rule, *about, memory, step, keys[0], self.anchors, self.window
        )
        shape = (self.group, self.window, self.rollout_temperature)
        rollout = roll(*about, picked.anchors, picked.real, keys[1], *shape, self.along_text)
        verified = verify(*about, rollout, keys[2], self.temperature, self.scores_windows)
        signal, metrics = self.judge(models.gamma, batch, picked.importance, rollout, verified)
        return signal, memory, metrics

    def judge(
        self,
        gamma: float,
        batch: Batch,
        importance_BxA: jax.Array,
        rollout: Rollout,
        verified: Verified,
    ) -> tuple[Signal, Metrics]:
        """What a verified rollout earns and teaches."""
        context = rewards.RewardContext(gamma, self.window)
        speedup = self.speedup_weight * rewards.reward_function(self.reward)(verified.accepted, context)
        proximity = jnp.zeros_like(speedup)
        if self.scores_windows:
            likelihoods = (verified.preferred, verified.drafted)
            near = rewards.proximity(verified.accepted, *likelihoods, self.proximity_epsilon)
            proximity = self.proximity_weight * near * rollout.real[..., None]
        advantage = ADVANTAGES[self.advantage](speedup + proximity)
        credited, reached = self.credits(verified, proximity)
        importance = importance_BxA[..., None, None]
        tokens = rollout.tokens
        if self.along_text:
            tokens = along_text(batch["tokens"], rollout.anchors, 2, self.window)[:, :, None]
        weights = {"policy": per_token(credited * importance), "kl": per_token(reached * importance)}
        predicts = verified.context if self.temperature > 0 else None
        extra = Extra(rollout.ids, rollout.log_prob, advantage, verified.valid, predicts)
        signal = Signal(rollout.anchors, tokens, weights, extra)
        return signal, reward_metrics(rollout, verified, speedup, proximity)

    def credits(self, verified: Verified, proximity: jax.Array) -> tuple[jax.Array, jax.Array]:
        """bool `[B, A, G, K]`: tokens that the advantage credits, and those whose context was accepted."""
        reached = jnp.arange(self.window) <= verified.accepted[..., None]
        credited = verified.valid
        if self.credit == "accepted":
            # Beyond the first refusal a token matters through proximity alone, and only where that tells the
            # windows of a group apart; elsewhere it would be blamed or praised for nothing.
            near = (proximity > 0).any(-1, keepdims=True)
            judged = (verified.accepted == 0) & near
            credited &= reached | judged[..., None]
        return credited, verified.valid & reached

    def prepare(self, models: Models, signal: Signal, batch: Batch, outputs: TargetOutputs) -> Any:
        """At temperature 0 the target's distribution along the texts."""
        if self.temperature > 0:
            return None
        about = (models, outputs, signal.anchors, self.window)
        return along_windows(*about, lambda target_logits, _: losses.renormalised(target_logits))

    def inputs(self, step: int, signal: Signal, prepared: Any) -> Any:
        """Draft ids of the sampled tokens; and where the target's distribution is, or the hidden states that
        predict them."""
        extra = signal.extra
        predicts = prepared.where[..., step] if prepared else extra.context[..., step, :]
        return extra.ids[..., step], predicts

    def observe(
        self, models: Models, step: int, hidden: jax.Array, logits: jax.Array, inputs: Any, prepared: Any
    ) -> Stats:
        """Log-probability of each sampled token, entropy (no gradient), and KL to the target."""
        ids, predicts = inputs
        if prepared:
            target = prepared.look_up(predicts)
        else:
            target = losses.renormalised(product(predicts, models.head_NxD))
        divergence = losses.kl(target, logits)
        logits /= self.rollout_temperature
        stats = {"log_prob": log_prob_of(logits, ids), "entropy": softmax_entropy(logits), "kl": divergence}
        return {name: jnp.broadcast_to(x, ids.shape) for name, x in stats.items()}

    def loss(self, stats: Stats, signal: Signal, summary: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """Clipped surrogate over the credited tokens plus beta KL(P || Q).

        The KL runs over the tokens whose context the target accepted (j <= k): where the text is greedy that
        is where P is known, and it is the only place that decoding ever visits.
        """
        extra, weights = signal.extra, signal.weights
        about = (stats["log_prob"], extra.behaviour, extra.advantage[..., None], self.clip)
        policy = jnp.sum(losses.clipped_policy_loss(*about) * weights["policy"])
        kl = jnp.sum(stats["kl"] * weights["kl"])
        gap = jnp.max(jnp.where(extra.valid, jnp.abs(stats["log_prob"] - extra.behaviour), 0.0))
        return policy + self.kl_weight * kl, {
            "policy_loss": policy,
            "kl": kl,
            "clip_fraction": jnp.sum(losses.clip_fraction(*about) * weights["policy"]),
            "entropy": jnp.sum(stats["entropy"] * weights["kl"]),
            "log_prob_gap": gap,
        }


def check_gamma(gamma: str) -> None:
    """Holds a key to 'measured' or a number.

    Raises:
      ConfigError: it is neither.
    """
    try:
        good = gamma == "measured" or 0 <= float(gamma) < float("inf")
    except ValueError:
        good = False
    if not good:
        raise ConfigError(f"gamma: found {gamma!r}, expected 'measured' or a number >= 0")


def reward_metrics(rollout: Rollout, verified: Verified, speedup: jax.Array, proximity: jax.Array) -> Metrics:
    """What the rollout earned."""
    K = rollout.ids.shape[-1]
    real = jnp.broadcast_to(rollout.real[..., None], verified.accepted.shape)
    share = [losses.masked_mean((verified.accepted == k).astype(jnp.float32), real) for k in range(K + 1)]
    reward = speedup + proximity
    return {
        "reward": losses.masked_mean(reward, real),
        "reward_speedup": losses.masked_mean(speedup, real),
        "reward_proximity": losses.masked_mean(proximity, real),
        "accepted": losses.masked_mean(verified.accepted.astype(jnp.float32), real),
        "accepted_shares": jnp.stack(share),
        "share_refused": share[0],
        "share_without_spread": losses.masked_mean(without_spread(reward).astype(jnp.float32), rollout.real),
    }
