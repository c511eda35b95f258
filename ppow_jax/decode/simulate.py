"""Decoding simulated on text that the target wrote greedily: exact, and without the target.

Walk the text: draft from the anchor, compare with the text, jump. A chain is accepted as far as it repeats
the text, so it need not be drafted beyond its first mistake, and no row waits for another: one drafter step
for every token. Trees are drafted whole. The rounds are those of `decode.loop` with the same drafter.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode import tree, verify
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.decode.shapes import Shape, chain
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import Prefix, text_prefix, text_starts, window_pass
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import Cache
from ppow_jax.models.layers import likeliest


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


class _Walk(NamedTuple):
    """Where each row stands in its text."""

    anchor: jax.Array  # [B]
    step: jax.Array  # [B], of the window
    round: jax.Array  # [B]
    hidden: jax.Array  # [B, D], the drafter's own, from the step before
    context: Cache  # the text's T slots, then the window's own: step j's in slot T + j
    rounds: Rounds


def simulate(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array | np.ndarray,
    end_B: jax.Array | np.ndarray,
    shape: Shape,
) -> Rounds:
    """Rounds of decoding over responses.

    Args:
      drafter: the module.
      weights: its weights.
      taps_BxTxC: the target's taps on the texts.
      tokens_BxT: the texts, greedy beyond `start`.
      start_B: position of the first token of the response (prefill emits that one).
      end_B: position after its last token, stop token included.
      shape: of the drafts.
    """
    inputs = (drafter, weights, taps_BxTxC, tokens_BxT, start_B, end_B)
    if shape == chain(shape.depth):
        return _simulate_chain(*inputs, shape.depth)
    return _simulate_trees(*inputs, shape)


@functools.partial(jax.jit, static_argnames=("drafter", "window"))
def _simulate_chain(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    end_B: jax.Array,
    window: int,
) -> Rounds:
    """`simulate` of windows that are drafted as far as they are right."""
    B, T = tokens_BxT.shape
    rows = jnp.arange(B)
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)

    def walk(w: _Walk) -> _Walk:
        hidden_BxD, context, drafted_B = _draft(drafter, weights, prefix, tokens_BxT, w)
        says_B = w.anchor + w.step + 2  # the position of the token that was drafted
        alive_B, left_B = says_B < end_B, end_B - w.anchor - 2
        agrees_B = drafted_B == tokens_BxT[rows, jnp.minimum(says_B, T - 1)]
        over_B = ~agrees_B | (w.step + 1 == window) | (says_B + 1 == end_B)
        accepted_B = w.step + agrees_B
        emitted_B = jnp.minimum(accepted_B + 1, left_B)
        found = Rounds(emitted_B, accepted_B, jnp.minimum(window, left_B))
        at_B = jnp.where(alive_B & over_B, w.round, T)  # T: outside, dropped
        return _Walk(
            anchor=w.anchor + jnp.where(alive_B & over_B, emitted_B, 0),
            step=jnp.where(over_B, 0, w.step + 1),
            round=w.round + (alive_B & over_B),
            hidden=hidden_BxD,
            context=context,
            rounds=jax.tree.map(lambda all_, new: all_.at[rows, at_B].set(new, mode="drop"), w.rounds, found),
        )

    zeros, zero_B = jnp.zeros((B, T), jnp.int32), jnp.zeros(B, jnp.int32)
    context = kv_cache.grow(prefix.keys_values, T + window)
    start = _Walk(start_B - 1, zero_B, zero_B, prefix.hidden[:, 0], context, Rounds(zeros, zeros - 1, zeros))
    return jax.lax.while_loop(lambda w: jnp.any(w.anchor + 2 < end_B), walk, start).rounds


def _draft(
    drafter: Drafter, weights: DrafterWeights, prefix: Prefix, tokens_BxT: jax.Array, w: _Walk
) -> tuple[jax.Array, Cache, jax.Array]:
    """One step of each row's window along the text: hidden state `[B, D]`, context, drafted token `[B]`."""
    B, T = tokens_BxT.shape
    rows, position_B = jnp.arange(B), w.anchor + w.step
    variables = {"params": weights.params}
    token_B = tokens_BxT[rows, jnp.minimum(position_B + 1, T - 1)]
    hidden_BxD = jnp.where((w.step == 0)[:, None], prefix.hidden[rows, w.anchor], w.hidden)
    inputs = tuple(x[:, None, None] for x in (weights.embedding[token_B], hidden_BxD, position_B))
    slots = jnp.arange(w.context[0].values.shape[2])
    own_BxS = (slots > T) & (slots < T + w.step[:, None])
    text_BxS = slots < (w.anchor + (w.step > 0))[:, None]  # an anchor's own key is computed once more
    visible_BxWxS = (text_BxS | own_BxS)[:, None]
    hidden, new = drafter.apply(variables, *inputs, w.context, visible_BxWxS)
    context = kv_cache.write(w.context, kv_cache.as_prefix(new), T + w.step)
    logits = drafter.apply(variables, hidden, method="logits")
    return hidden[:, 0, 0], context, weights.vocab[likeliest(logits)][:, 0, 0]


@functools.partial(jax.jit, static_argnames=("drafter", "shape"))
def _simulate_trees(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    end_B: jax.Array,
    shape: Shape,
) -> Rounds:
    """`simulate` with any shape: a whole tree for every round."""
    B, T = tokens_BxT.shape
    rows, depth = jnp.arange(B), shape.depth
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)
    keys_B = jax.random.split(jax.random.key(0), B)  # unused at temperature 0

    def round_(carry: tuple[jax.Array, jax.Array, Rounds]) -> tuple[jax.Array, jax.Array, Rounds]:
        number_B, anchor_B, rounds = carry
        live_B, left_B = anchor_B + 2 < end_B, end_B - anchor_B - 2
        start = text_starts(prefix, tokens_BxT, jnp.minimum(anchor_B, T - 2)[:, None])
        draft = tree.draft(drafter, weights, prefix.keys_values, start, shape, GREEDY, keys_B)

        def ahead(step: jax.Array, _: jax.Array) -> jax.Array:
            token_B = tokens_BxT[rows, jnp.minimum(anchor_B + 2 + step, T - 1)]
            return jnp.where(step < left_B, token_B, -1)

        accepted_B = verify.walk(draft, depth, live_B, ahead).accepted
        emitted_B = jnp.minimum(accepted_B + 1, left_B)
        found = Rounds(emitted_B, accepted_B, jnp.minimum(depth, left_B))
        at_B = jnp.where(live_B, number_B, T)  # T: outside, dropped
        rounds = jax.tree.map(lambda all_, new: all_.at[rows, at_B].set(new, mode="drop"), rounds, found)
        return number_B + live_B, anchor_B + jnp.where(live_B, emitted_B, 0), rounds

    zeros = jnp.zeros((B, T), jnp.int32)
    begin = (jnp.zeros(B, jnp.int32), start_B - 1, Rounds(zeros, zeros - 1, zeros))
    return jax.lax.while_loop(lambda c: jnp.any(c[1] + 2 < end_B), round_, begin)[-1]


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

    def given(step: int) -> tuple[jax.Array, jax.Array]:
        position_BxA = anchors_BxA + 2 + step
        token_BxA = jnp.take_along_axis(tokens_BxT, jnp.minimum(position_BxA, T - 1), 1)
        return token_BxA, position_BxA < end_B[:, None]

    def choose(_: int, hidden: jax.Array, logits_BxLx1xN: jax.Array, given: tuple[jax.Array, jax.Array]):
        token_BxL, inside_BxL = given
        draft_BxL = jnp.minimum(jnp.searchsorted(weights.vocab, token_BxL), N - 1)
        possible_BxL = (weights.vocab[draft_BxL] == token_BxL) & inside_BxL
        logp = jax.nn.log_softmax(logits_BxLx1xN[:, :, 0])
        logp_BxL = jnp.take_along_axis(logp, draft_BxL[..., None], -1)[..., 0]
        return token_BxL[..., None], jnp.where(possible_BxL, jnp.exp(logp_BxL), 0.0)[..., None]

    repeated = window_pass(drafter, weights, prefix.keys_values, start, choose, window, given)[:, :, 0]
    return jnp.cumprod(repeated, -1).sum(-1)
