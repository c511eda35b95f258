"""Decoding: one jitted loop from prompt to stop, with or without a drafter.

A round drafts a tree of tokens, lets the target score them together with the last known token, which is the
tree's root, and keeps the way that the text takes through it plus one token of the target's own. Without a
drafter the tree is its root: autoregressive decoding is the same loop.

Shape letters: B rows, P padded prompt length, S cache slots, J tokens of a verification pass, M tokens that
a round emits at most, T of the longest text to emit, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode import sampling, verify, watching
from ppow_jax.decode.drafting import Drafting, VerifiedTokens
from ppow_jax.decode.sampling import GREEDY, Sampling
from ppow_jax.decode.verify import Draft, Walk
from ppow_jax.decode.watching import Watch
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import Cache
from ppow_jax.models.layers import likeliest
from ppow_jax.models.target import Target
from ppow_jax.models.target_outputs import Array, Features


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Static settings of a decoding loop.

    Attributes:
      max_new_tokens: longest text to emit, the stop token included.
      stop_ids: ids that end a text.
      sampling: how the target's tokens are picked.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    sampling: Sampling = GREEDY


class Decoded(NamedTuple, Generic[Array]):
    """What a loop returns.

    Attributes:
      tokens: int32 `[B, L]`, zero beyond `emitted`.
      emitted: int32 `[B]`, tokens emitted, the stop token included.
      finished: bool `[B]`, whether a stop token ended the text; else it ran into `max_new_tokens` or the end
        of the target's context.
      emitted_by_round: int32 `[B, L]`, tokens that each verification pass emitted, zero beyond the last.
    """

    tokens: Array
    emitted: Array
    finished: Array
    emitted_by_round: Array


class Pass(NamedTuple):
    """A verification pass.

    Attributes:
      draft: what the target verified.
      way: that the text took through it.
      logits: float32 `[B, J, V]`, the target's after every node.
      features: `[B, M, ...]`, of the tokens that the round settled.
    """

    draft: Draft
    way: Walk
    logits: jax.Array
    features: Features


class State(NamedTuple):
    """Between rounds. `known` counts the tokens of prompt and text; the last one is not cached yet."""

    tokens: jax.Array  # [B, T + M]
    emitted: jax.Array  # [B]
    limit: jax.Array  # [B], the longest text that its context has room for
    known: jax.Array  # [B]
    last: jax.Array  # [B]
    done: jax.Array  # [B]
    round: jax.Array  # []
    emitted_by_round: jax.Array  # [B, L]
    prompt: jax.Array  # [], the slot after the prompts'
    cache: Cache  # the target's
    drafts: Any  # the drafter's own
    keys: jax.Array  # [B] random keys, one a row


def _keys_at(keys_B: jax.Array, position_B: jax.Array, use: int) -> jax.Array:
    """A random key a row for the token at a position (use 0), or for the drafts of a round that begins there
    (use 1)."""
    return jax.vmap(lambda k, p: jax.random.fold_in(jax.random.fold_in(k, p), use))(keys_B, position_B)


def _put(rows_BxT: jax.Array, values_BxM: jax.Array, at_B: jax.Array) -> jax.Array:
    """Each row's values, from a place of its own on. As a scatter a TPU does that row by row."""
    offset_BxT = jnp.arange(rows_BxT.shape[1]) - at_B[:, None]
    for number in range(values_BxM.shape[1]):
        rows_BxT = jnp.where(offset_BxT == number, values_BxM[:, number, None], rows_BxT)
    return rows_BxT


def prefill(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    drafting: Drafting | None = None,
    weights: Any = None,
) -> tuple[State, Features]:
    """Reads the prompts (right-padded) and emits the first token of each; with the features `[B, P, ...]`."""
    B, P = prompt_BxP.shape
    L, depth = config.max_new_tokens, drafting.depth if drafting else 0
    positions_BxP = jnp.broadcast_to(jnp.arange(P), (B, P))
    out = target.apply({"params": params}, prompt_BxP[:, None], positions_BxP[:, None])
    end_Bx1 = (length_B - 1)[:, None]
    hidden_Bx1xD = jnp.take_along_axis(out.hidden[:, 0], end_Bx1[..., None], 1)
    logits_Bx1xV = target.apply({"params": params}, hidden_Bx1xD, method=Target.logits)
    first_B = sampling.pick(_keys_at(keys_B, length_B, 0), logits_Bx1xV[:, 0], config.sampling)
    drafts = None
    if drafting:
        next_BxP = _put(jnp.roll(prompt_BxP, -1, 1), first_B[:, None], length_B - 1)
        verified = VerifiedTokens(out.taps[:, 0], next_BxP, jnp.zeros_like(length_B), length_B - 1)
        drafts = drafting.read(weights, None, verified)
    limit_B = jnp.minimum(L, target.config.context - length_B)
    stop_B = jnp.isin(first_B, jnp.asarray(config.stop_ids))
    state = State(
        tokens=jnp.zeros((B, L + depth + 1), jnp.int32).at[:, 0].set(first_B),
        emitted=jnp.ones(B, jnp.int32),
        limit=limit_B,
        known=length_B + 1,
        last=first_B,
        done=stop_B | (limit_B <= 1),
        round=jnp.int32(0),
        emitted_by_round=jnp.zeros((B, L), jnp.int32),
        prompt=jnp.int32(P),
        cache=kv_cache.as_prefix(out.new),
        drafts=drafts,
        keys=keys_B,
    )
    return state, Features(out.taps[:, 0], out.hidden[:, 0])


def next_round(
    target: Target,
    params: dict,
    state: State,
    config: DecodeConfig,
    drafting: Drafting | None = None,
    weights: Any = None,
) -> tuple[State, Pass]:
    """Draft, verify, keep; with the pass that this took."""
    offset_B = state.known - 1
    if drafting:
        keys_B = _keys_at(state.keys, state.known, 1)
        draft, depth = drafting.draft(weights, state.drafts, config.sampling, keys_B), drafting.depth
        slot, places = offset_B, None
        visible = kv_cache.visible(offset_B, state.cache[0].values.shape[2])
    else:
        draft, depth = Draft(state.last[:, None], jnp.zeros_like(offset_B)[:, None]), 0
        slot, visible, places = _in_step(state)
    above_BxJxJ = verify.ancestors(draft.parents, depth)
    positions_BxJ = offset_B[:, None] + above_BxJxJ.sum(-1) - 1
    tokens_BxJ = jnp.maximum(draft.tokens, 0)  # where nothing is drafted, anything is read
    inputs = (tokens_BxJ[:, None], positions_BxJ[:, None], state.cache, visible, above_BxJxJ[:, None], places)
    out = target.apply({"params": params}, *inputs)
    logits_BxJxV = target.apply({"params": params}, out.hidden[:, 0], method=Target.logits)
    choose = _chooser(state, config.sampling, draft, logits_BxJxV)
    way = verify.walk(draft, depth, ~state.done, choose)
    read, new = Features(out.taps[:, 0], out.hidden[:, 0]), kv_cache.as_prefix(out.new)
    if drafting and not drafting.straight:
        read, new = _along(way, read, new)
    kept_B, stopped_B = verify.emitted(way.tokens, way.accepted, state.limit - state.emitted, config.stop_ids)
    kept_B = jnp.where(state.done, 0, kept_B)
    done_B = state.done | stopped_B
    going_on = ~done_B.all()
    drafts = None
    if drafting:
        preferred_BxJ = likeliest(logits_BxJxV)
        verified = VerifiedTokens(read.taps, way.tokens, offset_B, way.accepted, going_on, preferred_BxJ)
        drafts = drafting.read(weights, state.drafts, verified)
    state = state._replace(
        tokens=_put(state.tokens, way.tokens, state.emitted),
        emitted=state.emitted + kept_B,
        known=state.known + kept_B,
        last=jnp.take_along_axis(way.tokens, way.accepted[:, None], 1)[:, 0],
        done=done_B,
        round=state.round + 1,
        emitted_by_round=state.emitted_by_round.at[:, state.round].set(kept_B),
        cache=kv_cache.write(state.cache, new, slot, going_on),
        drafts=drafts,
    )
    return state, Pass(draft, way, logits_BxJxV, read)


def _chooser(
    state: State, how: Sampling, draft: Draft, logits_BxJxV: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """For `verify.walk`: the token after a node."""
    if how.temperature == 0:
        preferred_BxJ = likeliest(logits_BxJxV)
        return lambda step, node_B: jnp.take_along_axis(preferred_BxJ, node_B[:, None], 1)[:, 0]

    def choose(step: jax.Array, node_B: jax.Array) -> jax.Array:
        """Warps the distributions of the nodes that are reached alone: 60 sums over a vocabulary are dear."""
        logits_BxV = jnp.take_along_axis(logits_BxJxV, node_B[:, None, None], 1)[:, 0]
        log_p_BxV = sampling.log_probs(logits_BxV, how)
        if draft.drawn is not None:
            offered = verify.offered_after(draft.drawn, draft.tokens, node_B, log_p_BxV.shape[1])
            log_p_BxV = jnp.log(jax.vmap(verify.emission_probs)(jnp.exp(log_p_BxV), *offered))
        return sampling.draw(_keys_at(state.keys, state.known + step, 0), log_p_BxV)

    return choose


def _along(way: Walk, features: Features, new: Cache) -> tuple[Features, Cache]:
    """What the target made of the nodes on the way, in place of all nodes."""
    along = lambda x: jnp.take_along_axis(x, way.nodes[..., None], 1)  # noqa: E731
    return Features(*map(along, features)), kv_cache.pick(new, way.nodes)


def _in_step(state: State) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The slot `[]` that a round without a drafter writes to, the slots `[B, 1, S]` that it sees, and the
    positions `[B, S]` of all slots.

    Every row that goes on adds one token a round, so all of them write to the slot after the prompts' that
    the round counts. (A row that is done writes there too, and nobody reads it.)
    """
    slots = jnp.arange(state.cache[0].values.shape[2])
    slot = state.prompt + state.round
    written = (slots >= state.prompt) & (slots < slot)
    length_B = state.known - state.emitted
    places_BxS = jnp.where(slots < state.prompt, slots, slots - state.prompt + length_B[:, None])
    return slot, kv_cache.visible(length_B, len(slots)) | written, places_BxS


def grow(state: State, slots: int, drafting: Drafting | None = None) -> State:
    """The state with caches of `slots` slots."""
    drafts = drafting.grow(state.drafts, slots) if drafting else None
    return state._replace(cache=kv_cache.grow(state.cache, slots), drafts=drafts)


def decode(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array | np.ndarray,
    length_B: jax.Array | np.ndarray,
    keys_B: jax.Array,
    config: DecodeConfig,
    drafting: Drafting | None = None,
    weights: Any = None,
    watch: Watch | None = None,
    scores: bool = False,
) -> Decoded[jax.Array]:
    """Decodes every prompt to its stop.

    Args:
      target: the module.
      params: its parameters.
      prompt_BxP: int32 prompts, right-padded with any id; P + max_new_tokens + M slots are held.
      length_B: int32 prompt lengths, at least 1 and below the target's context.
      keys_B: random keys, one a row; unused at temperature 0.
      config: static settings.
      drafting: who drafts.
      weights: the drafter's.
      watch: called after every round while the loop runs, with arrays of the host. The first call is the
        prompt's, which drafts nothing and emits one token. What it raises ends the loop.
      scores: whether `watch` gets log-probabilities.

    Returns:
      `Decoded`. At temperature 0 the texts do not depend on the drafter, at others their distribution does
      not.
    """
    inputs = (target, params, prompt_BxP, length_B, keys_B, config, drafting, weights)
    if watch is None:
        return _decode(*inputs, None, False)
    with watching.numbered(watch) as number:
        decoded = jax.block_until_ready(_decode(*inputs, number, scores))
        jax.effects_barrier()
    return decoded


@functools.partial(jax.jit, static_argnames=("target", "config", "drafting", "scores"))
def _decode(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    drafting: Drafting | None,
    weights: Any,
    watcher: jax.Array | None,
    scores: bool,
) -> Decoded[jax.Array]:
    L, depth = config.max_new_tokens, drafting.depth if drafting else 0

    def tell(done: Pass, kept_B: jax.Array) -> None:
        if watcher is not None:
            scored = (done.logits, config.sampling) if scores else None
            watching.tell(watcher, watching.watched(done.draft, done.way, kept_B, scored))

    def body(state: State) -> State:
        after, done = next_round(target, params, state, config, drafting, weights)
        tell(done, after.emitted - state.emitted)
        return after

    state, features = prefill(target, params, prompt_BxP, length_B, keys_B, config, drafting, weights)
    last_Bx1 = jnp.take_along_axis(prompt_BxP, length_B[:, None] - 1, 1)
    nothing_Bx1, zero_B = jnp.zeros_like(last_Bx1), jnp.zeros_like(length_B)
    way = Walk(nothing_Bx1, state.tokens[:, :1], zero_B)
    logits = jnp.zeros((len(length_B), 1, 1))  # nothing is drafted that they could say something of
    tell(Pass(Draft(last_Bx1, nothing_Bx1), way, logits, features), state.emitted)
    state = grow(state, prompt_BxP.shape[1] + L + depth + 1, drafting)
    state = jax.lax.while_loop(lambda s: ~s.done.all(), body, state)
    tokens = jnp.where(jnp.arange(L) < state.emitted[:, None], state.tokens[:, :L], 0)
    end_B = jnp.take_along_axis(tokens, state.emitted[:, None] - 1, 1)[:, 0]
    finished_B = jnp.isin(end_B, jnp.asarray(config.stop_ids))
    return Decoded(tokens, state.emitted, finished_B, state.emitted_by_round)
