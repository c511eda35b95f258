"""Decoding simulated on text that the target wrote: exact, and without the target.

Walk the text: draft from the anchor, compare with the text, jump. A chain is accepted as far as it repeats
the text, so it need not be drafted beyond its first mistake, and no row waits for another: one drafter step
for every token. Trees are drafted whole. The rounds are those of `decode.loop` with the same drafter.

Above temperature 0 the text is a sample of the target. Speculative sampling emits x as an accepted draft with
probability min(P(x), q(x)), and as the target's own token with probability P(x) - min(P(x), q(x)). So of a
token x that the target sampled a share of min(1, q(x) / P(x)) are accepted drafts, whatever comes after it.
Draws with these chances along the text give rounds that are distributed as those of decoding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode import tree, verify
from ppow_jax.decode.sampling import GREEDY, Sampling, log_probs
from ppow_jax.decode.shapes import Shape, chain
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import Prefix, text_prefix, text_starts, window_pass
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import Cache
from ppow_jax.models.layers import at_ids, draft_ids, likeliest
from ppow_jax.models.target import Target
from ppow_jax.models.target_outputs import log_prob_of_next

_WHOLE = Sampling(1.0)


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


class Sampled(NamedTuple):
    """How the target sampled the texts, and what decides whether a token counts as an accepted draft.

    Attributes:
      log_prob: float32 `[B, T]`, log P of each token of the texts; at those of the prompt it is not read.
      uniform: float32 `[B, T]`, drawn from [0, 1), one a token. The same for two drafters: their difference
        varies less.
    """

    log_prob: jax.Array
    uniform: jax.Array


@functools.partial(jax.jit, static_argnames=("target", "sampling"))
def sampled_texts(
    target: Target,
    params: dict,
    hidden_BxTxD: jax.Array,
    tokens_BxT: jax.Array,
    sampling: Sampling,
    key: jax.Array,
) -> Sampled:
    """Of texts that the target sampled, by its final hidden states on them."""
    of = functools.partial(log_probs, sampling=sampling)
    log_prob_BxT = log_prob_of_next(target, params, hidden_BxTxD, tokens_BxT, of)
    return Sampled(jnp.roll(log_prob_BxT, 1, 1), jax.random.uniform(key, tokens_BxT.shape))


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
    sampled: Sampled | None = None,
    sampling: Sampling = GREEDY,
) -> Rounds:
    """Rounds of decoding over responses.

    Args:
      drafter: the module.
      weights: its weights.
      taps_BxTxC: the target's taps on the texts.
      tokens_BxT: the texts, the target's beyond `start`: greedy, or sampled.
      start_B: position of the first token of the response (prefill emits that one).
      end_B: position after its last token, stop token included.
      shape: of the drafts.
      sampled, sampling: of texts that were sampled, how. The drafter is sampled likewise.

    Raises:
      ValueError: another shape than a chain, for texts that were sampled.
    """
    inputs = (drafter, weights, taps_BxTxC, tokens_BxT, start_B, end_B)
    if shape == chain(shape.depth):
        return _simulate_chain(*inputs, shape.depth, sampled, sampling)
    if sampled is not None:
        raise ValueError(f"found {shape} for sampled texts, expected a chain")
    return _simulate_trees(*inputs, shape)


@functools.partial(jax.jit, static_argnames=("drafter", "window", "sampling"))
def _simulate_chain(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    end_B: jax.Array,
    window: int,
    sampled: Sampled | None,
    sampling: Sampling,
) -> Rounds:
    """`simulate` of windows that are drafted as far as they are right."""
    B, T = tokens_BxT.shape
    rows = jnp.arange(B)
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)

    def walk(w: _Walk) -> _Walk:
        hidden_BxD, context, logits_BxN = _draft(drafter, weights, prefix, tokens_BxT, w)
        says_B = w.anchor + w.step + 2  # the position of the token that was drafted
        alive_B, left_B = says_B < end_B, end_B - w.anchor - 2
        here = rows, jnp.minimum(says_B, T - 1)
        if sampled is None:
            agrees_B = weights.vocab[likeliest(logits_BxN)] == tokens_BxT[here]
        else:
            drafted_B = _log_prob_of(logits_BxN, weights.vocab, tokens_BxT[here], sampling)
            agrees_B = sampled.uniform[here] < jnp.exp(drafted_B - sampled.log_prob[here])
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
    """One step of each row's window along the text: hidden state `[B, D]`, context, logits `[B, N]`."""
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
    return hidden[:, 0, 0], context, logits[:, 0, 0]


def _log_prob_of(logits: jax.Array, vocab_N: jax.Array, tokens: jax.Array, sampling: Sampling) -> jax.Array:
    """float32 `[...]`: the drafter's log-probabilities of target ids, from its logits `[..., N]`; -inf
    outside the draft vocabulary."""
    ids, inside = draft_ids(vocab_N, tokens)
    return jnp.where(inside, at_ids(log_probs(logits, sampling), ids), -jnp.inf)


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


@functools.partial(jax.jit, static_argnames=("drafter", "window", "sampling"))
def expected_accepted(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    end_B: jax.Array,
    anchors_BxA: jax.Array,
    window: int,
    log_prob_BxT: jax.Array | None = None,
    sampling: Sampling = _WHOLE,
) -> jax.Array:
    """Expected accepted length of windows *sampled* from the drafter, float32 `[B, A]`.

    If the text is the target's greedy one, a window is accepted as far as it repeats the text:
    E[k] = sum over j of the product over i <= j of q(x_i | x_<i), which one teacher-forced pass gives. Along
    a text that the target sampled the factors are min(1, q / P), and the mean over texts is exact.

    Args:
      drafter, weights, taps_BxTxC, tokens_BxT, end_B, window: as in `simulate`.
      anchors_BxA: int32; text beyond `end` counts as refused.
      log_prob_BxT: `Sampled.log_prob`; None: the text is greedy.
      sampling: of the drafter, and of the text if it was sampled.
    """
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)
    start = text_starts(prefix, tokens_BxT, anchors_BxA)
    T = tokens_BxT.shape[1]
    target_BxT = jnp.zeros(tokens_BxT.shape) if log_prob_BxT is None else log_prob_BxT

    def given(step: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        position_BxA = anchors_BxA + 2 + step
        at_BxA = jnp.minimum(position_BxA, T - 1)
        token_BxA, target_BxA = (jnp.take_along_axis(x, at_BxA, 1) for x in (tokens_BxT, target_BxT))
        return token_BxA, target_BxA, position_BxA < end_B[:, None]

    def choose(_: int, hidden: jax.Array, logits_BxLx1xN: jax.Array, given: tuple[jax.Array, ...]):
        token_BxL, target_BxL, inside_BxL = given
        drafted_BxL = _log_prob_of(logits_BxLx1xN[:, :, 0], weights.vocab, token_BxL, sampling)
        chance_BxL = jnp.exp(jnp.minimum(drafted_BxL - target_BxL, 0.0))
        return token_BxL[..., None], jnp.where(inside_BxL, chance_BxL, 0.0)[..., None]

    accepted = window_pass(drafter, weights, prefix.keys_values, start, choose, window, given)[:, :, 0]
    return jnp.cumprod(accepted, -1).sum(-1)
