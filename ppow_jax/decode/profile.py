"""How far drafts of any shape would be accepted on texts that the target wrote greedily.

One pass of a beam over all positions of the texts tells of every position how many tokens a tree must have
for each next token of the text to be in it. From that the rounds of every smaller tree follow exactly, but
for candidates that rounding alone parts: the beam is drafted for many anchors at once here, and for one in
decoding.

Shape letters: B texts, T positions, A anchors, K levels of a tree, Q candidates, C taps width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode import tree
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import Start, text_prefix, text_starts

NEVER = np.iinfo(np.int32).max
_AT_ONCE = 16  # anchors of a text


class Texts(NamedTuple):
    """Texts that the target wrote greedily.

    Attributes:
      taps: `[B, T, C]`, the target's taps on them.
      tokens: int32 `[B, T]`.
      start: int32 `[B]`, position of the response's first token.
      end: int32 `[B]`, position after its last.
    """

    taps: jax.Array
    tokens: jax.Array
    start: np.ndarray
    end: np.ndarray


class Profile(NamedTuple):
    """What a beam of one width finds.

    Attributes:
      needed: int32 `[B, A, K, K]`: at an anchor (the first is the position before the response), for trees
        of at most i + 1 levels, the tokens that a tree must have to hold the text's next j + 1 tokens;
        `NEVER` where none does.
      start, end: as in `Texts`.
    """

    needed: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def tau(self, tokens: int, depth: int) -> float:
        """Tokens a verification pass, of trees of `tokens` tokens and `depth` levels."""
        accepted_BxA = (self.needed[:, :, depth - 1, :depth] <= tokens).cumprod(-1).sum(-1)
        emitted = rounds = 0
        for accepted_A, start, end in zip(
            accepted_BxA.tolist(), self.start.tolist(), self.end.tolist(), strict=True
        ):
            anchor = start - 1
            while anchor + 2 < end:
                step = min(accepted_A[anchor - start + 1] + 1, end - anchor - 2)
                anchor, emitted, rounds = anchor + step, emitted + step, rounds + 1
        return emitted / max(1, rounds)


def measure(drafter: Drafter, weights: DrafterWeights, texts: Texts, depth: int, top_k: int) -> Profile:
    """The profile of a beam of `top_k` on `depth` levels; with top_k 1 it is a chain's."""
    start, end = np.asarray(texts.start), np.asarray(texts.end)
    anchors = -(-int((end - start).max()) // _AT_ONCE) * _AT_ONCE
    needed = _needed(drafter, weights, texts.taps, texts.tokens, start, end, anchors, depth, top_k)
    return Profile(np.asarray(needed), start, end)


@functools.partial(jax.jit, static_argnames=("drafter", "anchors", "depth", "top_k"))
def _needed(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    end_B: jax.Array,
    anchors: int,
    depth: int,
    top_k: int,
) -> jax.Array:
    T = tokens_BxT.shape[1]
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)

    def at(anchor_Bx1: jax.Array) -> jax.Array:
        """int32 `[B, K, K]` of one anchor a text."""
        start: Start = text_starts(prefix, tokens_BxT, anchor_Bx1)
        found = tree.candidates(drafter, weights, prefix.keys_values, start, depth, top_k, GREEDY)
        ahead_BxK = anchor_Bx1 + 2 + jnp.arange(depth)
        text_BxK = jnp.take_along_axis(tokens_BxT, jnp.minimum(ahead_BxK, T - 1), 1)
        real_BxK = ahead_BxK < end_B[:, None]
        return jax.vmap(functools.partial(_way, top_k=top_k))(found, text_BxK, real_BxK)

    anchors_AxBx1 = jnp.minimum(jnp.arange(anchors)[:, None] + start_B - 1, T - 2)[..., None]
    needed = jax.lax.map(at, anchors_AxBx1, batch_size=_AT_ONCE)
    return needed.swapaxes(0, 1)


def _way(found: tree.Candidates, text_K: jax.Array, real_K: jax.Array, top_k: int) -> jax.Array:
    """int32 `[K, K]` of one anchor: see `Profile.needed`."""
    depth, Q = len(text_K), len(found.tokens)
    ends = top_k + top_k**2 * jnp.arange(depth)  # candidates of trees of 1, 2, ... levels
    number, here, rows = jnp.arange(Q), jnp.int32(0), []
    for level in range(depth):
        holds = (found.parents == here) & (found.tokens == text_K[level])
        node = jnp.argmax(holds)
        on_the_way = holds.any() & real_K[level]
        score = found.scores[node]
        better_M = (found.scores > score) | ((found.scores == score) & (number < node))
        before_D = jnp.cumsum(better_M)[ends - 1]
        rows.append(jnp.where(on_the_way & (jnp.arange(depth) >= level), 2 + before_D, NEVER))
        here = jnp.where(on_the_way, 1 + node, -1)
    return jnp.stack(rows, 1).astype(jnp.int32)
