"""The windows that a drafter drafts along texts that the target wrote greedily, token by token, to be read.

Shape letters: B rows, T text positions, A anchors, K window, C taps width.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode.profile import Texts
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import greedy, text_prefix, text_starts, window_pass
from ppow_jax.parallel import processes


class Round(NamedTuple):
    """A verification pass of a chain.

    Attributes:
      drafted: token ids, as many as there is text to compare them with.
      accepted: how many of them were kept.
      own: the token that the target added; none where the text ended with an accepted one.
    """

    drafted: list[int]
    accepted: int
    own: list[int]


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
