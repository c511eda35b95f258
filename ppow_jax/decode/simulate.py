"""Decoding simulated on text that the target wrote greedily: exact, and without the target.

Walk the text: draft from the anchor, compare with the text, jump. The rounds are those of
`decode.loop` with the same drafter.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.decode.verify import accepted_prefix
from ppow_jax.models.drafter import Drafter, DrafterWeights
from ppow_jax.windows import greedy, text_prefix, text_starts, window_pass


class Rounds(NamedTuple):
    """The verification passes of each text.

    Attributes:
      emitted: int32 `[B, T]`, tokens that round r emitted, zero beyond the last round.
      accepted: int32 `[B, T]`, drafted tokens of round r that agreed, -1 beyond the last round.
      offered: int32 `[B, T]`, how many drafted tokens had text to be compared with.
    """

    emitted: jax.Array
    accepted: jax.Array
    offered: jax.Array


@functools.partial(jax.jit, static_argnames=("drafter", "window"))
def simulate(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    end_B: jax.Array,
    window: int,
) -> Rounds:
    """Rounds of chain decoding over responses.

    Args:
      drafter: the module.
      weights: its weights.
      taps_BxTxC: the target's taps on the texts.
      tokens_BxT: the texts, greedy beyond `start`.
      start_B: position of the first token of the response (prefill emits that one).
      end_B: position after its last token, stop token included.
      window: K.
    """
    B, T = tokens_BxT.shape
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)
    padded = jnp.pad(tokens_BxT, ((0, 0), (0, window + 2)), constant_values=-1)
    ahead = jnp.arange(2, window + 2)

    def walk(carry: tuple) -> tuple:
        round_, anchor_B, rounds = carry
        alive_B = anchor_B + 2 < end_B
        at = jnp.minimum(anchor_B, T - 2)[:, None]
        begin = text_starts(prefix, tokens_BxT, at)
        choose = greedy(weights.vocab)
        drafted = window_pass(drafter, weights, prefix.keys_values, begin, choose, window)[:, 0, 0]
        position_BxK = anchor_B[:, None] + ahead
        text_BxK = jnp.take_along_axis(padded, jnp.minimum(position_BxK, T + window + 1), 1)
        inside_BxK = position_BxK < end_B[:, None]
        accepted_B = accepted_prefix(inside_BxK & (drafted == text_BxK))
        emitted_B = jnp.minimum(accepted_B + 1, end_B - anchor_B - 2)
        rounds = Rounds(
            rounds.emitted.at[:, round_].set(jnp.where(alive_B, emitted_B, 0)),
            rounds.accepted.at[:, round_].set(jnp.where(alive_B, accepted_B, -1)),
            rounds.offered.at[:, round_].set(jnp.where(alive_B, inside_BxK.sum(1), 0)),
        )
        return round_ + 1, jnp.where(alive_B, anchor_B + emitted_B, anchor_B), rounds

    zeros = jnp.zeros((B, T), jnp.int32)
    carry = (jnp.int32(0), start_B - 1, Rounds(zeros, zeros - 1, zeros))
    alive = lambda c: jnp.any(c[1] + 2 < end_B)  # noqa: E731
    return jax.lax.while_loop(alive, walk, carry)[2]


@functools.partial(jax.jit, static_argnames=("drafter", "window"))
def expected_accepted(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    end_B: jax.Array,
    anchors_BxA: jax.Array,
    window: int,
) -> jax.Array:
    """Expected accepted length of windows *sampled* from the drafter at temperature 1, float32 `[B, A]`.

    The text is the target's greedy one, so a window is accepted as far as it repeats the text:
    E[k] = sum over j of the product over i <= j of Q(x_i | x_<i), which one teacher-forced pass gives.

    Args:
      drafter, weights, taps_BxTxC, tokens_BxT, end_B, window: as in `simulate`.
      anchors_BxA: int32; text beyond `end` counts as refused.
    """
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)
    start = text_starts(prefix, tokens_BxT, anchors_BxA)
    T, N = tokens_BxT.shape[1], weights.vocab.shape[0]

    def choose(step: int, logits_BxAx1xN: jax.Array):
        position_BxA = anchors_BxA + 2 + step
        token_BxA = jnp.take_along_axis(tokens_BxT, jnp.minimum(position_BxA, T - 1), 1)
        draft_BxA = jnp.minimum(jnp.searchsorted(weights.vocab, token_BxA), N - 1)
        possible_BxA = (weights.vocab[draft_BxA] == token_BxA) & (position_BxA < end_B[:, None])
        logp = jax.nn.log_softmax(logits_BxAx1xN[:, :, 0])
        logp_BxA = jnp.take_along_axis(logp, draft_BxA[..., None], -1)[..., 0]
        return token_BxA[..., None], jnp.where(possible_BxA, jnp.exp(logp_BxA), 0.0)[..., None]

    repeated = window_pass(drafter, weights, prefix.keys_values, start, choose, window)[:, :, 0]
    return jnp.cumprod(repeated, -1).sum(-1)
