"""What the parts of decoding cost on the machine in use."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.models import cache as kv_cache
from ppow_jax.models.drafter import Drafter, DrafterWeights
from ppow_jax.models.layers import KeyValues
from ppow_jax.models.target import Target
from ppow_jax.windows import Start, greedy, window_pass

_SLOTS = 256
_REPEATS = 20


def measure_gamma(
    target: Target, params: dict, drafter: Drafter, weights: DrafterWeights, window: int = 8
) -> float:
    """Time of a drafter step over that of a target step, batch 1, 256 slots of context."""
    draft = time_draft(drafter, weights, window) / window
    return draft / time_target(target, params, 1)


def time_target(target: Target, params: dict, tokens: int) -> float:
    """Seconds (median) of a target pass over `tokens` tokens with logits, batch 1."""
    c = target.config
    cache = kv_cache.empty(c.layers, 1, c.kv_heads, _SLOTS, c.head_size, jnp.dtype(c.dtype))
    ids = jnp.zeros((1, 1, tokens), jnp.int32)

    @jax.jit
    def run(params: dict, cache: kv_cache.Cache) -> jax.Array:
        positions = _SLOTS // 2 + jnp.arange(tokens)[None, None]
        visible = kv_cache.visible(jnp.full(1, _SLOTS // 2), _SLOTS)
        out = target.apply({"params": params}, ids, positions, cache, visible)
        logits = target.apply({"params": params}, out.hidden, method=Target.logits)
        return jnp.argmax(logits, -1)

    return _median(functools.partial(run, params, cache))


def time_draft(drafter: Drafter, weights: DrafterWeights, window: int) -> float:
    """Seconds (median) of drafting a chain of `window` tokens, batch 1."""
    c = drafter.config
    (prefix,) = kv_cache.empty(1, 1, c.kv_heads, _SLOTS, c.head_size, jnp.dtype(c.dtype))
    at = jnp.full((1, 1), _SLOTS // 2, jnp.int32)
    start = Start(jnp.ones((1, 1, c.width), jnp.dtype(c.dtype)), at * 0, at)

    @jax.jit
    def run(weights: DrafterWeights, prefix: KeyValues) -> jax.Array:
        return window_pass(drafter, weights, prefix, start, greedy(weights.vocab), window)

    return _median(functools.partial(run, weights, prefix))


def _median(call: Callable[[], jax.Array]) -> float:
    jax.block_until_ready(call())  # compilation
    seconds = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))
