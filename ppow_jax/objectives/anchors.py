"""Which positions of a text become anchors: uniform, by ADAW's criticality, or where decoding begins rounds.

ADAW is adaptive divergence-aware windowing (PPOW, arXiv 2605.14978). Scores of a text are kept for some steps
in a table, a row a text, which is saved with the checkpoint.

Shape letters: B texts, T positions, A anchors, K window.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.decode.shapes import chain
from ppow_jax.decode.simulate import simulate
from ppow_jax.drafters import windows
from ppow_jax.keys import key
from ppow_jax.models import target_outputs
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import losses
from ppow_jax.objectives.base import Batch, Memory, Models, Sizes, at

_NEVER = -(2**30)  # step at which a text's scores were made, before they are


@dataclasses.dataclass(frozen=True)
class AnchorRule:
    """How anchors are chosen."""

    rule: str = key(
        "uniform",
        "uniform; adaw, in proportion to the divergence of the drafter from the target over the window, "
        "weighed by the target's confidence; rounds, among the positions where decoding begins a round if "
        "it drafts greedily and accepts the text's own tokens (exact for greedy texts)",
        choices=("uniform", "adaw", "rounds"),
    )
    warmup_steps: int = key(20, "training steps with uniform anchors before the rule applies")
    rescore_every: int = key(
        500,
        "Steps for which a text's scores stay valid. ADAW's change little from drafter to drafter "
        "(docs/log.md); where rounds begin changes more.",
        at_least=1,
    )
    corrected: bool = key(False, "Importance weights: the loss then estimates the one with uniform anchors.")


class Picked(NamedTuple):
    """Anchors of each text.

    Attributes:
      anchors: int32 `[B, A]`.
      real: bool `[B, A]`, False for padding.
      importance: float32 `[B, A]`, what each counts; 1 but for corrected rules.
    """

    anchors: jax.Array
    real: jax.Array
    importance: jax.Array


def blank_table(rule: AnchorRule, sizes: Sizes) -> Memory:
    """The table before anything is scored: float32 `[texts, T]` scores, int32 `[texts]` steps."""
    if rule.rule == "uniform":
        return {}
    return {
        "scores": jnp.zeros((sizes.records, sizes.length), jnp.float32),
        "scored_at": jnp.full(sizes.records, _NEVER, jnp.int32),
    }


def pick_anchors(
    rule: AnchorRule,
    models: Models,
    batch: Batch,
    outputs: TargetOutputs,
    memory: Memory,
    step: jax.Array,
    key: jax.Array,
    count: int,
    window: int,
) -> tuple[Picked, Memory]:
    """Draws `count` anchors of each text; arguments as in `base.Objective.signal`."""
    mask = windows.anchor_mask(batch["assistant"])
    weight_BxT = mask.astype(jnp.float32)
    if rule.rule != "uniform":
        index = batch["index"]
        active = step > rule.warmup_steps
        stale_B = step - memory["scored_at"][index] > rule.rescore_every
        known_BxT = memory["scores"][index]

        def rescore() -> jax.Array:
            score = criticality if rule.rule == "adaw" else round_beginnings
            return jnp.where(stale_B[:, None], score(models, batch, outputs, window), known_BxT)

        scores_BxT = jax.lax.cond(active & stale_B.any(), rescore, lambda: known_BxT)
        at_B = jnp.where(active & stale_B, step, memory["scored_at"][index])
        memory = memory | {
            "scores": memory["scores"].at[index].set(scores_BxT),
            "scored_at": memory["scored_at"].at[index].set(at_B),
        }
        informed_Bx1 = active & (scores_BxT.sum(1, keepdims=True) > 0)
        weight_BxT = jnp.where(informed_Bx1, scores_BxT, weight_BxT)
    anchors, real, importance = sample_anchors(key, weight_BxT, count)
    return Picked(anchors, real, importance if rule.corrected else jnp.ones_like(importance)), memory


def sample_anchors(
    key: jax.Array, weights_BxT: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws anchors of each row without replacement, in proportion to the weights (Gumbel top-k).

    Returns:
      int32 `[B, A]` positions; bool `[B, A]`, False where a row has fewer than A positive weights (there the
      position is 0 and must be masked); and float32 `[B, A]` importance weights, with which means over the
      drawn anchors are, in expectation, means over all positions of positive weight. They are the inverse of
      the chance to exceed the largest score that is left out (Kool, van Hoof and Welling 2019, arXiv
      1903.06059, section 4.2), scaled to a mean of 1 in expectation.
    """
    gumbel = jax.random.gumbel(key, weights_BxT.shape)
    log_weights = jnp.log(jnp.maximum(weights_BxT, 1e-30))
    score = jnp.where(weights_BxT > 0, log_weights + gumbel, -jnp.inf)
    top, positions = jax.lax.top_k(score, min(count + 1, score.shape[1]))
    threshold_Bx1 = top[:, count:] if top.shape[1] > count else -jnp.inf
    top, positions = top[:, :count], positions[:, :count]
    real = jnp.isfinite(top)
    above = jnp.exp(jnp.take_along_axis(log_weights, positions, 1) - threshold_Bx1)
    inverse = jnp.where(real, 1 / jnp.maximum(-jnp.expm1(-above), 1e-6), 0.0)
    share_Bx1 = real.sum(1, keepdims=True) / jnp.maximum((weights_BxT > 0).sum(1, keepdims=True), 1)
    return jnp.where(real, positions, 0).astype(jnp.int32), real, inverse * share_Bx1


def criticality(models: Models, batch: Batch, outputs: TargetOutputs, window: int) -> jax.Array:
    """ADAW's score `[B, T]` of every anchor: one drafter step from each, against the target."""
    tokens = batch["tokens"]
    B, T = tokens.shape
    prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, tokens)
    anchors = jnp.broadcast_to(jnp.minimum(jnp.arange(T), T - 2), (B, T))
    hidden_BxTxD = at(outputs.hidden, anchors + 1)

    def choose(_: int, hidden: jax.Array, logits_BxLx1xN: jax.Array, hidden_BxLxD: jax.Array):
        target_logits = (hidden_BxLxD @ models.head_NxD.T)[:, :, None]
        divergence = losses.kl(losses.renormalised(target_logits), logits_BxLx1xN)
        return jnp.zeros(divergence.shape, jnp.int32), divergence

    start = windows.text_starts(prefix, tokens, anchors)
    divergence = windows.window_pass(
        models.drafter, models.weights, prefix.keys_values, start, choose, 1, lambda step: hidden_BxTxD
    )
    entropy_BxT = target_outputs.entropy_of(models.target, models.target_params, outputs.hidden)
    entropy = jnp.take_along_axis(entropy_BxT, anchors + 1, 1)
    values = confidence(entropy, models.target.config.vocab_size) * divergence[:, :, 0, 0]
    return anchor_scores(values, windows.anchor_mask(batch["assistant"]), window)


def confidence(entropy: jax.Array, vocab_size: int) -> jax.Array:
    """C(P) = 1 - H(P) / log |V| of a distribution with the given entropy, nats (PPOW, ADAW)."""
    return 1.0 - entropy / jnp.log(vocab_size)


def anchor_scores(values_BxT: jax.Array, anchors_BxT: jax.Array, window: int) -> jax.Array:
    """Mean of the criticality over the window of each anchor; 0 where there is no anchor.

    Args:
      values_BxT: criticality at position t: of the prediction made from anchor t, token t + 2.
      anchors_BxT: bool, the positions that may be anchors. A window covers t .. t + K - 1; its mean
        runs over those of them that are anchors, so a window cut by the end of the text is not
        punished for being short.
      window: K.
    """
    weight = anchors_BxT.astype(values_BxT.dtype)
    pad = ((0, 0), (0, window))

    def running(x_BxT: jax.Array) -> jax.Array:
        total = jnp.cumsum(jnp.pad(x_BxT, pad), axis=1)
        total = jnp.concatenate([jnp.zeros_like(total[:, :1]), total], 1)
        return total[:, window : window + x_BxT.shape[1]] - total[:, : x_BxT.shape[1]]

    mean = running(values_BxT * weight) / jnp.maximum(running(weight), 1.0)
    return jnp.where(anchors_BxT, jnp.maximum(mean, 0.0), 0.0)


def round_beginnings(models: Models, batch: Batch, outputs: TargetOutputs, window: int) -> jax.Array:
    """float32 `[B, T]`: 1 where greedy decoding of the first response by chains of K begins a round."""
    wrote = batch["assistant"].astype(jnp.int32)
    B, T = wrote.shape
    start_B = jnp.argmax(wrote, 1)
    ended = (jnp.arange(T) > start_B[:, None]) & (wrote == 0)
    end_B = jnp.where(ended.any(1), jnp.argmax(ended, 1), T)
    end_B = jnp.where(wrote.any(1), end_B, 0)
    about = (outputs.taps, batch["tokens"], start_B, end_B)
    emitted_BxT = simulate(models.drafter, models.weights, *about, chain(window)).emitted
    before_BxT = jnp.cumsum(emitted_BxT, 1) - emitted_BxT
    anchors_BxT = jnp.where(emitted_BxT > 0, start_B[:, None] - 1 + before_BxT, T)
    return jnp.zeros((B, T)).at[jnp.arange(B)[:, None], anchors_BxT].set(1.0, mode="drop")
