"""The target's verdict on a rollout: what it accepts, what that earns.

Shape letters: B rows, T text positions, A anchors, G windows a group, W = A G windows of a row, K window,
D width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax import advantages, partition, rewards, teacher
from ppow_jax.models import blocks
from ppow_jax.models.cache import Cache
from ppow_jax.models.target import Target, head_at_hand
from ppow_jax.rollout import Rollout
from ppow_jax.settings import PPOWSettings
from ppow_jax.windows import target_window_pass

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

    def law(context_BxLxKxD: jax.Array, tokens_BxLxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = target.apply({"params": params}, context_BxLxKxD, method=Target.logits)
        of = lambda t: jnp.take_along_axis(  # noqa: E731
            jax.nn.log_softmax(logits / t), tokens_BxLxK[..., None], -1
        )[..., 0]
        raw = of(1.0)
        return raw, raw if temperature in (0.0, 1.0) else of(temperature)

    def body(carry: tuple[jax.Array, WindowScores]) -> tuple[jax.Array, WindowScores]:
        i, scores = carry
        picked_BxC = jax.lax.dynamic_slice_in_dim(order_BxW, i * chunk, chunk, axis=1)
        anchors = jnp.take_along_axis(anchors_BxW, picked_BxC, 1)
        tokens = jnp.take_along_axis(tokens_BxWxK, picked_BxC[..., None], 1)
        context = jnp.take_along_axis(hidden_BxTxD, anchors[..., None] + 1, 1)[:, :, None]
        if K > 1:
            here = partition.in_turn(params, i)
            ahead = target_window_pass(target, here, text, anchors, tokens[..., :-1])
            context = jnp.concatenate([context, ahead], 2)
        values = partition.share(B, target.config.vocab_size) * chunk * K
        laws = blocks.mapped(law, blocks.count(values, chunk), context, tokens)
        found = WindowScores(*laws, context)
        put = lambda all_, new: all_.at[rows, picked_BxC].set(new)  # noqa: E731
        return i + 1, jax.tree.map(put, scores, found)

    blank = jnp.zeros((B, W, K))
    empty = WindowScores(blank, blank, jnp.zeros((B, W, K, hidden_BxTxD.shape[-1]), hidden_BxTxD.dtype))
    return jax.lax.while_loop(lambda c: c[0] < chunks, body, (jnp.int32(0), empty))[1]


class Verdict(NamedTuple):
    """What verification and rewards make of a rollout.

    Attributes:
      accepted: int32 `[B, A, G]`, k.
      valid: bool `[B, A, G, K]`, tokens that count.
      speedup, proximity: `[B, A, G]`, the weighted terms of the reward.
      advantage: `[B, A, G]`.
      context: `[B, A, G, K, D]`, the target's hidden states that predict each token; `[B, A, 1, K, D]`
        at temperature 0, where only the accepted prefix counts, and that is the text.
    """

    accepted: jax.Array
    valid: jax.Array
    speedup: jax.Array
    proximity: jax.Array
    advantage: jax.Array
    context: jax.Array


class Spans(NamedTuple):
    """What the texts themselves hold along the window of each anchor.

    Attributes:
      tokens: int32 `[B, A, 1, K]`, the target's own continuation.
      log_prob: float32 `[B, A, 1, K]`, log P of it.
      valid: bool `[B, A, 1, K]`, False from where the response ends.
      law: int32 `[B, A * K]`, the position whose hidden state predicts each token.
    """

    tokens: jax.Array
    log_prob: jax.Array
    valid: jax.Array
    law: jax.Array


def spans_of(batch: Mapping[str, jax.Array], lesson: teacher.Lesson, rollout: Rollout) -> Spans:
    """The texts along the windows of a rollout."""
    B, A, _, K = rollout.tokens.shape
    T = batch["tokens"].shape[1]
    positions = rollout.anchors[..., None] + 2 + jnp.arange(K)
    here, law = (jnp.minimum(p, T - 1).reshape(B, A * K) for p in (positions, positions - 1))

    def at(values_BxT: jax.Array, where: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values_BxT, where, 1).reshape(B, A, 1, K)

    inside = (positions < T)[:, :, None] & at(batch["assistant"], here) & rollout.real[..., None, None]
    valid = jnp.cumprod(inside, -1).astype(bool)
    return Spans(at(batch["tokens"], here), at(lesson.log_prob, law), valid, law)


def runs_target(settings: PPOWSettings) -> bool:
    """Whether verification runs the target: at temperature 0 the texts are its greedy ones, so k follows from
    them, and it runs for the proximity reward alone; above 0 for every window."""
    return settings.proximity_weight > 0 or settings.temperature > 0


def make_verify(
    target: Target, settings: PPOWSettings, gamma: float, stops: tuple[int, ...]
) -> Callable[..., Verdict]:
    """(target parameters, batch, rollout, key) -> Verdict, jitted.

    The proximity reward at temperature 0 asks the target about windows with k = 0 alone; see `runs_target`.
    """
    greedy, near, asks = settings.temperature == 0, settings.proximity_weight > 0, runs_target(settings)

    @jax.jit
    def verify(
        target_params: dict, batch: Mapping[str, jax.Array], rollout: Rollout, key: jax.Array
    ) -> Verdict:
        if asks:
            lesson, cache = teacher.read(target, target_params, batch["tokens"])
        else:
            lesson = teacher.lesson_of(target, target_params, batch)
        spans = spans_of(batch, lesson, rollout)
        real = jnp.broadcast_to(rollout.real[..., None], rollout.tokens.shape[:3])
        if greedy:
            valid = jnp.broadcast_to(spans.valid, rollout.tokens.shape)
            accepted = rewards.accepted_greedy(rollout.tokens, spans.tokens, valid)
            needed = real & (accepted == 0)
        else:
            valid, needed = until_stop(rollout.tokens, stops) & real[..., None], real
        if asks:
            scores = score_groups(target, target_params, cache, lesson, rollout, needed, settings.temperature)
        if greedy:
            B, A, _, K = rollout.tokens.shape
            context = jnp.take_along_axis(lesson.hidden, spans.law[..., None], 1).reshape(B, A, 1, K, -1)
        else:
            uniform = jax.random.uniform(key, rollout.log_prob.shape)
            accepted = rewards.accepted_sampled(scores.tempered, rollout.log_prob, uniform, valid)
            context = scores.context
        speedup = settings.speedup_weight * rewards.speedup(accepted, gamma)
        proximity = jnp.zeros_like(speedup)
        if near:
            both = valid & spans.valid
            preferred = jnp.sum(jnp.where(both, spans.log_prob, 0.0), -1)
            drafted = jnp.sum(jnp.where(both, scores.log_prob, 0.0), -1)
            bonus = rewards.proximity(accepted, preferred, drafted, settings.proximity_epsilon)
            proximity = settings.proximity_weight * bonus * real
        advantage = advantages.group_relative(speedup + proximity)
        return Verdict(accepted, valid, speedup, proximity, advantage, context)

    return verify


def until_stop(tokens_xK: jax.Array, stops: tuple[int, ...]) -> jax.Array:
    """bool, True up to and including the first stop token."""
    stopped = jnp.cumsum(jnp.isin(tokens_xK, jnp.asarray(stops)), -1)
    return jnp.pad(stopped[..., :-1], ((0, 0),) * (tokens_xK.ndim - 1) + ((1, 0),)) == 0


def score_groups(
    target: Target,
    target_params: dict,
    cache: Cache,
    lesson: teacher.Lesson,
    rollout: Rollout,
    needed_BxAxG: jax.Array,
    temperature: float,
) -> WindowScores:
    """`score_windows` of a rollout; leaves `[B, A, G, ...]`."""
    B, A, G, K = rollout.tokens.shape
    scores = score_windows(
        target,
        target_params,
        cache,
        lesson.hidden,
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
