"""The target's verdict on drafted windows in training: all windows of a text in one forward.

Shape letters: B rows, T text positions, W windows of a row (anchors x group), K window, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models.cache import Cache
from ppow_jax.models.target import Target
from ppow_jax.windows import target_window_pass


class WindowScores(NamedTuple):
    """The target on drafted windows; zeros for windows that were not asked for.

    Attributes:
      log_prob: float32 `[B, W, K]`, log P of each drafted token given the text and the tokens before it.
      tempered: the same at the verification temperature.
      context: `[B, W, K, D]`, the final hidden states that predict these tokens.
    """

    log_prob: jax.Array
    tempered: jax.Array
    context: jax.Array


def score_windows(
    target: Target,
    params: dict,
    text: Cache,
    hidden_BxTxD: jax.Array,
    anchors_BxW: jax.Array,
    tokens_BxWxK: jax.Array,
    needed_BxW: jax.Array,
    chunk: int,
    temperature: float,
) -> WindowScores:
    """Scores the windows that are needed, `chunk` a row at a time, and skips the others.

    The number of chunks is that of the fullest row: a loop with a dynamic trip count, so that the cost
    follows the need while all shapes stay static.

    Args:
      target: the module.
      params: its parameters.
      text: the cache of the texts.
      hidden_BxTxD: their final hidden states.
      anchors_BxW: the anchor of each window.
      tokens_BxWxK: drafted target ids.
      needed_BxW: bool.
      chunk: divides W.
      temperature: of verification; 0 counts as 1.
    """
    B, W, K = tokens_BxWxK.shape
    order_BxW = jnp.argsort(~needed_BxW, axis=1, stable=True)
    chunks = -(-needed_BxW.sum(1).max() // chunk)
    rows = jnp.arange(B)[:, None]

    def body(carry: tuple[jax.Array, WindowScores]) -> tuple[jax.Array, WindowScores]:
        i, scores = carry
        picked_BxC = jax.lax.dynamic_slice_in_dim(order_BxW, i * chunk, chunk, axis=1)
        anchors = jnp.take_along_axis(anchors_BxW, picked_BxC, 1)
        tokens = jnp.take_along_axis(tokens_BxWxK, picked_BxC[..., None], 1)
        context = jnp.take_along_axis(hidden_BxTxD, anchors[..., None] + 1, 1)[:, :, None]
        if K > 1:
            ahead = target_window_pass(target, params, text, anchors, tokens[..., :-1])
            context = jnp.concatenate([context, ahead], 2)
        logits = target.apply({"params": params}, context, method=Target.logits)
        law = lambda t: jnp.take_along_axis(  # noqa: E731
            jax.nn.log_softmax(logits / t), tokens[..., None], -1
        )[..., 0]
        raw = law(1.0)
        found = WindowScores(raw, raw if temperature in (0.0, 1.0) else law(temperature), context)
        put = lambda all_, new: all_.at[rows, picked_BxC].set(new)  # noqa: E731
        return i + 1, jax.tree.map(put, scores, found)

    blank = jnp.zeros((B, W, K))
    empty = WindowScores(blank, blank, jnp.zeros((B, W, K, hidden_BxTxD.shape[-1]), hidden_BxTxD.dtype))
    return jax.lax.while_loop(lambda c: c[0] < chunks, body, (jnp.int32(0), empty))[1]
