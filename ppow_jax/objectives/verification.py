"""What the target accepts of a rollout, and how likely it finds the windows.

Shape letters: B rows, T text positions, A anchors, G windows a group, W = A G windows of a row, L some of
them, K window, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.drafters.windows import target_window_pass
from ppow_jax.models import blocks, target_outputs
from ppow_jax.models.cache import Cache
from ppow_jax.models.target import Target, head_at_hand
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import rewards
from ppow_jax.objectives.base import Batch, Models, along_text, written
from ppow_jax.objectives.rollout import Rollout
from ppow_jax.parallel import partition

_TOKENS = {"cpu": 512, "default": 8192}  # that a device scores at once


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
    rows, params = jnp.arange(B)[:, None], head_at_hand(target.config, params)

    def log_probs(context_BxLxKxD: jax.Array, tokens_BxLxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = target.apply({"params": params}, context_BxLxKxD, method=Target.logits)
        of = lambda t: jnp.take_along_axis(  # noqa: E731
            jax.nn.log_softmax(logits / t), tokens_BxLxK[..., None], -1
        )[..., 0]
        raw = of(1.0)
        return raw, raw if temperature in (0.0, 1.0) else of(temperature)

    def body(carry: tuple[jax.Array, WindowScores]) -> tuple[jax.Array, WindowScores]:
        i, scores = carry
        picked_BxL = jax.lax.dynamic_slice_in_dim(order_BxW, i * chunk, chunk, axis=1)
        anchors = jnp.take_along_axis(anchors_BxW, picked_BxL, 1)
        tokens = jnp.take_along_axis(tokens_BxWxK, picked_BxL[..., None], 1)
        context = jnp.take_along_axis(hidden_BxTxD, anchors[..., None] + 1, 1)[:, :, None]
        if K > 1:
            here = partition.in_turn(params, i)
            ahead = target_window_pass(target, here, text, anchors, tokens[..., :-1])
            context = jnp.concatenate([context, ahead], 2)
        values = partition.share(B, target.config.vocab_size) * chunk * K
        raw, tempered = blocks.mapped(log_probs, blocks.count(values, chunk), context, tokens)
        found = WindowScores(raw, tempered, context)
        put = lambda all_, new: all_.at[rows, picked_BxL].set(new)  # noqa: E731
        return i + 1, jax.tree.map(put, scores, found)

    blank = jnp.zeros((B, W, K))
    empty = WindowScores(blank, blank, jnp.zeros((B, W, K, hidden_BxTxD.shape[-1]), hidden_BxTxD.dtype))
    return jax.lax.while_loop(lambda c: c[0] < chunks, body, (jnp.int32(0), empty))[1]


class Verified(NamedTuple):
    """What the target says of sampled windows.

    Attributes:
      accepted: int32 `[B, A, G]`, k.
      valid: bool `[B, A, G, K]`, tokens that count.
      drafted, preferred: float32 `[B, A, G]`, log-likelihood under the target of each window and of the text
        in its place, over the tokens where both are; 0 where the target was not asked.
      context: `[B, A, G, K, D]`, the target's hidden states that predict each token; `[B, A, 1, K, D]`
        at temperature 0, where only the accepted prefix counts, and that is the text.
    """

    accepted: jax.Array
    valid: jax.Array
    drafted: jax.Array
    preferred: jax.Array
    context: jax.Array


class Continuation(NamedTuple):
    """What the texts themselves hold along the window of each anchor.

    Attributes:
      tokens: int32 `[B, A, 1, K]`.
      log_prob: float32 `[B, A, 1, K]`, log P of them.
      valid: bool `[B, A, 1, K]`, False from where the response ends.
      hidden: `[B, A, 1, K, D]`, the target's hidden states that predict them.
    """

    tokens: jax.Array
    log_prob: jax.Array
    valid: jax.Array
    hidden: jax.Array


def continuation(batch: Batch, outputs: TargetOutputs, rollout: Rollout) -> Continuation:
    """The texts along the windows of a rollout."""
    K = rollout.tokens.shape[-1]

    def along(values_BxT: jax.Array, first: int) -> jax.Array:
        return along_text(values_BxT, rollout.anchors, first, K)[:, :, None]

    valid = jnp.cumprod(written(batch, rollout.anchors, rollout.real, K), -1).astype(bool)
    return Continuation(
        along(batch["tokens"], 2), along(outputs.log_prob, 1), valid, along(outputs.hidden, 1)
    )


def verify(
    models: Models,
    batch: Batch,
    outputs: TargetOutputs,
    rollout: Rollout,
    key: jax.Array,
    temperature: float,
    scored: bool,
) -> Verified:
    """Verifies a rollout.

    At temperature 0 the texts are the target's greedy ones, so k follows from them, and the target runs only
    to score windows, those with k = 0 alone. Above 0 it runs for every window.

    Args:
      models, batch, outputs: as in `base.Objective.signal`.
      rollout: the windows.
      key: of this step.
      temperature: of verification.
      scored: whether the log-likelihoods of windows are asked for.
    """
    real = jnp.broadcast_to(rollout.real[..., None], rollout.tokens.shape[:3])
    cache = None
    if scored or temperature > 0:
        outputs, cache = target_outputs.read(models.target, models.target_params, batch["tokens"])
    text = continuation(batch, outputs, rollout)
    if temperature == 0:
        valid = jnp.broadcast_to(text.valid, rollout.tokens.shape)
        accepted = rewards.accepted_greedy(rollout.tokens, text.tokens, valid)
        needed, context = real & (accepted == 0), text.hidden
    else:
        valid, needed = until_stop(rollout.tokens, models.stops) & real[..., None], real
    if cache is not None:
        scores = score_groups(models, cache, outputs, rollout, needed, temperature)
    if temperature > 0:
        uniform = jax.random.uniform(key, rollout.log_prob.shape)
        accepted = rewards.accepted_sampled(scores.tempered, rollout.log_prob, uniform, valid)
        context = scores.context
    drafted = preferred = jnp.zeros(accepted.shape)
    if scored:
        both = valid & text.valid
        preferred = jnp.sum(jnp.where(both, text.log_prob, 0.0), -1)
        drafted = jnp.sum(jnp.where(both, scores.log_prob, 0.0), -1)
    return Verified(accepted, valid, drafted, preferred, context)


def until_stop(tokens_xK: jax.Array, stops: tuple[int, ...]) -> jax.Array:
    """bool, True up to and including the first stop token."""
    stopped = jnp.cumsum(jnp.isin(tokens_xK, jnp.asarray(stops)), -1)
    return jnp.pad(stopped[..., :-1], ((0, 0),) * (tokens_xK.ndim - 1) + ((1, 0),)) == 0


def score_groups(
    models: Models,
    cache: Cache,
    outputs: TargetOutputs,
    rollout: Rollout,
    needed_BxAxG: jax.Array,
    temperature: float,
) -> WindowScores:
    """`score_windows` of a rollout; leaves `[B, A, G, ...]`."""
    B, A, G, K = rollout.tokens.shape
    scores = score_windows(
        models.target,
        models.target_params,
        cache,
        outputs.hidden,
        jnp.repeat(rollout.anchors, G, 1),
        rollout.tokens.reshape(B, A * G, K),
        needed_BxAxG.reshape(B, A * G),
        windows_at_once(B, A, G, K),
        temperature,
    )
    return jax.tree.map(lambda x: x.reshape(B, A, G, *x.shape[2:]), scores)


def windows_at_once(B: int, A: int, G: int, K: int) -> int:
    """Of a row, whole groups: few on a CPU, where the work is to follow the need, and on accelerators as many
    as fill their matrix units while the weights are gathered."""
    wanted = partition.suited(_TOKENS)
    groups = [n for n in range(1, A + 1) if A % n == 0]
    return G * next((n for n in groups if partition.share(B) * n * G * K >= wanted), A)
