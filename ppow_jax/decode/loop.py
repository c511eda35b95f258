"""Decoding: one jitted loop from prompt to stop, with or without a drafter.

A round drafts K tokens, lets the target score them together with the last known token, and keeps what
agrees plus one token of the target's own. K = 0 is autoregressive decoding: the same loop, a window of
nothing.

Shape letters: B rows, P padded prompt length, S cache slots, J = K + 1 tokens of a verification pass,
L longest text to emit.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.decode.verify import accepted_prefix, emitted
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import Cache
from ppow_jax.models.drafter import Drafter, DrafterWeights
from ppow_jax.models.layers import KeyValues, likeliest
from ppow_jax.models.target import Target
from ppow_jax.teacher import Features
from ppow_jax.windows import Prefix, Start, greedy, prefix_pass, window_pass


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static settings of a decoding loop.

    Attributes:
      max_new_tokens: longest text to emit, the stop token included.
      window: K, drafted tokens a round; 0 decodes autoregressively.
      temperature: 0 is greedy; above 0 samples, and needs window 0.
      stop_ids: ids that end a text.
    """

    max_new_tokens: int
    window: int
    temperature: float
    stop_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.window and self.temperature:
            raise ValueError("drafted decoding samples at temperature 0 only")


class Decoded(NamedTuple):
    """What a loop returns.

    Attributes:
      tokens: int32 `[B, L]`, zero beyond `count`.
      count: int32 `[B]`, tokens emitted, the stop token included.
      finished: bool `[B]`, whether a stop token ended the text.
      emitted_by_round: int32 `[B, L]`, tokens that each verification pass emitted, zero beyond the last.
    """

    tokens: jax.Array
    count: jax.Array
    finished: jax.Array
    emitted_by_round: jax.Array


class State(NamedTuple):
    """Between rounds. `known` counts the tokens of prompt and text; the last one is not cached yet."""

    tokens: jax.Array  # [B, L + J]
    count: jax.Array  # [B]
    known: jax.Array  # [B]
    last: jax.Array  # [B]
    done: jax.Array  # [B]
    round: jax.Array  # []
    emitted_by_round: jax.Array  # [B, L]
    prompt: jax.Array  # [], the slot after the prompts'
    cache: Cache  # the target's
    prefix: KeyValues | None  # the drafter's
    start: Start | None  # the drafter's next anchor
    keys: jax.Array  # [B] random keys, one a row


def _pick(logits: jax.Array, keys_B: jax.Array, position_B: jax.Array, temperature: float):
    """Token ids for logits `[B, J, V]`: the likeliest, or a sample that depends on row and position."""
    if temperature == 0:
        return likeliest(logits)
    keys = jax.vmap(jax.random.fold_in)(keys_B, position_B)
    draw = lambda key, row: jax.random.categorical(key, row / temperature)  # noqa: E731
    return jax.vmap(draw)(keys, logits).astype(jnp.int32)


def _put(rows_BxL: jax.Array, values_BxJ: jax.Array, at_B: jax.Array) -> jax.Array:
    """Writes each row's values at its own offset."""
    return jax.vmap(lambda r, v, i: jax.lax.dynamic_update_slice(r, v, (i,)))(rows_BxL, values_BxJ, at_B)


def prefill(
    target: Target,
    params: dict,
    drafter: Drafter | None,
    weights: DrafterWeights | None,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
) -> tuple[State, Features]:
    """Reads the prompts (right-padded) and emits the first token of each; with the features `[B, P, ...]`."""
    B, P = prompt_BxP.shape
    J, L = config.window + 1, config.max_new_tokens
    positions_BxP = jnp.broadcast_to(jnp.arange(P), (B, P))
    out = target.apply({"params": params}, prompt_BxP[:, None], positions_BxP[:, None])
    end_Bx1 = (length_B - 1)[:, None]
    hidden_Bx1xD = jnp.take_along_axis(out.hidden[:, 0], end_Bx1[..., None], 1)
    logits = target.apply({"params": params}, hidden_Bx1xD, method=Target.logits)
    first_B = _pick(logits, keys_B, length_B, config.temperature)[:, 0]
    cache = kv_cache.as_prefix(out.new)
    prefix = start = None
    if drafter is not None:
        next_BxP = _put(jnp.roll(prompt_BxP, -1, 1), first_B[:, None], length_B - 1)
        read = prefix_pass(drafter, weights, out.taps[:, 0], next_BxP, positions_BxP)
        prefix = read.keys_values
        start = _anchor(read, jnp.zeros_like(length_B), length_B - 1, first_B)
    stop = jnp.isin(first_B, jnp.asarray(config.stop_ids))
    state = State(
        tokens=jnp.zeros((B, L + J), jnp.int32).at[:, 0].set(first_B),
        count=jnp.ones(B, jnp.int32),
        known=length_B + 1,
        last=first_B,
        done=stop | (L == 1),
        round=jnp.int32(0),
        emitted_by_round=jnp.zeros((B, L), jnp.int32),
        prompt=jnp.int32(P),
        cache=cache,
        prefix=prefix,
        start=start,
        keys=keys_B,
    )
    return state, Features(out.taps[:, 0], out.hidden[:, 0])


def _anchor(read: Prefix, offset_B: jax.Array, index_B: jax.Array, token_B: jax.Array) -> Start:
    """The anchor at `index` of the positions that `read` covers, which begin at `offset`."""
    hidden = jnp.take_along_axis(read.hidden, index_B[:, None, None], 1)
    return Start(hidden, token_B[:, None], (offset_B + index_B)[:, None])


def next_round(
    target: Target,
    params: dict,
    drafter: Drafter | None,
    weights: DrafterWeights | None,
    state: State,
    config: DecodeConfig,
) -> tuple[State, Features]:
    """Draft, verify, keep; with the features `[B, J, ...]` of the tokens that the target read."""
    K = config.window
    window_BxJ = state.last[:, None]
    if drafter is not None:
        drafted = window_pass(drafter, weights, state.prefix, state.start, greedy(weights.vocab), K)
        window_BxJ = jnp.concatenate([window_BxJ, drafted[:, 0, 0]], 1)
    offset_B = state.known - 1
    positions_BxJ = offset_B[:, None] + jnp.arange(K + 1)
    slot, visible = _in_step(state) if drafter is None else _each_at_its_own(state, offset_B)
    out = target.apply({"params": params}, window_BxJ[:, None], positions_BxJ[:, None], state.cache, visible)
    logits = target.apply({"params": params}, out.hidden[:, 0], method=Target.logits)
    preferred_BxJ = _pick(logits, state.keys, state.known, config.temperature)
    accepted_B = accepted_prefix(window_BxJ[:, 1:] == preferred_BxJ[:, :-1])
    room_B = config.max_new_tokens - state.count
    count_B, stopped_B = emitted(preferred_BxJ, accepted_B, room_B, config.stop_ids)
    kept_B = jnp.where(state.done, 0, count_B)
    last_B = jnp.take_along_axis(preferred_BxJ, accepted_B[:, None], 1)[:, 0]
    done_B = state.done | stopped_B
    going_on = ~done_B.all()
    prefix = start = None
    if drafter is not None:
        read = prefix_pass(drafter, weights, out.taps[:, 0], preferred_BxJ, positions_BxJ)
        (prefix,) = kv_cache.write((state.prefix,), (read.keys_values,), offset_B, going_on)
        start = _anchor(read, offset_B, accepted_B, last_B)
    state = State(
        tokens=_put(state.tokens, jnp.where(state.done[:, None], 0, preferred_BxJ), state.count),
        count=state.count + kept_B,
        known=state.known + kept_B,
        last=last_B,
        done=done_B,
        round=state.round + 1,
        emitted_by_round=state.emitted_by_round.at[:, state.round].set(kept_B),
        prompt=state.prompt,
        cache=kv_cache.write(state.cache, kv_cache.as_prefix(out.new), slot, going_on),
        prefix=prefix,
        start=start,
        keys=state.keys,
    )
    return state, Features(out.taps[:, 0], out.hidden[:, 0])


def _each_at_its_own(state: State, offset_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The slots `[B]` that a round's tokens are written from, and the slots `[B, 1, S]` that they see."""
    return offset_B, kv_cache.visible(offset_B, state.cache[0].values.shape[2])


def _in_step(state: State) -> tuple[jax.Array, jax.Array]:
    """The slot `[]` that a round without a drafter writes to, and the slots `[B, 1, S]` that it sees.

    Every row that goes on adds one token a round, so all of them write to the slot after the prompts' that
    the round counts. (A row that is done writes there too, and nobody reads it.)
    """
    slots = jnp.arange(state.cache[0].values.shape[2])
    slot = state.prompt + state.round
    written = (slots >= state.prompt) & (slots < slot)
    return slot, kv_cache.visible(state.known - state.count, len(slots)) | written


def grow(state: State, slots: int) -> State:
    """The state with caches of `slots` slots."""
    prefix = None if state.prefix is None else kv_cache.grow((state.prefix,), slots)[0]
    return state._replace(cache=kv_cache.grow(state.cache, slots), prefix=prefix)


@functools.partial(jax.jit, static_argnames=("target", "drafter", "config"))
def decode(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    drafter: Drafter | None = None,
    weights: DrafterWeights | None = None,
) -> Decoded:
    """Decodes every prompt to its stop.

    Args:
      target: the module.
      params: its parameters.
      prompt_BxP: int32 prompts, right-padded with any id; P + max_new_tokens + K + 1 slots are held.
      length_B: int32 prompt lengths, at least 1.
      keys_B: random keys, one a row; unused at temperature 0.
      config: static settings.
      drafter: drafts when `config.window` > 0.
      weights: the drafter's.

    Returns:
      `Decoded`. At temperature 0 the texts do not depend on the drafter.
    """
    body = lambda s: next_round(target, params, drafter, weights, s, config)[0]  # noqa: E731
    state, _ = prefill(target, params, drafter, weights, prompt_BxP, length_B, keys_B, config)
    L = config.max_new_tokens
    state = grow(state, prompt_BxP.shape[1] + L + config.window + 1)
    state = jax.lax.while_loop(lambda s: ~s.done.all(), body, state)
    tokens = jnp.where(jnp.arange(L) < state.count[:, None], state.tokens[:, :L], 0)
    end = jnp.take_along_axis(tokens, state.count[:, None] - 1, 1)[:, 0]
    finished = jnp.isin(end, jnp.asarray(config.stop_ids))
    return Decoded(tokens, state.count, finished, state.emitted_by_round)
