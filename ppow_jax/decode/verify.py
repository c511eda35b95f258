"""Which drafted tokens the target keeps, without changing what it writes.

The drafted tokens form a tree whose root is the last known token. At every node that the text reaches the
next token is drawn, and if a child holds that token the text goes on there. Where candidates follow from the
text alone (all of temperature 0, dynamic trees, n-grams) the token is drawn from the target's own
distribution, so nothing that is drafted can matter. Candidates that were themselves drawn are accepted one
after another with probability min(1, P / Q), P giving way to what is left of it after every refusal: that is
the distribution `emission_law`, and averaged over the candidates it is the target's (speculative sampling:
Leviathan et al. 2023, Chen et al. 2023; several candidates without replacement: Jeon et al. 2024, arXiv
2402.14160, and Yang et al. 2024, arXiv 2401.06706).

Shape letters: B rows, J nodes of a tree, M tokens that a round emits at most, one more than the tree
is deep, V vocabulary, N draft vocabulary, Q candidates.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Drawn(NamedTuple):
    """The distributions that a tree's tokens were drawn from, each node's children one after another without
    replacement.

    Attributes:
      log_probs: float32 `[B, I, N]`, of the I nodes that have children.
      row: int32 `[J]`, which of the I a node is; anything where it has no children.
      children: int32 `[J, Q]`, the nodes below each, in the order in which they were drawn; then -1.
      vocab: int32 `[N]`, target ids of the draft ids.
    """

    log_probs: jax.Array
    row: jax.Array
    children: jax.Array
    vocab: jax.Array


class Draft(NamedTuple):
    """What the target is to verify in a pass: a tree; node 0 is the last known token.

    Attributes:
      tokens: int32 `[B, J]`.
      parents: int32 `[B, J]`, below the node's own number; 0 for node 0.
      drawn: None where the tree follows from the text alone.
      log_probs: float32 `[B, J]`, the drafter's of each token after its parent (`sampling.log_probs`), 0 at
        node 0; None where no distribution proposes. Only those who watch read it; in a program that does not,
        the compiler leaves it out.
    """

    tokens: jax.Array
    parents: jax.Array
    drawn: Drawn | None = None
    log_probs: jax.Array | None = None


class Walk(NamedTuple):
    """The way that the text took through a tree.

    Attributes:
      nodes: int32 `[B, M]`, from the root, 0 beyond the last one.
      tokens: int32 `[B, M]`, what came after each of these nodes; 0 beyond.
      accepted: int32 `[B]`, drafted tokens that were kept: the round's tokens are one more.
    """

    nodes: jax.Array
    tokens: jax.Array
    accepted: jax.Array


def ancestors(parents_BxJ: jax.Array, depth: int) -> jax.Array:
    """bool `[B, J, J]`: whether the second node is the first one or above it; trees of at most this depth."""
    own = jnp.eye(parents_BxJ.shape[1], dtype=bool)[None]
    above = jnp.broadcast_to(own, (*parents_BxJ.shape, parents_BxJ.shape[1]))
    for _ in range(depth):
        above = own | jnp.take_along_axis(above, parents_BxJ[..., None], 1)
    return above


# (step [], node [B]) -> the token [B] that comes after that node, which is `step` deep
Choose = Callable[[jax.Array, jax.Array], jax.Array]


def walk(draft: Draft, depth: int, live_B: jax.Array, choose: Choose) -> Walk:
    """Walks down the trees of the rows that are `live`.

    Args:
      draft: the trees.
      depth: M - 1, of the deepest node.
      live_B: bool; the other rows accept nothing.
      choose: says what the text is.
    """
    B, J = draft.tokens.shape
    rows = jnp.arange(B)

    def step(carry: tuple) -> tuple:
        s, here_BxJ, live_B, found = carry
        node_B = jnp.argmax(here_BxJ, 1).astype(jnp.int32)
        token_B = choose(s, node_B)
        # nodes of the same tokens may be there twice: all of them are `here`
        below_BxJ = jnp.take_along_axis(here_BxJ, draft.parents, 1).at[:, 0].set(False)
        below_BxJ &= (draft.tokens == token_B[:, None]) & live_B[:, None]
        on_B = below_BxJ.any(1)
        found = Walk(
            found.nodes.at[rows, s].set(jnp.where(live_B, node_B, 0)),
            found.tokens.at[rows, s].set(jnp.where(live_B, token_B, 0)),
            found.accepted + on_B,
        )
        return s + 1, below_BxJ, on_B, found

    root_BxJ = jnp.broadcast_to(jnp.arange(J) == 0, (B, J))
    zeros = jnp.zeros((B, depth + 1), jnp.int32)
    blank = Walk(zeros, zeros, jnp.zeros(B, jnp.int32))
    going = lambda carry: carry[2].any() & (carry[0] <= depth)  # noqa: E731
    return jax.lax.while_loop(going, step, (jnp.int32(0), root_BxJ, live_B, blank))[-1]


def emission_probs(target_V: jax.Array, draft_V: jax.Array, drawn_C: jax.Array) -> jax.Array:
    """Probabilities `[V]` of the next token, given the candidates that were drawn.

    Args:
      target_V: P.
      draft_V: Q, which the first candidate was drawn from, the second from what it leaves, and so on.
      drawn_C: int32; -1 is no candidate, one that could not have been drawn is as good as none.
    """

    def refuse(carry: tuple, token: jax.Array) -> tuple[tuple, None]:
        emitted_V, left, p_V, q_V = carry
        real = (token >= 0) & (q_V[token] > 0)
        accept = jnp.where(real, jnp.minimum(1.0, p_V[token] / jnp.where(real, q_V[token], 1.0)), 0.0)
        emitted_V = emitted_V.at[token].add(left * accept)
        rest_V, others_V = jnp.maximum(p_V - q_V, 0.0), q_V.at[token].set(0.0)
        p_V = jnp.where(real, _normed(rest_V, p_V), p_V)
        q_V = jnp.where(real, _normed(others_V, others_V), q_V)
        return (emitted_V, left * (1 - accept), p_V, q_V), None

    begin = (jnp.zeros_like(target_V), jnp.float32(1), target_V, draft_V)
    (emitted_V, left, p_V, _), _ = jax.lax.scan(refuse, begin, drawn_C)
    return emitted_V + left * p_V


def _normed(x: jax.Array, otherwise: jax.Array) -> jax.Array:
    """x divided by its sum, unless that is 0."""
    total = x.sum()
    return jnp.where(total > 0, x / jnp.where(total > 0, total, 1.0), otherwise)


def offered_after(
    drawn: Drawn, tokens_BxJ: jax.Array, node_B: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array]:
    """What `emission_probs` wants of drawn candidates after a node: Q `[B, V]` and the tokens `[B, Q]`."""
    rows = jnp.arange(len(node_B))
    q_BxN = jnp.exp(drawn.log_probs[rows, drawn.row[node_B]])
    q_BxV = jnp.zeros((len(rows), vocab_size)).at[:, drawn.vocab].set(q_BxN)
    below_BxQ = drawn.children[node_B]
    return q_BxV, jnp.where(below_BxQ >= 0, tokens_BxJ[rows[:, None], below_BxQ], -1)


def emitted(
    tokens_BxM: jax.Array, accepted_B: jax.Array, room_B: jax.Array, stops: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """How many of a round's tokens are kept, and whether the text ends with them.

    Args:
      tokens_BxM: the first `accepted + 1` are the round's.
      accepted_B: drafted tokens that were kept.
      room_B: tokens that may still be emitted.
      stops: ids that end the text; the first of them is emitted, nothing after it.

    Returns:
      int32 `[B]` count (at most accepted + 1) and bool `[B]` stopped.
    """
    is_stop = jnp.isin(tokens_BxM, jnp.asarray(stops))
    until_stop = accepted_prefix(~is_stop) + 1
    count = jnp.minimum(jnp.minimum(accepted_B + 1, until_stop), room_B)
    stopped = (until_stop <= count) | (count == room_B)
    return count, stopped


def accepted_prefix(matches_xK: jax.Array) -> jax.Array:
    """Length of the leading run of True along the last axis, int32."""
    return jnp.cumprod(matches_xK.astype(jnp.int32), axis=-1).sum(-1)
