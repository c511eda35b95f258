"""`opd`: on-policy distillation along the drafter's own windows (Draft-OPD, arXiv 2605.29343).

Windows are drafted from where decoding begins a round, which is behind each refusal, and the target reads
them as they are: it says what it would have written at every drafted token, beyond the first refusal too. A
window of accepted length k then teaches, with q the drafter's distribution and T the target's after the same
drafted tokens,

    L = (a mean of KL(T || q) over accepted tokens
         + r sum of w_j KL(q || T) over refused tokens / sum of their w_j) / (a + r),

where the token that was refused first and all behind it count as refused, and w_j = decay ** j at step j of
the window, from 0. KL(T || q) covers T where it is to be trusted; KL(q || T) takes from q what T would
refuse.

The formula, its directions and a = r = 1, decay = 0.8 are the paper's, by descriptions of it and its code
(github.com/bingyang-lei/Draft-OPD, whose KL is an estimate from the drafted token alone; here all of both
distributions count). The paper's text could not be had. Ours are: windows sampled at a temperature, several
an anchor if wanted; T restricted to the draft vocabulary; rounds simulated on texts that the target has
written, instead of decoding anew; and a decay that begins at the refusal.

Shape letters: B texts, A anchors, G windows an anchor, K window, N draft vocabulary, D width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.drafters import windows
from ppow_jax.errors import ConfigError
from ppow_jax.keys import key
from ppow_jax.models import target_outputs
from ppow_jax.models.layers import draft_ids, product
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import losses, rewards
from ppow_jax.objectives.anchors import AnchorRule, Picked, blank_table, pick_anchors
from ppow_jax.objectives.base import (
    Batch,
    Memory,
    Metrics,
    Models,
    Objective,
    Signal,
    Sizes,
    Stats,
    per_token,
)
from ppow_jax.objectives.rollout import Rollout, roll
from ppow_jax.objectives.verification import continuation, score_groups, until_stop, windows_at_once


class Replayed(NamedTuple):
    """Drafted windows as the target reads them.

    Attributes:
      accepted: int32 `[B, A, G]`, k.
      valid: bool `[B, A, G, K]`, tokens of which it is known whether they are accepted.
      context: `[B, A, G, K, D]`, the target's hidden states that predict each token.
    """

    accepted: jax.Array
    valid: jax.Array
    context: jax.Array


@dataclasses.dataclass(frozen=True)
class OPD(Objective):
    """Divergences from the target along drafted windows, one where they are accepted and one where not."""

    anchors: int = key(16, "windows' beginnings a text", at_least=1)
    group: int = key(1, "G, windows an anchor", at_least=1)
    window: int = key(10, "K", at_least=1)
    temperature: float = key(0.0, "of verification, which tells accepted tokens from refused ones")
    rollout_temperature: float = key(
        1.0, "of the drafter's sampling; 0: its likeliest tokens, as chains are drafted at temperature 0"
    )
    accepted_loss: str = key("kl", f"A sum of {', '.join(losses.LOSSES)}, with weights as in supervised.")
    refused_loss: str = key("reverse_kl", "the same")
    accepted_weight: float = key(1.0, "a, of accepted_loss in the weighted mean of the two")
    refused_weight: float = key(1.0, "r, of refused_loss in it")
    decay: float = key(0.8, "of refused tokens", above=0, at_most=1.0)
    decay_from: str = key(
        "window",
        "Where it begins: window, refused step j counts decay ** j, the paper's; or refusal, the first "
        "refused token counts 1, the next one decay, and so on.",
        choices=("window", "refusal"),
    )
    target_temperature: float = key(1.0, "of the target's distribution; 0: its likeliest token alone")
    updates: int = key(1, "optimiser steps on each rollout", at_least=1)
    anchor_rule: AnchorRule = dataclasses.field(
        default_factory=lambda: AnchorRule(rule="rounds", warmup_steps=0, rescore_every=50)
    )

    def __post_init__(self) -> None:
        for name in ("accepted_loss", "refused_loss"):
            if losses.needs_batch_acceptance(losses.parse_losses(getattr(self, name), name)):
                raise ConfigError(f"{name}: found lk_batch, expected losses of each token by itself")
        if self.accepted_weight + self.refused_weight == 0:
            raise ConfigError("accepted_weight: found 0, and refused_weight 0; expected one of them above 0")
        if self.rollout_temperature == 0 and self.group > 1:
            raise ConfigError(
                f"group: found {self.group}, expected 1 at rollout_temperature 0, where windows are all alike"
            )

    def rounds(self, texts: int) -> int:
        """How often the loop that scores the windows of so many texts runs at most."""
        return self.anchors * self.group // windows_at_once(texts, self.anchors, self.group, self.window)

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
        """Anchors, windows, what the target says along them, and what each of their tokens counts."""
        keys = jax.random.split(key, 3)
        about = (models, batch, outputs)
        picked, memory = pick_anchors(
            self.anchor_rule, *about, memory, step, keys[0], self.anchors, self.window
        )
        if self.rollout_temperature == 0:
            rollout = draft_greedily(*about, picked, self.window)
        else:
            shape = (self.group, self.window, self.rollout_temperature)
            rollout = roll(*about, picked.anchors, picked.real, keys[1], *shape, along_text=False)
        replayed = replay(*about, rollout, keys[2], self.temperature)
        accepted, refused = self.weights(replayed, picked.importance)
        weights = {"accepted": per_token(accepted), "refused": per_token(refused)}
        real = jnp.broadcast_to(rollout.real[..., None], replayed.accepted.shape)
        tokens = jnp.maximum(replayed.valid.sum(), 1)
        metrics = {
            "accepted": losses.masked_mean(replayed.accepted.astype(jnp.float32), real),
            "share_refused_tokens": (refused > 0).sum() / tokens,
        }
        return Signal(picked.anchors, rollout.tokens, weights, replayed.context), memory, metrics

    def weights(self, replayed: Replayed, importance_BxA: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 `[B, A, G, K]`: what each accepted and what each refused token counts, not normalised."""
        step_K, accepted = jnp.arange(self.window), replayed.accepted[..., None]
        behind = step_K if self.decay_from == "window" else jnp.maximum(step_K - accepted, 0)
        each = replayed.valid * importance_BxA[..., None, None]
        return each * (step_K < accepted), each * (step_K >= accepted) * self.decay**behind

    def inputs(self, step: int, signal: Signal, prepared: Any) -> Any:
        """The target's hidden states that predict the drafted tokens."""
        return signal.extra[..., step, :]

    def observe(
        self, models: Models, step: int, hidden: jax.Array, logits: jax.Array, inputs: Any, prepared: Any
    ) -> Stats:
        """Both losses of every token."""
        target = losses.renormalised(product(inputs, models.head_NxD), self.target_temperature)

        def of(name: str) -> jax.Array:
            terms = losses.parse_losses(getattr(self, name), name)
            return jnp.broadcast_to(losses.weighted_sum(terms, target, logits), inputs.shape[:-1])

        return {name: of(name) for name in ("accepted_loss", "refused_loss")}

    def loss(self, stats: Stats, signal: Signal, summary: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """The mean of the two losses by their weights."""
        accepted = jnp.sum(stats["accepted_loss"] * signal.weights["accepted"])
        refused = jnp.sum(stats["refused_loss"] * signal.weights["refused"])
        total = self.accepted_weight * accepted + self.refused_weight * refused
        metrics = {"accepted_loss": accepted, "refused_loss": refused}
        return total / (self.accepted_weight + self.refused_weight), metrics


def draft_greedily(
    models: Models, batch: Batch, outputs: TargetOutputs, picked: Picked, window: int
) -> Rollout:
    """The window of likeliest tokens from every anchor; each token counts as certain."""
    prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, batch["tokens"])
    start = windows.text_starts(prefix, batch["tokens"], picked.anchors)
    vocab = models.weights.vocab
    about = (models.drafter, models.weights, prefix.keys_values, start, windows.greedy(vocab))
    tokens = windows.window_pass(*about, window)
    log_prob = jnp.zeros(tokens.shape)
    return Rollout(picked.anchors, picked.real, draft_ids(vocab, tokens)[0], tokens, log_prob)


def replay(
    models: Models,
    batch: Batch,
    outputs: TargetOutputs,
    rollout: Rollout,
    key: jax.Array,
    temperature: float,
) -> Replayed:
    """Has the target read drafted windows as they are, and verifies them.

    At temperature 0 the texts are the target's greedy ones, so a window that repeats the text needs no
    reading but the text's own, and where a text ends without a refusal nothing is known of what comes behind.

    Args:
      models, batch, outputs: as in `base.Objective.signal`.
      rollout: the windows.
      key: of this step.
      temperature: of verification.
    """
    outputs, cache = target_outputs.read(models.target, models.target_params, batch["tokens"])
    text = continuation(batch, outputs, rollout)
    real = jnp.broadcast_to(rollout.real[..., None], rollout.tokens.shape[:3])
    valid = until_stop(rollout.tokens, models.stops) & real[..., None]
    needed, K = real, rollout.tokens.shape[-1]
    if temperature == 0:
        accepted = rewards.accepted_greedy(rollout.tokens, text.tokens, text.valid)
        refused = accepted < text.valid.sum(-1)
        valid &= refused[..., None] | (jnp.arange(K) < accepted[..., None])
        needed = refused & (accepted < K - 1)
    scores = score_groups(models, cache, outputs, rollout, needed, temperature)
    if temperature > 0:
        uniform = jax.random.uniform(key, rollout.log_prob.shape)
        accepted = rewards.accepted_sampled(scores.tempered, rollout.log_prob, uniform, valid)
    context = jnp.where(needed[..., None, None], scores.context, text.hidden)
    return Replayed(accepted, valid, context)
