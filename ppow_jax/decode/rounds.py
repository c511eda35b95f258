"""Rounds of decoding as lists of tokens, to be read: of texts that are there already, or as they are decoded.

Shape letters: B rows, T text positions, A anchors, K window, C taps width.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode.profile import Texts
from ppow_jax.decode.watching import Watched
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import greedy, text_prefix, text_starts, window_pass
from ppow_jax.parallel import processes


class Node(NamedTuple):
    """A drafted token.

    Attributes:
      token: its id.
      parent: the number of the node that it follows, from 0; -1: it follows the last token known before.
      drafter, target: log-probability after that node; None: not asked for, or nobody gives one.
    """

    token: int
    parent: int
    drafter: float | None = None
    target: float | None = None


class Round(NamedTuple):
    """A verification pass.

    Attributes:
      drafted: token ids of the branch that the text took and, behind what was accepted, of what the drafter
        finds likeliest; of a chain all. At most as many as there is text to compare them with.
      accepted: how many of them were kept.
      own: the token that the target added; none where the text ended with an accepted one.
      nodes: all that was drafted, parents before their children; none unless the round was watched.
    """

    drafted: list[int]
    accepted: int
    own: list[int]
    nodes: tuple[Node, ...] = ()

    @property
    def tokens(self) -> list[int]:
        """Of the text."""
        return self.drafted[: self.accepted] + self.own


def seen(watched: Watched, row: int) -> Round:
    """What those who watch are told of a row, as a round."""
    tokens, parents = watched.drafted[row].tolist(), watched.parents[row].tolist()
    kept = watched.tokens[row, : watched.kept[row]].tolist()
    accepted = min(int(watched.accepted[row]), len(kept))
    branch = watched.nodes[row, 1 : accepted + 1].tolist()
    own = kept[accepted:]
    if own:
        branch += _likeliest(tokens, parents, branch[-1] if branch else 0)
    return Round([tokens[n] for n in branch], accepted, own, _nodes(watched, row))


def _likeliest(tokens: list[int], parents: list[int], node: int) -> list[int]:
    """The nodes below a node, always the first child: the likeliest in every kind of tree."""
    found: list[int] = []
    while True:
        below = (n for n in range(1, len(tokens)) if parents[n] == node and tokens[n] >= 0)
        node = next(below, 0)
        if not node:
            return found
        found.append(node)


def _nodes(watched: Watched, row: int) -> tuple[Node, ...]:
    tokens, parents = watched.drafted[row].tolist(), watched.parents[row].tolist()
    scores = []
    for log_probs in (watched.drafter_log_probs, watched.target_log_probs):
        found = [None] * len(tokens) if log_probs is None else log_probs[row].tolist()
        scores.append([None if value is None or math.isnan(value) else value for value in found])
    about = zip(tokens[1:], parents[1:], scores[0][1:], scores[1][1:], strict=True)
    return tuple(Node(token, parent - 1, *of) for token, parent, *of in about)


def rounds_of(
    drafter: Drafter, weights: DrafterWeights, texts: Texts, window: int, tokens: int
) -> list[list[Round]]:
    """The rounds of decoding with a chain that begin within the first `tokens` tokens of each response.

    Windows are drafted from all of these tokens at once, of which decoding then picks its anchors: the rounds
    are those of `simulate`, but for candidates that rounding alone parts.
    """
    drafted = processes.host(_draft(drafter, weights, texts.taps, texts.tokens, texts.start, tokens, window))
    known, start, end = processes.host((texts.tokens, texts.start, texts.end))
    return [
        _walk(drafted[row], known[row], int(start[row]), int(end[row]), tokens) for row in range(len(known))
    ]


@functools.partial(jax.jit, static_argnames=("drafter", "anchors", "window"))
def _draft(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    start_B: jax.Array,
    anchors: int,
    window: int,
) -> jax.Array:
    """int32 `[B, A, K]`: windows from the position before the response on."""
    prefix = text_prefix(drafter, weights, taps_BxTxC, tokens_BxT)
    last = tokens_BxT.shape[1] - 2
    anchors_BxA = jnp.minimum(start_B[:, None] - 1 + jnp.arange(anchors), last)
    start = text_starts(prefix, tokens_BxT, anchors_BxA)
    about = (drafter, weights, prefix.keys_values, start)
    return window_pass(*about, greedy(weights.vocab), window)[:, :, 0]


def _walk(drafted_AxK: np.ndarray, tokens_T: np.ndarray, start: int, end: int, tokens: int) -> list[Round]:
    """The rounds of one text."""
    rounds, anchor = [], start - 1
    while anchor + 2 < end and anchor - start + 1 < tokens:
        text = tokens_T[anchor + 2 : end].tolist()
        window = drafted_AxK[anchor - start + 1, : len(text)].tolist()
        accepted = 0
        while accepted < len(window) and window[accepted] == text[accepted]:
            accepted += 1
        own = text[accepted : accepted + 1]
        rounds.append(Round(window, accepted, own))
        anchor += accepted + len(own)
    return rounds
