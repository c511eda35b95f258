"""`hass`: the losses of `supervised`, and one over the target's k likeliest tokens.

HASS (arXiv 2408.15766) has two parts. Its harmonised context alignment feeds the drafter on its own hidden
states, which training-time test does already. Its harmonised objective distillation adds the cross-entropy of
the target's k likeliest tokens O alone, not renormalised,

    - sum over x in O of T(x) log q(x),

so that a drafter too small for the whole distribution spends itself on the tokens that can be accepted.

The formula is that of the authors' code (github.com/HArmonizedSS/HASS), as the paper's text could not be had.
There k is 10, the top-k loss counts 1 and the cross-entropy 0.1, which are the defaults here; it first trains
without the top-k loss, which is a run of its own here. What is left out is its regression of the target's
features, which EAGLE-3 gave up. It takes three passes that count alike; the window and the weights of its
steps here are those of `supervised`, so that the two may be compared.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ppow_jax.keys import key
from ppow_jax.models.layers import log_softmax
from ppow_jax.objectives.base import Stats
from ppow_jax.objectives.losses import TargetDistribution
from ppow_jax.objectives.supervised import Supervised


@dataclasses.dataclass(frozen=True)
class HASS(Supervised):
    """Losses against the target's distribution, and against its likeliest tokens alone."""

    losses: str = key("0.1*cross_entropy", "as those of supervised; the weight is that of the authors' code")
    top_k: int = key(10, "k, the target's likeliest tokens", at_least=1)
    top_k_weight: float = key(1.0, "of their loss")

    def losses_of(self, target: TargetDistribution, logits: jax.Array) -> Stats:
        """Those of `supervised`, and the top-k loss."""
        return super().losses_of(target, logits) | {"top_k": top_k_loss(target, logits, self.top_k)}

    def loss_per_token(self, stats: Stats, summary: dict[str, jax.Array]) -> jax.Array:
        """`[B, A, 1, K]`: the sum of all losses."""
        return super().loss_per_token(stats, summary) + self.top_k_weight * stats["top_k"]


def top_k_loss(target: TargetDistribution, logits: jax.Array, top_k: int) -> jax.Array:
    """-sum of T(x) log q(x) over the target's `top_k` likeliest tokens x, float32 `[...]`.

    Args:
      target: the target's distribution; T is renormalised to the draft vocabulary.
      logits: float32 `[..., N]`, the drafter's.
      top_k: of N tokens, all count where it is larger.
    """
    best = jax.lax.top_k(target.log_probs, min(top_k, target.log_probs.shape[-1]))[1]
    log_q = log_softmax(logits)
    log_q = jnp.broadcast_to(log_q, jnp.broadcast_shapes(log_q.shape, target.log_probs.shape))
    of_best = [jnp.take_along_axis(x, best, axis=-1) for x in (target.probs, log_q)]
    return -jnp.sum(of_best[0] * of_best[1], axis=-1)
