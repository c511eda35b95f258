"""Softmax attention of queries over parts of the keys, and its derivative, both in blocks.

A part is the prefix that all windows of a row share, or what each window has of its own. All parts are
normalised together. The derivative keeps no scores: a backward pass computes them again. It knows the sum of
each query's exponentials, and so needs each score once (FlashAttention, arXiv 2205.14135, without a kernel).

Shape letters as in `layers`; F groups of heads that share keys and values, R heads of a group.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.models import blocks
from ppow_jax.models.cache import KeyValues
from ppow_jax.parallel import partition

# Dimensions of keys, values and scores of the prefix and of a window's own; queries are bgwrke.
_PREFIX, _OWN = ("bges", "bgse", "bgwrks"), ("bgwej", "bgwje", "bgwrkj")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    queries_BxWxKxHxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues | None,
    own_mask: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Attention `[B, W, K, H * E]`, see `attention.attend`; there is always a mask where there are keys."""
    return _forward(queries_BxWxKxHxE, prefix, visible, own, own_mask, scale)[0]


def _forward(
    queries: jax.Array, prefix: Any, visible: Any, own: Any, own_mask: Any, scale: float
) -> tuple[jax.Array, tuple]:
    """What `attend` gives, and what its backward pass is given."""

    def some(queries: jax.Array, visible: Any, own: Any, own_mask: Any) -> _Found:
        return _Found(_attended(_grouped(queries, own or prefix, scale), prefix, visible, own, own_mask))

    (out, log_total), _, _ = _in_blocks(some, prefix, queries, visible, own, own_mask)
    return out, (queries, prefix, visible, own, own_mask, out, log_total)


def _backward(scale: float, kept: tuple, dout: jax.Array) -> tuple:
    queries, prefix, visible, own, own_mask, out, log_total = kept
    inner = (dout.astype(jnp.float32) * out).reshape(queries.shape).sum(-1)

    def some(
        queries: Any, visible: Any, own: Any, own_mask: Any, dout: Any, inner: Any, total: Any
    ) -> _Found:
        dout = _grouped(dout.reshape(queries.shape), own or prefix)
        inner, total = (_grouped(x[..., None], own or prefix) for x in (inner, total))
        q = _grouped(queries, own or prefix, scale)
        dq, gradients = jnp.zeros(q.shape, jnp.float32), {}
        for kv, letters, mask in _seen(prefix, visible, own, own_mask):
            of_q, gradients[letters] = _gradient(q, kv, letters, mask, dout, inner, total)
            dq += of_q
        dqueries = (_ungrouped(dq) * scale).reshape(queries.shape).astype(queries.dtype)
        return _Found(dqueries, gradients.get(_OWN), gradients.get(_PREFIX))

    more = (dout, inner, log_total)
    found = _in_blocks(some, prefix, queries, visible, own, own_mask, *more, backward=True)
    cast = functools.partial(jax.tree.map, lambda x, like: x.astype(like.dtype))
    return found.each, cast(found.shared, prefix), None, cast(found.own, own), None


attend.defvjp(_forward, _backward)


class _Found(NamedTuple):
    """What is computed of some queries.

    Attributes:
      each: arrays `[B, W, K, ...]`.
      own: of the keys and values of their windows.
      shared: of those of the prefix, to be added up.
    """

    each: Any
    own: Any = None
    shared: Any = None


def _in_blocks(
    some: Callable[..., _Found],
    prefix: Any,
    queries_BxWxKxHxE: jax.Array,
    visible: Any,
    own: Any,
    own_mask: Any,
    *more: jax.Array,
    backward: bool = False,
) -> _Found:
    """`some(queries, visible, own, own_mask, *more)` of so many windows at a time, or tokens of the only one,
    that their scores fit into `blocks.VALUES`; `more` are arrays `[B, W, K, ...]`. `backward`: it computes
    again what the forward pass has computed."""
    B, W, K, H, _ = queries_BxWxKxHxE.shape
    slots = sum(kv.values.shape[-2] for kv in (prefix, own) if kv is not None)
    parts = blocks.count(partition.share(B, H) * W * K * slots, W if W > 1 else K)
    if parts == 1:
        if backward:  # else a compiler keeps the scores of the forward pass
            queries_BxWxKxHxE = jax.lax.optimization_barrier(queries_BxWxKxHxE)
        return some(queries_BxWxKxHxE, visible, own, own_mask, *more)
    fill = "constant" if backward else "edge"
    once = functools.partial(jax.tree.map, lambda x: x[:, None])
    total = functools.partial(jax.tree.map, lambda x: x.sum(1))

    if W > 1:
        turn = functools.partial(jax.tree.map, lambda x: x.swapaxes(1, 2))
        masks = own_mask if own_mask is not None and own_mask.ndim == 4 else None

        def windows(queries: Any, visible: Any, own: Any, masks: Any, *more: Any) -> _Found:
            found = some(queries, visible, turn(own), own_mask if masks is None else masks, *more)
            return _Found(found.each, turn(found.own), once(found.shared))

        found = blocks.mapped(windows, parts, queries_BxWxKxHxE, visible, turn(own), masks, *more, fill=fill)
        return _Found(found.each, turn(found.own), total(found.shared))

    row = functools.partial(jax.tree.map, lambda x: x[:, 0])
    shared = visible if visible is not None and visible.ndim == 3 else None
    each = row(visible) if shared is None else None
    masks = own_mask[None] if own_mask is not None and own_mask.ndim == 2 else row(own_mask)

    def tokens(queries: Any, each: Any, masks: Any, *more: Any) -> _Found:
        here = shared if each is None else each[:, None]
        found = some(queries[:, None], here, own, None if masks is None else masks[:, None], *once(more))
        return _Found(row(found.each), once(found.own), once(found.shared))

    found = blocks.mapped(tokens, parts, row(queries_BxWxKxHxE), each, masks, *row(more), fill=fill)
    return _Found(once(found.each), total(found.own), total(found.shared))


def _grouped(x_BxWxKxHxE: jax.Array, kv: KeyValues, scale: float = 1.0) -> jax.Array:
    """`[B, F, W, R, K, E]`: heads by the keys that they read."""
    B, W, K, H, E = x_BxWxKxHxE.shape
    F = kv.keys.shape[1]
    return (x_BxWxKxHxE * scale).reshape(B, W, K, F, H // F, E).transpose(0, 3, 1, 4, 2, 5)


def _ungrouped(x_BxFxWxRxKxE: jax.Array) -> jax.Array:
    """`[B, W, K, H * E]`."""
    B, _, W, _, K, _ = x_BxFxWxRxKxE.shape
    return x_BxFxWxRxKxE.transpose(0, 2, 4, 1, 3, 5).reshape(B, W, K, -1)


def _attended(
    q: jax.Array, prefix: Any, visible: Any, own: Any, own_mask: Any
) -> tuple[jax.Array, jax.Array]:
    """The output `[B, W, K, H * E]`, and the logarithm of each query's exponentials' sum `[B, W, K, H]`."""
    parts = [(kv, of, _scores(q, kv, of, mask)) for kv, of, mask in _seen(prefix, visible, own, own_mask)]
    largest = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for _, _, s in parts))
    found = [_weighed(of, kv.values, jnp.exp(s - largest)) for kv, of, s in parts]
    outs, totals = zip(*found, strict=True)
    total = functools.reduce(jnp.add, totals)
    # divided by the sum last: on an accelerator a pass less over the weights
    out = (functools.reduce(jnp.add, outs) / total).astype(q.dtype)
    return _ungrouped(out), _ungrouped(largest + jnp.log(total))


def _gradient(
    q: jax.Array,
    kv: KeyValues,
    letters: tuple[str, str, str],
    mask: jax.Array,
    dout: jax.Array,
    inner: jax.Array,
    log_total: jax.Array,
) -> tuple[jax.Array, KeyValues]:
    """A part's gradients: of the queries, and of its keys and values, in float32."""
    keys, values, scores = letters
    assert kv.keys.ndim == len(keys), "keys in blocks have no gradient"
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    # in the values' dtype: on a TPU this takes as long as these are written and read
    weights = jnp.exp(_scores(q, kv, letters, mask) - log_total).astype(kv.values.dtype)
    dweights = product(f"bgwrke,{values}->{scores}", dout, kv.values)
    dscores = (weights.astype(jnp.float32) * (dweights - inner)).astype(kv.keys.dtype)
    dkeys = product(f"{scores},bgwrke->{keys}", dscores, q)
    dvalues = product(f"{scores},bgwrke->{values}", weights, dout)
    return product(f"{scores},{keys}->bgwrke", dscores, kv.keys), KeyValues(dkeys, dvalues)


def _seen(prefix: Any, visible: Any, own: Any, own_mask: Any) -> list[tuple[KeyValues, Any, jax.Array]]:
    """The parts that there are, with the dimensions' names and the mask `[..., W, 1, K, S]` of each."""
    found = []
    if prefix is not None:
        mask = visible[:, None, :, None, None] if visible.ndim == 3 else visible[:, None, :, None]
        found.append((prefix, _PREFIX, mask))
    if own is not None:
        found.append((own, _OWN, own_mask if own_mask.ndim == 2 else own_mask[:, None, :, None]))
    return found


def _scores(q: jax.Array, kv: KeyValues, letters: tuple[str, str, str], mask: jax.Array) -> jax.Array:
    """float32 scores, -inf where a key is not seen."""
    if letters == _PREFIX:
        s = _prefix_scores(q, kv.keys)
    else:
        s = jnp.einsum("bgwrke,bgwej->bgwrkj", q, kv.keys, preferred_element_type=jnp.float32)
    return jnp.where(mask, s, -jnp.inf)


def _prefix_scores(q_BxFxWxRxKxE: jax.Array, keys: jax.Array) -> jax.Array:
    """float32 scores `[B, F, W, R, K, S]` of a prefix's keys, in blocks or not."""
    if keys.ndim == 4:
        return jnp.einsum("bgwrke,bges->bgwrks", q_BxFxWxRxKxE, keys, preferred_element_type=jnp.float32)
    B, F, parts, E, _ = keys.shape
    # the queries, on the left, are repeated for every block: any other product copies the keys first
    q = jnp.repeat(q_BxFxWxRxKxE.reshape(B, F, 1, -1, E), parts, 2)
    s = jnp.matmul(q, keys, preferred_element_type=jnp.float32)
    return s.swapaxes(2, 3).reshape(*q_BxFxWxRxKxE.shape[:-1], -1)


def _weighed(
    letters: tuple[str, str, str], values: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The product of float32 attention weights `[B, F, W, R, K, S]` with values `[..., S, E]`, and their sum.

    On a TPU a large product takes as long as its weights' exponentials, and a sum by itself computes those
    again: there it comes from a column of ones behind the values (docs/scaling.md).
    """
    equation = f"{letters[2]},{letters[1]}->bgwrke"
    narrow, (S, E) = weights.astype(values.dtype), values.shape[-2:]
    small = min(S, math.prod(weights.shape[2:5])) < E
    if partition.platform() != "tpu" or small:
        return jnp.einsum(equation, narrow, values), weights.sum(-1, keepdims=True)
    wide = jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, 1),), constant_values=1)
    both = jnp.einsum(equation, narrow, wide, preferred_element_type=jnp.float32)
    return both[..., :E], both[..., E:]
