"""Drafting trees with an EAGLE-3 drafter.

Shape letters: B rows, J nodes, W windows that are continued on a level, Q candidates, N draft
vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.decode.sampling import Sampling, log_probs
from ppow_jax.decode.shapes import Dynamic, Fixed, Shape
from ppow_jax.decode.verify import Draft, Drawn
from ppow_jax.drafters import windows
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import Start, Windows
from ppow_jax.models.cache import Cache
from ppow_jax.models.layers import likeliest


def draft(
    drafter: Drafter,
    weights: DrafterWeights,
    prefix: Cache,
    start: Start,
    shape: Shape,
    sampling: Sampling,
    keys_B: jax.Array,
) -> Draft:
    """Drafts a tree from one anchor a row.

    At temperature 0 the tree follows from the text. Above it a fixed shape is filled with draws from the
    drafter's distribution at the same temperature, top-k and top-p; dynamic trees hold the likeliest tokens
    of that distribution.

    Args:
      drafter, weights, prefix: as in `windows.begin`.
      start: the anchors `[B, 1]`.
      shape: of the trees.
      sampling: how the target's tokens will be picked.
      keys_B: random keys for this round.
    """
    if isinstance(shape, Dynamic):
        return _dynamic(drafter, weights, prefix, start, shape, sampling)
    return _fixed(drafter, weights, prefix, start, shape, sampling, keys_B)


def _logits(drafter: Drafter, weights: DrafterWeights, at: Windows) -> jax.Array:
    """float32 `[B, W, N]`."""
    return drafter.apply({"params": weights.params}, at.hidden[:, :, 0], method="logits")


def _fixed(
    drafter: Drafter,
    weights: DrafterWeights,
    prefix: Cache,
    start: Start,
    shape: Fixed,
    sampling: Sampling,
    keys_B: jax.Array,
) -> Draft:
    B, sampled = len(keys_B), sampling.temperature > 0
    parents, ranks = shape.parents, (0, *(path[-1] for path in shape.paths))
    if sampled:  # a second draw is worth something only beside the first
        ranks = (0, *(shape.children[parents[n]].index(n) for n in range(1, shape.tokens)))
    tokens, row = [start.token[:, 0]], [0] * shape.tokens
    scores = [jnp.zeros(B)]
    log_qs: list[jax.Array] = []
    at, inner = windows.begin(drafter, weights, prefix, start), [0]  # the nodes that are continued
    for depth in range(1, shape.depth + 1):
        if depth > 1:
            continued = [n for n in shape.level(depth - 1) if n in parents]
            if len(continued) > 1 or len(inner) > 1:
                where = jnp.array([inner.index(parents[n]) for n in continued])
                at = windows.branch(at, jnp.broadcast_to(where, (B, len(where))))
            inner = continued
            read = jnp.stack([tokens[n] for n in inner], 1)
            at = windows.advance(drafter, weights, prefix, at, read)
        level = shape.level(depth)
        logits_BxWxN = _logits(drafter, weights, at)
        log_q_BxWxN = log_probs(logits_BxWxN, sampling)
        if sampled:
            for n in inner:
                row[n] = sum(log_q.shape[1] for log_q in log_qs) + inner.index(n)
            log_qs.append(log_q_BxWxN)
            logits_BxWxN = log_q_BxWxN + _noise(keys_B, inner, logits_BxWxN)
        best_BxWxQ = _best(logits_BxWxN, 1 + max(ranks[n] for n in level))
        for n in level:
            above = inner.index(parents[n])
            best_B = best_BxWxQ[:, above, ranks[n]]
            tokens.append(weights.vocab[best_B])
            scores.append(jnp.take_along_axis(log_q_BxWxN[:, above], best_B[:, None], 1)[:, 0])
    drawn = None
    if sampled:
        log_q_BxJxN = jnp.concatenate(log_qs, 1)
        drawn = Drawn(log_q_BxJxN, jnp.array(row), jnp.array(shape.children), weights.vocab)
    parents_BxJ = jnp.broadcast_to(jnp.array(parents), (B, shape.tokens))
    return Draft(jnp.stack(tokens, 1), parents_BxJ, drawn, jnp.stack(scores, 1))


def _noise(keys_B: jax.Array, nodes: list[int], like_BxWxN: jax.Array) -> jax.Array:
    """Gumbel noise for each node: the largest sums are draws without replacement, in their order."""
    shape, dtype = like_BxWxN.shape[2:], like_BxWxN.dtype
    one = lambda key, node: jax.random.gumbel(jax.random.fold_in(key, node), shape, dtype)  # noqa: E731
    of_row = jax.vmap(one, (None, 0))
    return jax.vmap(of_row, (0, None))(keys_B, jnp.array(nodes))


def _best(values_BxWxN: jax.Array, count: int) -> jax.Array:
    """int32 `[B, W, count]`: where the largest values are, in their order."""
    return likeliest(values_BxWxN)[..., None] if count == 1 else jax.lax.top_k(values_BxWxN, count)[1]


class Candidates(NamedTuple):
    """All nodes that a dynamic tree picks from, level by level; the root is not among them.

    Attributes:
      tokens: int32 `[B, Q]`, `top_k` of level 1, then `top_k ** 2` a level.
      parents: int32 `[B, Q]`, 0 is the root and i + 1 candidate i.
      scores: float32 `[B, Q]`, cumulative log-probability.
    """

    tokens: jax.Array
    parents: jax.Array
    scores: jax.Array


def candidates(
    drafter: Drafter,
    weights: DrafterWeights,
    prefix: Cache,
    start: Start,
    depth: int,
    top_k: int,
    sampling: Sampling,
) -> Candidates:
    """What a beam of `top_k` finds on `depth` levels."""
    B, k = len(start.token), top_k
    at = windows.begin(drafter, weights, prefix, start)
    score_BxW, chosen = jnp.zeros((B, 1)), jnp.zeros((B, 1), jnp.int32)  # of what is continued: score, number
    levels, count = [], 0
    for level in range(depth):
        logits_BxWxN = _logits(drafter, weights, at)
        best_BxWxQ, which_BxWxQ = jax.lax.top_k(log_probs(logits_BxWxN, sampling), k)
        scores = (score_BxW[..., None] + best_BxWxQ).reshape(B, -1)
        tokens = weights.vocab[which_BxWxQ].reshape(B, -1)
        levels.append(Candidates(tokens, jnp.repeat(chosen, k, 1), scores))
        if level + 1 < depth:
            score_BxW, on_BxW = jax.lax.top_k(scores, k)
            at = windows.repeat(at, k) if level == 0 else windows.branch(at, on_BxW // k)
            at = windows.advance(drafter, weights, prefix, at, jnp.take_along_axis(tokens, on_BxW, 1))
            chosen = 1 + count + on_BxW
        count += scores.shape[1]
    return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *levels)


def _dynamic(
    drafter: Drafter,
    weights: DrafterWeights,
    prefix: Cache,
    start: Start,
    shape: Dynamic,
    sampling: Sampling,
) -> Draft:
    tokens, parents, scores = candidates(drafter, weights, prefix, start, shape.depth, shape.top_k, sampling)
    # a node is no likelier than its parent and comes after it, so the best nodes are a tree
    best_BxJ = jnp.sort(jax.lax.top_k(scores, shape.tokens - 1)[1], 1)
    numbers = jnp.zeros((len(tokens), 1 + tokens.shape[1]), jnp.int32)
    own = jnp.arange(1, shape.tokens, dtype=jnp.int32)
    numbers = numbers.at[jnp.arange(len(tokens))[:, None], 1 + best_BxJ].set(own)
    take = lambda values, where: jnp.take_along_axis(values, where, 1)  # noqa: E731
    parents = jnp.pad(take(numbers, take(parents, best_BxJ)), ((0, 0), (1, 0)))
    scores_BxJ = jnp.pad(take(scores, best_BxJ), ((0, 0), (1, 0)))
    above_BxJ = take(scores_BxJ, parents)
    log_q_BxJ = jnp.where(jnp.isinf(scores_BxJ), scores_BxJ, scores_BxJ - above_BxJ)
    return Draft(jnp.concatenate([start.token, take(tokens, best_BxJ)], 1), parents, None, log_q_BxJ)
