"""Induction heads for a fresh drafter: attention that proposes what followed the same token before.

Much of what a target writes repeats its context: names, numbers, identifiers. A drafter that starts as a
piece of the target does not find that out from a few thousand texts: it learns to propose frequent
tokens and all but never a rare one. Copying is a circuit of one layer here, and it can be written
down (induction heads: Olsson et al. 2022). At position p a drafter's key reads the target's features at p,
which tell what token p is, and its value the embedding of token p + 1. So a head whose queries look for the
token just emitted attends where that token was read before, and carries what followed it to the output.
docs/log.md has what that wins; training goes on from there with the same parameters as ever.

Shape letters as in `eagle3`; I = 2 D, what queries, keys and values read: embedding, then feature.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.drafters.eagle3 import Drafter, DrafterConfig

_LOW_TAP = 8.0  # share of the lowest tap, in which tokens are plainest, in the fused feature
_MATCH = 10.0  # mean attention logit between a token and its own features
_BOOST = 20.0  # mean logit that a token gains by being copied
_RIDGE = 1e-2  # of the mean variance


class Moments(NamedTuple):
    """Sums over positions of texts.

    Attributes:
      positions: `[]`, how many.
      square: `[]`, mean squares of fused features.
      inputs: `[I]`, what a position's token (as a query sees it) and features (as a key does) look like.
      products: `[I, I]`, of the same with itself.
    """

    positions: jax.Array
    square: jax.Array
    inputs: jax.Array
    products: jax.Array


def begin(
    drafter: Drafter,
    params: dict,
    embedding_VxD: jax.Array,
    head_VxD: jax.Array,
    texts: Iterable[tuple[jax.Array, jax.Array, jax.Array]],
) -> dict:
    """Turns the last third of a fresh drafter's key/value heads, at least one, into induction heads.

    Args:
      drafter: the module.
      params: from `init_params`, float32.
      embedding_VxD: the target's.
      head_VxD: the target's output matrix.
      texts: some thousand positions to learn from how features tell tokens: the target's taps
        `[B, T, C]`, tokens int32 `[B, T]`, and which of them are text, bool `[B, T]`.
    """
    params = _with_low_tap(params, drafter.config)
    total = None
    for taps, tokens, real in texts:
        found = _moments(drafter, params, embedding_VxD, taps, tokens, real)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return _install(drafter, params, embedding_VxD, head_VxD, total)


def _with_low_tap(params: dict, config: DrafterConfig) -> dict:
    """The fused feature with a part of the lowest tap, if it is not the only one."""
    if config.taps_width == config.width:
        return params
    weight = params["fuse"]["weight"]
    return params | {"fuse": {"weight": weight.at[:, : config.width].add(_LOW_TAP * jnp.eye(config.width))}}


@functools.partial(jax.jit, static_argnames="drafter")
def _moments(
    drafter: Drafter,
    params: dict,
    embedding_VxD: jax.Array,
    taps_BxTxC: jax.Array,
    tokens_BxT: jax.Array,
    real_BxT: jax.Array,
) -> Moments:
    """The first position, where a target keeps no token but its attention sink, is left out."""
    apply = lambda method, *args: drafter.apply({"params": params}, *args, method=method)  # noqa: E731
    hidden = apply(Drafter.features, taps_BxTxC)
    inputs = apply(Drafter.inputs, embedding_VxD[tokens_BxT], hidden).astype(jnp.float32)
    weight = real_BxT.at[:, 0].set(False).astype(jnp.float32)
    return Moments(
        weight.sum(),
        (weight * jnp.square(hidden.astype(jnp.float32)).mean(-1)).sum(),
        jnp.einsum("bt,btm->m", weight, inputs),
        jnp.einsum("bt,btm,btn->mn", weight, inputs, inputs),
    )


@functools.partial(jax.jit, static_argnames="drafter")
def _install(
    drafter: Drafter, params: dict, embedding_VxD: jax.Array, head_VxD: jax.Array, moments: Moments
) -> dict:
    """Writes the heads' rows of query, key and value, and their columns of out."""
    c = drafter.config
    groups, queries = max(1, c.kv_heads // 3), c.heads // c.kv_heads
    scale = params["embedding_norm"]["scale"], params["norm"]["scale"]
    look, show = _matching(c, moments)
    read, write = _copying(c, moments, _normed(embedding_VxD) * scale[0], head_VxD * scale[1], groups)
    blank = jnp.zeros((c.head_size, c.width))
    weights = {name: params["attention"][name]["weight"] for name in ("query", "key", "value", "out")}
    for g in range(groups):
        kv = (c.kv_heads - groups + g) * c.head_size
        own = slice(g * c.head_size, (g + 1) * c.head_size)
        rows = jnp.concatenate([blank, show.T], 1)
        weights["key"] = weights["key"].at[kv : kv + c.head_size].set(rows)
        rows = jnp.concatenate([read[:, own].T, blank], 1)
        weights["value"] = weights["value"].at[kv : kv + c.head_size].set(rows)
        for q in range(queries):  # the query heads of a group share keys and values: they do the same
            at = kv * queries + q * c.head_size
            rows = jnp.concatenate([look.T, blank], 1)
            weights["query"] = weights["query"].at[at : at + c.head_size].set(rows)
            weights["out"] = weights["out"].at[:, at : at + c.head_size].set(write[:, own] / queries)
    return params | {"attention": {name: {"weight": w} for name, w in weights.items()}}


def _matching(config: DrafterConfig, moments: Moments) -> tuple[jax.Array, jax.Array]:
    """Projections `[D, E]` of an embedding, for queries, and of features, for keys, that agree on the token.

    They are the directions of greatest canonical correlation (Hotelling 1936), on the half of a head's
    dimensions that rotary positions turn least: two tokens should match whatever their distance.
    """
    D, half = config.width, config.head_size // 2
    slow = jnp.arange(half // 2, half)
    slow = jnp.concatenate([slow, slow + half])
    second = moments.products / moments.positions
    clean = [_without(moments.inputs[:D]), _without(moments.inputs[D:])]
    tokens, features = clean[0] @ second[:D, :D] @ clean[0], clean[1] @ second[D:, D:] @ clean[1]
    white = [_inverse_root(tokens), _inverse_root(features)]
    u, correlation, vt = jnp.linalg.svd(white[0] @ clean[0] @ second[:D, D:] @ clean[1] @ white[1])
    n = min(len(slow), D)
    u, correlation, v = u[:, :n], correlation[:n], vt[:n].T
    gain = jnp.sqrt(_MATCH * config.head_size**0.5 / jnp.sum(correlation**2))
    place = jnp.zeros((D, config.head_size)).at[:, slow[:n]]
    look = place.set(gain * clean[0] @ white[0] @ u)
    return look, place.set(gain * clean[1] @ white[1] @ (v * correlation))


def _copying(
    config: DrafterConfig, moments: Moments, inputs_VxD: jax.Array, outputs_VxD: jax.Array, groups: int
) -> tuple[jax.Array, jax.Array]:
    """Projections `[D, groups * E]` from an embedding to values and from these to a hidden state that
    raises the logit of the same token: the directions in which both matrices vary together most."""
    inputs_VxD = inputs_VxD @ _without(inputs_VxD.mean(0))
    outputs = outputs_VxD @ _without(outputs_VxD.mean(0))
    u, _, vt = jnp.linalg.svd(outputs.T @ inputs_VxD)
    n = groups * config.head_size
    read, write = _columns(vt.T, n), _columns(u, n)
    own_V = jnp.sum((outputs @ write) * (inputs_VxD @ read), -1)
    rms = jnp.sqrt(moments.square / moments.positions)
    return read, write * _BOOST * rms / own_V.mean()


def _columns(matrix: jax.Array, n: int) -> jax.Array:
    """The first n columns; zeros where there are fewer."""
    return jnp.pad(matrix[:, :n], ((0, 0), (0, max(0, n - matrix.shape[1]))))


def _normed(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True))


def _without(direction_D: jax.Array) -> jax.Array:
    """The projection `[D, D]` that takes a direction out."""
    unit = direction_D / jnp.linalg.norm(direction_D)
    return jnp.eye(len(unit)) - jnp.outer(unit, unit)


def _inverse_root(covariance: jax.Array) -> jax.Array:
    """The inverse square root of a covariance with a ridge."""
    size = len(covariance)
    values, vectors = jnp.linalg.eigh(covariance + _RIDGE * jnp.trace(covariance) / size * jnp.eye(size))
    return (vectors / jnp.sqrt(values)) @ vectors.T
