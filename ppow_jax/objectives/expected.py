"""`expected`: the expected reward of windows in closed form, which `ppow` estimates from samples.

At temperature 0 a window drafted along a greedy text is accepted as far as it repeats it, so that with q the
drafter's probabilities of the text's own tokens x and R the reward of an accepted length,

    E[R] = R(0) + sum over k = 1 .. K of (R(k) - R(k - 1)) q(x_1) q(x_2 | x_1) ... q(x_k | x_1 .. x_(k-1)).

It has a gradient without sampling, groups or variance. Above temperature 0 the chance a = sum over tokens of
min(P, q) that a sampled token is accepted stands in the place of q, along texts that the target sampled:
exact for the first token, and for those after it but for their contexts, which are the target's samples and
not the accepted drafts. Exact in the mean over texts would be min(1, q(x) / P(x)) for the tokens before the
last (`decode.simulate`); with it a drafter learns the training texts by heart and drafts no better for it
(docs/log.md).

A greedy decoder goes by ranks and not by probabilities: a chain keeps the text's token if it is the
likeliest, a tree if it is among the first few of its level. With `rank` r, and z the drafter's logits, the
chance of x is sigmoid((z(x) - z(r-th likeliest token besides x)) / softness): near 1 where x is well among
the r likeliest, 1/2 at the border.

Shape letters: B texts, T positions, A anchors, K window, N draft vocabulary, D width; L some of the anchors.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax.errors import ConfigError
from ppow_jax.keys import key, section
from ppow_jax.models.layers import at_ids, draft_ids, likeliest
from ppow_jax.models.target_outputs import TargetOutputs, log_normaliser
from ppow_jax.objectives import losses, rewards
from ppow_jax.objectives import weights as window_weights
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
    at,
    per_step,
    prob_of,
    written,
)
from ppow_jax.objectives.distributions import along_windows, where_read
from ppow_jax.objectives.ppow import check_gamma


@dataclasses.dataclass(frozen=True)
class Expected(Objective):
    """The expected reward, and a KL to the target."""

    anchors: int = key(48, "windows' beginnings a text", at_least=1)
    window: int = key(6, "K", at_least=1)
    temperature: float = key(0.0, "of verification")
    gamma: str = key(
        "0.12", "Cost of a drafter step over a target step: a number (the paper's: 0.12), or measured."
    )
    reward: str = key("speedup", "speedup, k / (k gamma + 1); length, k; or module:function of one's own")
    reward_weight: float = key(1.0, "of that reward")
    smoothing: float = key(
        0.0,
        "s: chances count as (1 - s) chance + s, so that a token that is refused does not silence those "
        "after it.",
        at_most=1.0,
    )
    rank: int = key(
        0,
        "At temperature 0 a token is accepted 0: with the drafter's probability of it; r: as far as it is "
        "among the drafter's r likeliest, 1 for chains, more for trees.",
    )
    softness: float = key(1.0, "of that border, in logits", above=0)
    kl_weight: float = key(0.3, "of the KL to the target")
    kl_positions: str = key(
        "all",
        "Where it is taken: all, the sum over the steps of their means, each times kl_decay ** step; or "
        "reached, the mean over tokens, each by the chance that its context is accepted, as in ppow.",
        choices=("all", "reached"),
    )
    kl_decay: float = key(0.8, "of kl_positions all", at_most=1.0)
    renormalise: bool = key(
        True,
        "Above temperature 0: restrict the target to the draft vocabulary, as in supervised; if not, chances "
        "are exact, for a product with the target's whole head.",
    )
    anchor_rule: AnchorRule = section(AnchorRule)

    def __post_init__(self) -> None:
        check_gamma(self.gamma)
        rewards.reward_function(self.reward)
        if self.rank and self.temperature:
            raise ConfigError(
                f"rank: found {self.rank}, expected 0 above temperature 0, where drafts are sampled"
            )

    def check(self, draft_vocabulary: int) -> None:
        """The drafter has tokens besides the text's."""
        if self.rank >= draft_vocabulary:
            raise ConfigError(
                f"rank: found {self.rank}, expected less than the draft vocabulary of {draft_vocabulary}"
            )

    def init(self, sizes: Sizes, params: dict) -> Memory:
        """Of the rule for anchors."""
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
        """Anchors, the text along their windows, and what each accepted token adds to the reward."""
        about = (self.anchor_rule, models, batch, outputs, memory, step, key)
        picked, memory = pick_anchors(*about, self.anchors, self.window)
        tokens = along_text(batch["tokens"], picked.anchors, 2, self.window)[:, :, None]
        wrote = written(batch, picked.anchors, picked.real, self.window)
        inside = jnp.cumprod(wrote, -1)
        importance = picked.importance[..., None, None]
        context = rewards.RewardContext(models.gamma, self.window)
        reward_K = rewards.reward_function(self.reward)(jnp.arange(self.window + 1), context)
        counted = inside * importance
        windows = jnp.sum(counted[..., :1])
        mean = counted / jnp.where(windows > 0, windows, 1.0)
        weights = {
            "inside": mean,
            "gain": mean * jnp.diff(reward_K),
            "least": mean[..., :1] * reward_K[0],
            "kl": per_step(wrote * importance),
        }
        extra = {}
        if self.temperature > 0 and not self.renormalise:
            target = (models.target, models.target_params)
            of = functools.partial(log_normaliser, *target, temperature=self.temperature)
            extra = {"log_normaliser": where_read(outputs, picked.anchors, self.window, of)}
        return Signal(picked.anchors, tokens, weights, extra), memory, {}

    def prepare(self, models: Models, signal: Signal, batch: Batch, outputs: TargetOutputs) -> Any:
        """The target's distributions along the texts: the renormalised one and, above temperature 0, that of
        verification."""
        about = (models, outputs, signal.anchors, self.window)
        renormalised = along_windows(*about, lambda target_logits, _: losses.renormalised(target_logits))
        if self.temperature == 0 or (self.renormalise and self.temperature == 1):
            return renormalised, renormalised

        def verifying(target_logits: jax.Array, positions: jax.Array) -> losses.TargetDistribution:
            if self.renormalise:
                return losses.renormalised(target_logits, self.temperature)
            normaliser = at(signal.extra["log_normaliser"], positions)
            return losses.unnormalised(target_logits, self.temperature, log_normaliser=normaliser)

        return renormalised, along_windows(*about, verifying)

    def inputs(self, step: int, signal: Signal, prepared: Any) -> Any:
        """The text's tokens, and where the target's distributions are."""
        return signal.tokens[:, :, 0, step], prepared[0].where[..., step]

    def observe(
        self, models: Models, step: int, hidden: jax.Array, logits: jax.Array, inputs: Any, prepared: Any
    ) -> Stats:
        """The chance that a drafted token is accepted, and KL to the target."""
        (token_BxL, where_BxL), (renormalised, verifying) = inputs, prepared
        divergence = losses.kl(renormalised.look_up(where_BxL), logits)
        tokens, vocab = token_BxL[..., None], models.weights.vocab
        if self.temperature > 0:
            chance = losses.acceptance(verifying.look_up(where_BxL), logits / self.temperature)
        elif self.rank:
            chance = chance_by_rank(logits, vocab, tokens, self.rank, self.softness)
        else:
            chance = prob_of(logits, vocab, tokens)
        return {"chance": chance, "kl": divergence}

    def summarise(self, stats: Stats, signal: Signal) -> dict[str, jax.Array]:
        """The sum of the chances that contexts are accepted, where the KL goes by them."""
        if self.kl_positions == "all":
            return {}
        return {"reached": jnp.sum(self._reached(stats) * signal.weights["inside"])}

    def _reached(self, stats: Stats) -> jax.Array:
        """`[B, A, 1, K]`: the chance that all tokens before a step are accepted."""
        before = jnp.concatenate([jnp.ones_like(stats["chance"][..., :1]), stats["chance"][..., :-1]], -1)
        return jax.lax.stop_gradient(jnp.cumprod(before, -1))

    def loss(self, stats: Stats, signal: Signal, summary: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """-E[R] of the mean window, plus the weighted KL."""
        weights = signal.weights
        smooth = (1 - self.smoothing) * stats["chance"] + self.smoothing
        reward = jnp.sum(weights["gain"] * jnp.cumprod(smooth, -1)) + jnp.sum(weights["least"])
        if self.kl_positions == "all":
            decay_K = window_weights.decay(self.window, self.kl_decay)
            kl = jnp.sum(stats["kl"] * weights["kl"] * decay_K)
        else:
            reached = self._reached(stats) * weights["inside"]
            kl = jnp.sum(stats["kl"] * reached) / jnp.maximum(summary["reached"], 1e-6)
        chances = jnp.cumprod(jax.lax.stop_gradient(stats["chance"]), -1)
        return self.kl_weight * kl - self.reward_weight * reward, {
            "reward": reward,
            "kl": kl,
            "accepted": jnp.sum(chances * weights["inside"]),
        }


def chance_by_rank(
    logits_BxLxGxN: jax.Array, vocab_N: jax.Array, tokens_BxLxG: jax.Array, rank: int, softness: float
) -> jax.Array:
    """float32 `[B, L, G]`: how well target ids are among the `rank` likeliest tokens, see the module; 0
    outside the draft vocabulary."""
    ids, inside = draft_ids(vocab_N, tokens_BxLxG)
    own = jnp.arange(logits_BxLxGxN.shape[-1]) == ids[..., None]
    others = jnp.where(own, -jnp.inf, jax.lax.stop_gradient(logits_BxLxGxN))
    border = likeliest(others) if rank == 1 else jax.lax.top_k(others, rank)[1][..., -1]
    gap = at_ids(logits_BxLxGxN, ids) - at_ids(logits_BxLxGxN, border)
    return jax.nn.sigmoid(gap / softness) * inside
