"""What the parts of decoding cost on the machine in use, batch 1, and which shape of drafts that favours.

Time is seconds; J tokens of a verification pass, K window.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.decode import profile, verify
from ppow_jax.decode.drafting import Drafting, Eagle, VerifiedTokens
from ppow_jax.decode.loop import DecodeConfig, State, grow, next_round, prefill
from ppow_jax.decode.profile import Texts
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.decode.shapes import Dynamic, Shape, beam_nodes, chain
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.layers import likeliest
from ppow_jax.models.target import Target

_SLOTS = 256
_REPEATS = 7
_LONG = 0.3  # seconds of the repeats in a loop, of which there are at least three
_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)  # tokens of the passes that are measured
_WIDTHS = (1, 2, 4, 10)  # of beams
_LEVELS = 8
_PROBES = (chain(3), Dynamic(48, 6, 4))  # whole rounds that are measured
_CHAIN = 10


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds, measured on one machine.

    Attributes:
      step: of an autoregressive round.
      target: of a target pass by its number of tokens; what lies between two sizes costs as much as the
        larger.
      first: of a drafter's first step, which is one window wide, and of its reading the verified tokens.
      level: of each step after the first, by its width.
      overhead: of the rest of a round (walk, bookkeeping), by the tokens of the pass; interpolated.
    """

    step: float
    target: Mapping[int, float]
    first: float
    level: Mapping[int, float]
    overhead: Mapping[int, float]

    def draft(self, depth: int, top_k: int) -> float:
        """Seconds of drafting."""
        return self.first + (depth - 1) * self.level[min(w for w in self.level if w >= top_k)]

    def round(self, tokens: int, depth: int, top_k: int) -> float:
        """Seconds of a round."""
        over = self.target[min(n for n in self.target if n >= tokens)]
        sizes, seconds = zip(*sorted(self.overhead.items()), strict=True)
        return over + self.draft(depth, top_k) + float(np.interp(tokens, sizes, seconds))


def measure(
    target: Target, params: dict, drafter: Drafter, weights: DrafterWeights, slots: int = _SLOTS
) -> Costs:
    """Measures everything with half of `slots` known; takes minutes, mostly of compilation."""
    passes = {n: typical(target_timer(target, params, n, slots)) for n in _SIZES}
    draft = lambda shape: typical(draft_timer(target, Eagle(drafter, shape), weights, slots))  # noqa: E731
    first = draft(chain(1))
    level = {1: (draft(chain(4)) - first) / 3}
    for width in _WIDTHS[1:]:
        level[width] = (draft(Dynamic(2, 4, width)) - draft(Dynamic(2, 1, width))) / 3
    costs = Costs(typical(round_timer(target, params, slots=slots)), passes, first, level, {1: 0.0})
    overhead = {}
    for shape in _PROBES:
        whole = typical(round_timer(target, params, Eagle(drafter, shape), weights, slots))
        overhead[shape.tokens] = max(0.0, whole - costs.round(shape.tokens, shape.depth, shape.ranks))
    return dataclasses.replace(costs, overhead=overhead)


class Choice(NamedTuple):
    """A shape with what is predicted of it.

    Attributes:
      shape: of the drafts.
      tau: tokens a round, exact on the profiled texts.
      seconds: of a round.
      speedup: tokens/s over those of autoregressive decoding, prompts not counted.
    """

    shape: Shape
    tau: float
    seconds: float
    speedup: float


def choices(costs: Costs, drafter: Drafter, weights: DrafterWeights, texts: Texts) -> list[Choice]:
    """All shapes that were looked at, the fastest first."""
    found = []

    def add(shape: Shape, tau: float) -> None:
        seconds = costs.round(shape.tokens, shape.depth, shape.ranks)
        found.append(Choice(shape, tau, seconds, tau / seconds * costs.step))

    narrow = profile.measure(drafter, weights, texts, _CHAIN, 1)
    for window in range(1, _CHAIN + 1):
        add(chain(window), narrow.tau(window + 1, window))
    for width in (w for w in _WIDTHS[1:] if w <= drafter.config.vocab_size):
        wide = profile.measure(drafter, weights, texts, _LEVELS, width)
        for depth in range(1, _LEVELS + 1):
            for tokens in _SIZES:
                if depth < tokens <= beam_nodes(depth, width):
                    add(Dynamic(tokens, depth, width), wide.tau(tokens, depth))
    return sorted(found, key=lambda choice: -choice.speedup)


def measure_gamma(target: Target, params: dict, drafter: Drafter, weights: DrafterWeights) -> float:
    """Time of a drafter step over that of a target step, 256 slots of context.

    A step's share of reading the verified tokens is part of it: the mean over a window of 8.
    """
    window = chain(8)
    step = typical(draft_timer(target, Eagle(drafter, window), weights)) / window.depth
    return step / typical(target_timer(target, params, 1))


Timer = Callable[[], float]  # measures anew at every call: seconds


def typical(timer: Timer) -> float:
    """Median of a few measurements."""
    return float(np.median([timer() for _ in range(_REPEATS)]))


def target_timer(target: Target, params: dict, tokens: int, slots: int = _SLOTS) -> Timer:
    """Of a target pass over `tokens` tokens with the likeliest after each, half of the slots known."""
    c = target.config
    cache = kv_cache.empty(c.layers, 1, c.kv_heads, slots, c.head_size, jnp.dtype(c.dtype))
    positions = slots // 2 + jnp.arange(tokens)[None, None]
    visible, above = kv_cache.visible(jnp.full(1, slots // 2), slots), jnp.tri(tokens, dtype=bool)[None, None]

    def once(read: tuple, params: dict, *about: Any) -> tuple:
        out = target.apply({"params": params}, read[0], *about)
        best = likeliest(target.apply({"params": params}, out.hidden, method=Target.logits))
        return best, (out.taps, out.new)

    # whatever a round uses is kept, and nothing is a constant, or the compiler would make less of it
    ids, about = jnp.zeros((1, 1, tokens), jnp.int32), (positions, cache, visible, above)
    kept = jax.eval_shape(once, (ids, None), params, *about)[1]
    begin = ids, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)
    return _in_loop(once, begin, params, *about)


def draft_timer(target: Target, drafting: Drafting, weights: Any, slots: int = _SLOTS) -> Timer:
    """Of a drafter's part of a round, greedily: drafting, and reading the tokens that were verified.

    Alone, its weights may stay in a processor's cache, where a target pass between two drafts would drive
    them out: see `parts_timer`.
    """
    c, offset_B, many = target.config, jnp.full(1, slots // 2), drafting.depth + 1
    keys_B = jax.random.split(jax.random.key(0), 1)
    taps = jnp.ones((1, many, len(c.taps) * c.width), jnp.dtype(c.dtype))

    def once(drafts: Any, weights: Any) -> Any:
        tokens_BxJ = jnp.maximum(drafting.draft(weights, drafts, GREEDY, keys_B).tokens, 0)
        way_BxM = jnp.broadcast_to(tokens_BxJ[:, -1:], (1, many))  # any tokens; the work is the same
        # taps that hang on the draft, or reading them would leave the loop
        new = taps * way_BxM[..., None].astype(taps.dtype)
        verified = VerifiedTokens(new, way_BxM, offset_B, offset_B * 0 + many - 1, True, tokens_BxJ)
        return drafting.read(weights, drafts, verified)

    return _in_loop(once, _half_read(target, drafting, weights, slots), weights)


def parts_timer(target: Target, params: dict, drafting: Drafting, weights: Any, slots: int = _SLOTS) -> Timer:
    """Of a draft, the target's pass over it and the drafter's reading of what it found, in turn.

    That is what a round cannot do without: it leaves out the walk through the draft, the choice and writing
    of what is kept, and all bookkeeping.
    """
    c, offset_B, many = target.config, jnp.full(1, slots // 2), drafting.depth + 1
    keys_B = jax.random.split(jax.random.key(0), 1)
    cache = kv_cache.empty(c.layers, 1, c.kv_heads, slots, c.head_size, jnp.dtype(c.dtype))

    def once(carry: tuple, params: dict, weights: Any, *known: Any) -> tuple:
        draft = drafting.draft(weights, carry[0], GREEDY, keys_B)
        above_BxJxJ = verify.ancestors(draft.parents, drafting.depth)
        positions_BxJ = offset_B[:, None] + above_BxJxJ.sum(-1) - 1
        inputs = (jnp.maximum(draft.tokens, 0)[:, None], positions_BxJ[:, None], *known, above_BxJxJ[:, None])
        out = target.apply({"params": params}, *inputs)
        best_BxJ = likeliest(target.apply({"params": params}, out.hidden[:, 0], method=Target.logits))
        way_BxM = jnp.broadcast_to(best_BxJ[:, :1], (1, many))
        taps_BxMxC = out.taps[:, 0, jnp.minimum(jnp.arange(many), drafting.tokens - 1)]
        verified = VerifiedTokens(taps_BxMxC, way_BxM, offset_B, offset_B * 0 + many - 1, True, best_BxJ)
        return drafting.read(weights, carry[0], verified), out.new

    drafts = _half_read(target, drafting, weights, slots)
    known = cache, kv_cache.visible(offset_B, slots)
    kept = jax.eval_shape(once, (drafts, None), params, weights, *known)[1]
    begin = drafts, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), kept)
    return _in_loop(once, begin, params, weights, *known)


def _half_read(target: Target, drafting: Drafting, weights: Any, slots: int) -> Any:
    """A drafter's state with half of `slots` read."""
    c, length, start_B = target.config, slots // 2, jnp.zeros(1, jnp.int32)
    taps = jnp.ones((1, length, len(c.taps) * c.width), jnp.dtype(c.dtype))
    verified = VerifiedTokens(taps, jnp.zeros((1, length), jnp.int32), start_B, start_B + length - 1)
    return drafting.grow(drafting.read(weights, None, verified), slots)


def round_timer(
    target: Target, params: dict, drafting: Drafting | None = None, weights: Any = None, slots: int = _SLOTS
) -> Timer:
    """Of a round of the decoding loop."""
    config, length = DecodeConfig(slots, (-1,)), slots // 2
    prompt, keys = jnp.zeros((1, length), jnp.int32), jax.random.split(jax.random.key(0), 1)
    depth = drafting.depth if drafting else 0
    state, _ = jax.jit(functools.partial(prefill, target, config=config, drafting=drafting))(
        params, prompt, jnp.array([length]), keys, weights=weights
    )
    state = grow(state, slots + depth, drafting)

    def once(state: State, params: dict, weights: Any) -> State:
        return next_round(target, params, state, config, drafting, weights)[0]

    return _in_loop(once, state, params, weights, many=min(12, length // (depth + 1)))


def _in_loop(once: Callable[..., Any], begin: Any, *arguments: Any, many: int = 12) -> Timer:
    """Of `once`, which feeds on its own result, within a compiled loop: as decoding runs it."""
    few = 2

    @jax.jit
    def run(times: jax.Array, begin: Any, *arguments: Any) -> Any:
        return jax.lax.fori_loop(0, times, lambda _, carry: once(carry, *arguments), begin)

    def seconds(times: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(jnp.int32(times), begin, *arguments))
        return time.perf_counter() - began

    seconds(few)
    many = few + min(many - few, max(3, int(_LONG / seconds(few) * few)))

    def timer() -> float:
        short, long = seconds(few), seconds(many)
        return (long - short) / (many - few) if long > short else long / many  # other work came between

    return timer


def median_seconds(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median wall-clock seconds of a call, its first (compilation) left out."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))
