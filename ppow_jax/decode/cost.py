"""What the parts of decoding cost on the machine in use, batch 1."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.models import cache as kv_cache
from ppow_jax.models.drafter import Drafter, DrafterWeights
from ppow_jax.models.layers import KeyValues, likeliest
from ppow_jax.models.target import Target
from ppow_jax.windows import Start, greedy, prefix_pass, window_pass

_SLOTS = 256
_REPEATS = 20


def measure_gamma(
    target: Target, params: dict, drafter: Drafter, weights: DrafterWeights, window: int = 8
) -> float:
    """Time of a drafter step over that of a target step, 256 slots of context."""
    draft = time_draft(drafter, weights, window) / window
    return draft / time_target(target, params, 1)


def time_target(target: Target, params: dict, tokens: int, slots: int = _SLOTS) -> float:
    """Seconds (median) of a target pass over `tokens` tokens with logits and the likeliest of each."""
    c = target.config
    cache = kv_cache.empty(c.layers, 1, c.kv_heads, slots, c.head_size, jnp.dtype(c.dtype))
    ids = jnp.zeros((1, 1, tokens), jnp.int32)

    @jax.jit
    def run(params: dict, cache: kv_cache.Cache) -> Any:
        positions = slots // 2 + jnp.arange(tokens)[None, None]
        visible = kv_cache.visible(jnp.full(1, slots // 2), slots)
        out = target.apply({"params": params}, ids, positions, cache, visible)
        logits = target.apply({"params": params}, out.hidden, method=Target.logits)
        return likeliest(logits), out.taps, out.new

    return median_seconds(functools.partial(run, params, cache))


def time_draft(drafter: Drafter, weights: DrafterWeights, window: int, slots: int = _SLOTS) -> float:
    """Seconds (median) of drafting a chain of `window` tokens."""
    c = drafter.config
    (prefix,) = kv_cache.empty(1, 1, c.kv_heads, slots, c.head_size, jnp.dtype(c.dtype))
    at = jnp.full((1, 1), slots // 2, jnp.int32)
    start = Start(jnp.ones((1, 1, c.width), jnp.dtype(c.dtype)), at * 0, at)

    @jax.jit
    def run(weights: DrafterWeights, prefix: KeyValues) -> jax.Array:
        return window_pass(drafter, weights, prefix, start, greedy(weights.vocab), window)

    return median_seconds(functools.partial(run, weights, prefix))


def time_prefix(drafter: Drafter, weights: DrafterWeights, tokens: int) -> float:
    """Seconds (median) of reading `tokens` verified tokens into the drafter's prefix."""
    taps = jnp.ones((1, tokens, drafter.config.taps_width))
    ids = jnp.zeros((1, tokens), jnp.int32)
    run = jax.jit(functools.partial(prefix_pass, drafter))
    return median_seconds(functools.partial(run, weights, taps, ids, ids))


def median_seconds(call: Callable[[], Any], repeats: int = _REPEATS) -> float:
    """Median wall-clock seconds of a call, its first (compilation) left out."""
    jax.block_until_ready(call())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))
