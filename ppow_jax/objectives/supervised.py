"""`supervised`: EAGLE-3's training-time test (arXiv 2503.01840, section 3.2), with a choice of losses and
weights.

Every sampled anchor is stepped through a window of the text itself, feeding on its own hidden states; the
loss of a step compares the drafter's distribution with the target's.

Shape letters: B texts, T positions, A anchors, K window, N draft vocabulary, D width; L some of the anchors.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.errors import ConfigError
from ppow_jax.keys import key, section
from ppow_jax.models import target_outputs
from ppow_jax.models.layers import draft_ids, likeliest
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import losses
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
from ppow_jax.objectives.losses import TargetDistribution

_BY_BATCH = "lk_batch"


class Extra(NamedTuple):
    """What the update asks for besides windows and weights.

    Attributes:
      uniform: float32 `[B, A, 1, K]` in [0, 1), for what depends on a sample of the drafter.
      outside: of each position, what the target says of all V tokens: `log_normaliser` float32 `[B, T]`, or
        at temperature 0 `likeliest` int32 `[B, T]`; empty where T is renormalised.
    """

    uniform: jax.Array
    outside: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Supervised(Objective):
    """Losses against the target's distribution along windows of the text."""

    anchors: int = key(48, "sampled positions a text", at_least=1)
    window: int = key(5, "steps of training-time test", at_least=1)
    losses: str = key(
        "cross_entropy",
        f"A sum of {', '.join((*losses.LOSSES, *losses.HYBRIDS))}, each with an optional weight: "
        "kl+0.5*total_variation.",
    )
    step_weights: str = key(
        "decay", f"What a step of the window counts, a product of {', '.join(window_weights.WEIGHTS)}."
    )
    decay: float = key(0.8, "step j counts decay ** j", at_most=1.0)
    dpace_alpha: float = key(0.5, "smoothing of dpace", at_most=1.0)
    target_temperature: float = key(
        1.0, "of the target's distribution: that at which it will verify; 0: its likeliest token alone"
    )
    renormalise: bool = key(
        True,
        "Restrict the target to the draft vocabulary; if not, acceptance counts what lies outside as "
        "refused.",
    )
    lk_scale: float = key(1.0, "lambda of lk_batch and lk_position where nothing is accepted", at_most=1.0)
    lk_decay: float = key(3.0, "how fast that falls with acceptance")
    anchor_rule: AnchorRule = section(AnchorRule)

    def __post_init__(self) -> None:
        names = [name for _, name in losses.parse_losses(self.losses, "losses")]
        if not self.renormalise and all(name in losses.OF_RENORMALISED for name in names):
            raise ConfigError(
                f"renormalise: found False, expected True for losses {self.losses}, which compare with the "
                "renormalised distribution alone"
            )
        window_weights.parse_weights(self.step_weights, "step_weights")

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
        """Anchors, and the text along their windows."""
        about = (self.anchor_rule, models, batch, outputs, memory, step, key)
        picked, memory = pick_anchors(*about, self.anchors, self.window)
        tokens = along_text(batch["tokens"], picked.anchors, 2, self.window)[:, :, None]
        valid = written(batch, picked.anchors, picked.real, self.window)
        weights = {"valid": per_step(valid * picked.importance[..., None, None])}
        uniform = jax.random.uniform(jax.random.fold_in(key, 1), tokens.shape)
        outside = self.beyond_draft_vocabulary(models, outputs, picked.anchors)
        return Signal(picked.anchors, tokens, weights, Extra(uniform, outside)), memory, {}

    def beyond_draft_vocabulary(
        self, models: Models, outputs: TargetOutputs, anchors_BxA: jax.Array
    ) -> dict[str, jax.Array]:
        """See `Extra.outside`; of positions that windows read."""
        if self.renormalise:
            return {}
        name, about = "likeliest", (models.target, models.target_params)
        of = functools.partial(target_outputs.likeliest_tokens, *about)
        if (temperature := self.target_temperature) > 0:
            name = "log_normaliser"
            of = functools.partial(target_outputs.log_normaliser, *about, temperature=temperature)
        return {name: where_read(outputs, anchors_BxA, self.window, of)}

    def prepare(self, models: Models, signal: Signal, batch: Batch, outputs: TargetOutputs) -> Any:
        """The target's distribution along the texts."""

        def of(target_logits: jax.Array, positions: jax.Array) -> TargetDistribution:
            outside = {name: at(values, positions) for name, values in signal.extra.outside.items()}
            return self.distribution(models, target_logits, outside)

        return along_windows(models, outputs, signal.anchors, self.window, of)

    def inputs(self, step: int, signal: Signal, prepared: Any) -> Any:
        """The text's token, a random number, and where the target's distribution is."""
        about = (signal.tokens[:, :, 0, step], signal.extra.uniform[:, :, 0, step])
        return *about, prepared.where[..., step]

    def observe(
        self, models: Models, step: int, hidden: jax.Array, logits: jax.Array, inputs: Any, prepared: Any
    ) -> Stats:
        """Losses, whether the drafter's likeliest token is the text's, and what the weights ask for."""
        token_BxL, uniform_BxL, where_BxL = inputs
        target = prepared.look_up(where_BxL)
        vocab, token = models.weights.vocab, token_BxL[..., None]
        stats = {"hit": (vocab[likeliest(logits)] == token).astype(jnp.float32)}
        stats |= self.losses_of(target, logits)
        if self._outcomes - {"greedy_hits"}:
            prob = prob_of(logits, vocab, token)
            stats |= {"prob": prob, "sampled_hit": (uniform_BxL[..., None] < prob).astype(jnp.float32)}
        return stats

    def losses_of(self, target: TargetDistribution, logits: jax.Array) -> Stats:
        """What `loss_per_token` asks for of each token `[B, L, 1]`."""
        terms, stats = losses.parse_losses(self.losses, "losses"), {}
        if rest := [term for term in terms if term[1] != _BY_BATCH]:
            about = (self.lk_scale, self.lk_decay)
            stats["loss"] = losses.weighted_sum(rest, target, logits, *about)
        if losses.needs_batch_acceptance(terms):
            stats |= {"kl": losses.kl(target, logits)}
            stats |= {"refusal": losses.total_variation(target, logits)}
        return stats

    @property
    def _outcomes(self) -> frozenset[str]:
        return window_weights.needed_outcomes(window_weights.parse_weights(self.step_weights, "step_weights"))

    def distribution(
        self, models: Models, target_logits: jax.Array, outside: dict[str, jax.Array]
    ) -> TargetDistribution:
        """The target's distribution as the keys want it, from logits `[B, L, N]`."""
        if self.renormalise:
            return losses.renormalised(target_logits, self.target_temperature)
        if self.target_temperature == 0:
            _, inside = draft_ids(models.weights.vocab, outside["likeliest"])
            return losses.unnormalised(target_logits, 0.0, argmax_inside=inside)
        about = (target_logits, self.target_temperature)
        return losses.unnormalised(*about, log_normaliser=outside["log_normaliser"])

    def summarise(self, stats: Stats, signal: Signal) -> dict[str, jax.Array]:
        """The mean acceptance of each step, where a loss asks for it."""
        if "refusal" not in stats:
            return {}
        return {"acceptance_K": jnp.sum((1 - stats["refusal"]) * signal.weights["valid"], (0, 1, 2))}

    def loss_per_token(self, stats: Stats, summary: dict[str, jax.Array]) -> jax.Array:
        """`[B, A, 1, K]`: the sum of losses."""
        total = stats.get("loss", jnp.float32(0))
        for weight, name in losses.parse_losses(self.losses, "losses"):
            if name == _BY_BATCH:
                mix_K = losses.lk_lambda(summary["acceptance_K"], self.lk_scale, self.lk_decay)
                total += weight * (mix_K * stats["kl"] + (1 - mix_K) * stats["refusal"])
        return total

    def loss(self, stats: Stats, signal: Signal, summary: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """Sum over the steps of the mean loss of each, weighted; and the accuracy of each step."""
        valid = signal.weights["valid"]
        outcomes = window_weights.Outcomes(
            greedy_hits=stats["hit"] > 0,
            sampled_hits=stats["sampled_hit"] > 0 if "sampled_hit" in stats else None,
            confidence=stats.get("prob"),
            valid=valid > 0,
        )
        names = window_weights.parse_weights(self.step_weights, "step_weights")
        count = window_weights.product(names, self.window, outcomes, self.decay, self.dpace_alpha)
        accuracy_K = jnp.sum(stats["hit"] * valid, (0, 1, 2))
        total = jnp.sum(self.loss_per_token(stats, summary) * valid * count)
        return total, {f"accuracy_{j}": accuracy_K[j] for j in range(self.window)}
