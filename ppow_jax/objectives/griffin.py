"""`griffin`: the losses of `hass` where the tokens that a window reads on could have been drafted.

GRIFFIN (arXiv 2502.11018): training-time test feeds a window with the text's tokens, while decoding feeds it
with drafted ones. Where the text's token is not even among the drafter's k likeliest, no tree of width k
would read on it, and what a later step learns behind it is of no use. Let x_0 .. x_(K - 1) be the text along
a window. Its first step always counts, and step j counts by

    m_j = h_1 h_2 .. h_j,    h_i = 1 if x_i is among the k likeliest tokens of step i - 1

of the window that begins one position later, which predicts the same token. That is the rule of the authors'
code (github.com/hsj576/GRIFFIN), where each pass over a text masks the next one at the same positions; the
paper's text could not be had. With `agreement` "own" the window itself is asked, m_j = h_0 h_1 .. h_(j - 1)
with its own steps: whether decoding from its anchor can have come so far. That variant is ours.

A step's loss is the mean over what counts. k is 3 and the top-k loss counts 0.5, as in the code. The paper's
changes to the drafter's layers are not part of this.

Shape letters: B texts, T positions, A anchors, K window, N draft vocabulary.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax.drafters import windows
from ppow_jax.keys import key
from ppow_jax.models.layers import draft_ids
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives.base import Batch, Memory, Metrics, Models, Signal
from ppow_jax.objectives.hass import HASS


@dataclasses.dataclass(frozen=True)
class GRIFFIN(HASS):
    """Losses against the target's distribution at steps whose earlier tokens could have been drafted."""

    top_k_weight: float = key(0.5, "of the loss of hass")
    agreement_k: int = key(3, "k: a token could have been drafted if it is among the k likeliest", at_least=1)
    agreement: str = key(
        "next",
        "Whose k likeliest tokens: next, those of the window that begins at the next position, as the "
        "authors' code has it; or own, those of the window itself.",
        choices=("next", "own"),
    )

    def signal(
        self,
        models: Models,
        batch: Batch,
        outputs: TargetOutputs,
        memory: Memory,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[Signal, Memory, Metrics]:
        """That of `supervised`, whose weights are left where the earlier tokens could have been drafted."""
        signal, memory, metrics = super().signal(models, batch, outputs, memory, step, key)
        if self.window == 1:
            return signal, memory, metrics
        later = 1 if self.agreement == "next" else 0
        hits = text_hits(models, batch, outputs, signal.anchors + later, self.agreement_k, self.window - 1)
        counts = jnp.cumprod(jnp.pad(hits, ((0, 0), (0, 0), (0, 0), (1, 0)), constant_values=1.0), -1)
        left = signal.weights["valid"] * counts
        share_K = left.sum((0, 1, 2))  # of what counts in `supervised`, whose weights sum to 1 a step
        weights = signal.weights | {"valid": left / jnp.where(share_K > 0, share_K, 1.0)}
        metrics |= {f"counted_{j}": share_K[j] for j in range(self.window)}
        return signal._replace(weights=weights), memory, metrics


def text_hits(
    models: Models, batch: Batch, outputs: TargetOutputs, anchors_BxA: jax.Array, k: int, steps: int
) -> jax.Array:
    """float32 `[B, A, 1, steps]`: 1 where the text's token is among the drafter's k likeliest, along the
    text.

    Args:
      models, batch, outputs: as in `base.Objective.signal`.
      anchors_BxA: where the windows begin; beyond the last possible anchor, anything.
      k: of N tokens, all count where it is larger.
      steps: of the windows.
    """
    tokens = batch["tokens"]
    anchors_BxA = jnp.minimum(anchors_BxA, tokens.shape[1] - 2)
    prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, tokens)
    start = windows.text_starts(prefix, tokens, anchors_BxA)
    vocab = models.weights.vocab

    def choose(_: int, hidden: jax.Array, logits: jax.Array, ahead: Any) -> tuple[jax.Array, jax.Array]:
        # counting those before it takes a CPU a fraction of the time that finding the k likeliest does
        ids, inside = draft_ids(vocab, ahead)
        own = jnp.take_along_axis(logits, ids[..., None], -1)
        before = (logits > own) | ((logits == own) & (jnp.arange(len(vocab)) < ids[..., None]))
        return ahead, (inside & (before.sum(-1) < k)).astype(jnp.float32)

    about = (models.drafter, models.weights, prefix.keys_values, start)
    return windows.window_pass(
        *about, choose, steps, lambda step: windows.text_ahead(tokens, anchors_BxA, step)
    )
