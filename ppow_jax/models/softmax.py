"""Softmax attention of queries over parts of the keys, all at once, and its derivative.

A part is the prefix that all windows of a row share, or what each window has of its own. All parts are
normalised together. The derivative keeps no scores: a backward pass computes them again and, as it knows the
sum of each query's exponentials, reads every score once (FlashAttention, arXiv 2205.14135, without its
kernel). What it keeps, `blocks` keeps too.

Shape letters as in `layers`; F groups of heads that share keys and values, R heads of a group.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ppow_jax.models import blocks
from ppow_jax.models.cache import KeyValues
from ppow_jax.parallel import partition

# Dimensions of keys, values and scores of the prefix and of a window's own; queries are bgwrke.
_PREFIX, _OWN = ("bges", "bgse", "bgwrks"), ("bgwej", "bgwje", "bgwrkj")


@jax.custom_vjp
def attend(
    q_BxFxWxRxKxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues | None,
    own_mask: jax.Array | None,
) -> jax.Array:
    """Attention of queries that are scaled and grouped: `[B, F, W, R, K, E]`. See `attention.attend`."""
    return _forward(q_BxFxWxRxKxE, prefix, visible, own, own_mask)[0]


def _forward(q: jax.Array, *parts: Any) -> tuple[jax.Array, tuple]:
    """What `attend` gives, and what the backward pass is given."""
    scored = [(kv, letters, _scores(q, kv, letters, mask)) for kv, letters, mask in _seen(*parts)]
    largest = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for _, _, s in scored))
    largest = jax.lax.stop_gradient(largest)
    found = [_weighed(letters, kv.values, jnp.exp(s - largest)) for kv, letters, s in scored]
    outs, totals = zip(*found, strict=True)
    total = functools.reduce(jnp.add, totals)
    # divided by the sum last: on an accelerator a pass less over the weights
    out = blocks.keep((functools.reduce(jnp.add, outs) / total).astype(q.dtype))
    return out, (q, *parts, out, blocks.keep(largest + jnp.log(total)))


def _backward(kept: tuple, dout: jax.Array) -> tuple:
    q, prefix, visible, own, own_mask, out, log_total = kept
    inner = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    dq, gradients = jnp.zeros(q.shape, jnp.float32), {}
    for kv, letters, mask in _seen(prefix, visible, own, own_mask):
        keys, values, scores = letters
        assert kv.keys.ndim == len(keys), "keys in blocks have no gradient"
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        # in the values' dtype: a TPU is as fast as it reads and writes these
        weights = jnp.exp(_scores(q, kv, letters, mask) - log_total).astype(kv.values.dtype)
        dweights = product(f"bgwrke,{values}->{scores}", dout, kv.values)
        dscores = (weights.astype(jnp.float32) * (dweights - inner)).astype(kv.keys.dtype)
        dq += product(f"{scores},{keys}->bgwrke", dscores, kv.keys)
        dkeys = product(f"{scores},bgwrke->{keys}", dscores, q)
        dvalues = product(f"{scores},bgwrke->{values}", weights, dout)
        gradients[letters] = KeyValues(dkeys.astype(kv.keys.dtype), dvalues.astype(kv.values.dtype))
    return dq.astype(q.dtype), gradients.get(_PREFIX), None, gradients.get(_OWN), None


attend.defvjp(_forward, _backward)


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
