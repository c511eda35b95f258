"""Building blocks shared by the target and the drafter.

Shape letters, here and in every module that works on models: B batch rows, W windows (or any set of
independent continuations of one row), K tokens of a window, S slots of the shared prefix, D model
width, I input width of an attention layer, H query heads, F key/value heads, R = H / F, E head size,
V vocabulary.

There is one attention: the K tokens of each of W windows see a prefix that all windows of a row share
and, causally or as a tree, their own window. Prefill is W = 1 with an empty prefix, a decoding step is
W = K = 1, the verification of many drafted windows is the general case.
"""

import functools
import itertools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppow_jax.models import blocks, flash
from ppow_jax.models.cache import KeyValues
from ppow_jax.models.rotary import Rotary, rotate
from ppow_jax.parallel import partition

FEW_ROWS = 64  # of a product: see there
# a text of so many tokens is attended to in parts of a quarter of that, at most so many
_LONG, _PARTS = 1024, 8


@jax.custom_vjp
def product(x: jax.Array, weight_OxI: jax.Array) -> jax.Array:
    """`x @ weight.T`: `[..., I]` times a matrix `[O, I]` is `[..., O]`.

    For few rows, as in the verification of drafts, XLA's CPU backend is up to four times faster with the
    matrix on the left and a number of rows that is a multiple of eight, or four (docs/performance.md). The
    barrier keeps the compiler from undoing that. In the gradient of the matrix jax has that of the result on
    the left, which the backend transposes first. With many rows, as of logits in training, that is the
    largest array of all; then x is on the left here, and the product is transposed.
    """
    dimensions = (((1,), (1,)), ((), ()))
    rows = math.prod(x.shape[:-1])
    if partition.platform() != "cpu" or not 1 < rows <= FEW_ROWS:
        return jax.lax.dot_general(x, weight_OxI, (((x.ndim - 1,), (1,)), ((), ())))
    padded = 4 if rows <= 4 else -(-rows // 8) * 8
    flat = jnp.pad(x.reshape(rows, x.shape[-1]), ((0, padded - rows), (0, 0)))
    out_OxL = jax.lax.optimization_barrier(jax.lax.dot_general(weight_OxI, flat, dimensions))
    return out_OxL[:, :rows].T.reshape(*x.shape[:-1], -1)


def _product_forward(x: jax.Array, weight_OxI: jax.Array) -> tuple[jax.Array, tuple]:
    return product(x, weight_OxI), (x, weight_OxI)


def _product_backward(read: tuple, given: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight_OxI = read
    rows = tuple(range(x.ndim - 1))
    dimensions = ((rows, rows), ((), ()))
    if math.prod(x.shape[:-1]) > x.shape[-1]:
        gradient_OxI = jax.lax.dot_general(x, given, dimensions).T
    else:
        gradient_OxI = jax.lax.dot_general(given, x, dimensions)
    return given @ weight_OxI, gradient_OxI


product.defvjp(_product_forward, _product_backward)


def likeliest(logits: jax.Array) -> jax.Array:
    """int32 index of the largest along the last axis, the first of equals.

    The best block, then the best in it: most of the work is a plain maximum, which XLA's CPU backend
    vectorises; its argmax takes 20 times as long (docs/performance.md).
    """
    blocks = logits.reshape(*logits.shape[:-1], math.gcd(logits.shape[-1], 64), -1)
    block = blocks.max(-1).argmax(-1)
    within = jnp.take_along_axis(blocks, block[..., None, None], -2)[..., 0, :].argmax(-1)
    return (block * blocks.shape[-1] + within).astype(jnp.int32)


def inner(a: jax.Array, b: jax.Array) -> jax.Array:
    """Sum of a * b over the last axis, `[...]` of two `[..., N]`, in full precision.

    Written as a matrix product: XLA's CPU backend takes 30 times as long for a sum over products
    (docs/performance.md).
    """
    return jnp.einsum("...n,...n->...", a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def logsumexp(logits: jax.Array) -> jax.Array:
    """log of the sum of exp(logits), `[...]` of `[..., N]`. The gradient is one pass."""
    return jax.nn.logsumexp(logits, axis=-1)


@logsumexp.defjvp
def _logsumexp_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (logits,), (given,) = primals, tangents
    total = logsumexp(logits)
    return total, jnp.sum(jnp.exp(logits - total[..., None]) * given, -1)


def log_softmax(logits: jax.Array) -> jax.Array:
    """Log-probabilities `[..., N]` of logits, by `logsumexp`."""
    return logits - logsumexp(logits)[..., None]


@jax.custom_vjp
def at_ids(values: jax.Array, ids: jax.Array) -> jax.Array:
    """`[...]`, one value of `[..., N]` each. Its gradient is a comparison, where jax would scatter."""
    return jnp.take_along_axis(values, ids[..., None], -1)[..., 0]


def _at_ids_forward(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple]:
    return at_ids(values, ids), (ids, values.shape[-1])


def _at_ids_backward(kept: tuple, given: jax.Array) -> tuple[jax.Array, None]:
    ids, size = kept
    return jnp.where(jnp.arange(size) == ids[..., None], given[..., None], 0.0), None


at_ids.defvjp(_at_ids_forward, _at_ids_backward)


class Linear(nn.Module):
    """A matrix `[features, I]`, as checkpoints of language models store it, applied to `[..., I]`."""

    features: int
    dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        weight = self.param("weight", start, (self.features, x.shape[-1]))
        out = product(x.astype(self.dtype), weight.astype(self.dtype))
        if self.bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (Zhang and Sennrich 2019).

    `offset` is added to the scale: Gemma stores scales as their distance from 1.
    """

    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
        normed = _normed(x.astype(jnp.float32), self.epsilon)
        return (normed * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _normed(x: jax.Array, epsilon: float) -> jax.Array:
    """x over its root mean square; a gradient of our own, for the sake of `inner`."""
    return x * _inverse_size(x, epsilon)


def _inverse_size(x: jax.Array, epsilon: float) -> jax.Array:
    return jax.lax.rsqrt(inner(x, x)[..., None] / x.shape[-1] + epsilon)


def _normed_forward(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    return _normed(x, epsilon), x


def _normed_backward(epsilon: float, x: jax.Array, given: jax.Array) -> tuple[jax.Array]:
    inverse = _inverse_size(x, epsilon)
    normed = x * inverse
    return (inverse * (given - normed * inner(given, normed)[..., None] / x.shape[-1]),)


_normed.defvjp(_normed_forward, _normed_backward)


def attend(
    queries_BxWxKxHxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues | None,
    own_mask: jax.Array | None,
    scale: float,
) -> jax.Array:
    """Softmax attention over a shared prefix and each window's own tokens, jointly normalised.

    So many windows at a time, or tokens of the only one, that their scores fit into `blocks.VALUES`; and a
    long text in parts, each of which sees no more than what stands before its end. See `flash` for GPUs.

    Args:
      queries_BxWxKxHxE: rotated queries.
      prefix: keys and values of the S slots that all windows of a row share, or None.
      visible: bool `[B, W, S]`, or `[B, W, K, S]`: the prefix slots that a window, or each of its tokens,
        may see.
      own: keys and values of the windows themselves, J tokens each, or None.
      own_mask: bool `[K, J]`, or `[B, W, K, J]`: which of its window's tokens each query may see; None: those
        up to itself, the queries being the last K of the J.
      scale: of the scores.

    Returns:
      `[B, W, K, H * E]`.
    """
    B, W, K, H, _ = queries_BxWxKxHxE.shape
    if own is not None and own_mask is None:
        if prefix is None and flash.applies(queries_BxWxKxHxE, own):
            return flash.causal(queries_BxWxKxHxE, own, scale)
        if W == 1 and K >= _LONG:
            return _attend_in_parts(queries_BxWxKxHxE, prefix, visible, own, scale)
        J = own.values.shape[-2]
        own_mask = jnp.tri(K, J, J - K, dtype=bool)
    slots = sum(kv.values.shape[-2] for kv in (prefix, own) if kv is not None)
    values = partition.share(B, H) * W * K * slots
    if W > 1 and (parts := blocks.count(values, W)) > 1:
        return _attend_by_windows(parts, queries_BxWxKxHxE, prefix, visible, own, own_mask, scale)
    if W == 1 and (parts := blocks.count(values, K)) > 1:
        return _attend_by_tokens(parts, queries_BxWxKxHxE, prefix, visible, own, own_mask, scale)
    return _attend(queries_BxWxKxHxE, prefix, visible, own, own_mask, scale)


def _attend_in_parts(
    queries_Bx1xKxHxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues,
    scale: float,
) -> jax.Array:
    """`attend` of one window, causally, in n parts: (n + 1) / 2n of the work of all at once."""
    K, J = queries_Bx1xKxHxE.shape[2], own.values.shape[-2]
    parts = min(_PARTS, 4 * K // _LONG)
    bounds = [K * part // parts for part in range(parts + 1)]
    found = []
    for start, end in itertools.pairwise(bounds):
        reach = J - K + end
        read = KeyValues(own.keys[..., :reach], own.values[..., :reach, :])
        here = visible if visible is None or visible.ndim == 3 else visible[:, :, start:end]
        mask = jnp.tri(end - start, reach, reach - (end - start), dtype=bool)
        found.append(attend(queries_Bx1xKxHxE[:, :, start:end], prefix, here, read, mask, scale))
    return jnp.concatenate(found, 2)


def _attend_by_windows(
    parts: int,
    queries_BxWxKxHxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues | None,
    own_mask: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`attend`, some windows at a time."""
    each = own_mask if own_mask is not None and own_mask.ndim == 4 else None
    turn = lambda kv: kv and KeyValues(*(x.swapaxes(1, 2) for x in kv))  # noqa: E731

    def some(q: jax.Array, visible: Any, own: Any, each: Any) -> jax.Array:
        mask = own_mask if each is None else each
        return _attend(q, prefix, visible, turn(own), mask, scale)

    return blocks.mapped(some, parts, queries_BxWxKxHxE, visible, turn(own), each)


def _attend_by_tokens(
    parts: int,
    queries_Bx1xKxHxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues | None,
    own_mask: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`attend` of one window, some tokens at a time."""
    shared = visible if visible is not None and visible.ndim == 3 else None
    each = visible[:, 0] if visible is not None and shared is None else None
    mask = own_mask
    if own_mask is not None:
        mask = own_mask[:, 0] if own_mask.ndim == 4 else own_mask[None]

    def some(q: jax.Array, each: Any, mask: Any) -> jax.Array:
        visible = shared if each is None else each[:, None]
        return _attend(q[:, None], prefix, visible, own, None if mask is None else mask[:, None], scale)[:, 0]

    return blocks.mapped(some, parts, queries_Bx1xKxHxE[:, 0], each, mask)[:, None]


def _attend(
    queries_BxWxKxHxE: jax.Array,
    prefix: KeyValues | None,
    visible: jax.Array | None,
    own: KeyValues | None,
    own_mask: jax.Array | None,
    scale: float,
) -> jax.Array:
    """`attend`, all at once."""
    B, W, K, H, E = queries_BxWxKxHxE.shape
    F = next(kv.keys.shape[1] for kv in (prefix, own) if kv is not None)
    q = (queries_BxWxKxHxE * scale).reshape(B, W, K, F, H // F, E).transpose(0, 3, 1, 4, 2, 5)
    parts = []  # (scores, values' product): the two softmaxes are merged without concatenating them
    if prefix is not None:
        assert visible is not None
        s = _prefix_scores(q, prefix.keys)
        mask = visible[:, None, :, None, None] if visible.ndim == 3 else visible[:, None, :, None]
        s = jnp.where(mask, s, -jnp.inf)
        parts.append((s, functools.partial(_weighed, "bgwrks,bgse->bgwrke", prefix.values)))
    if own is not None:
        assert own_mask is not None
        s = jnp.einsum("bgwrke,bgwej->bgwrkj", q, own.keys, preferred_element_type=jnp.float32)
        s = jnp.where(own_mask if own_mask.ndim == 2 else own_mask[:, None, :, None], s, -jnp.inf)
        parts.append((s, functools.partial(_weighed, "bgwrkj,bgwje->bgwrke", own.values)))
    largest = functools.reduce(jnp.maximum, (s.max(-1, keepdims=True) for s, _ in parts))
    weights = [jnp.exp(s - jax.lax.stop_gradient(largest)) for s, _ in parts]
    outs, totals = zip(*(weigh(w) for w, (_, weigh) in zip(weights, parts, strict=True)), strict=True)
    # divided by the sum last: on an accelerator a pass less over the weights
    out = (functools.reduce(jnp.add, outs) / functools.reduce(jnp.add, totals)).astype(q.dtype)
    return out.transpose(0, 2, 4, 1, 3, 5).reshape(B, W, K, H * E)


def _weighed(equation: str, values: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The product of float32 attention weights `[B, F, W, R, K, S]` with values `[..., S, E]`, and their sum.

    On a TPU a large product takes as long as its weights' exponentials, and a sum by itself computes those
    again: there it comes from a column of ones behind the values (docs/scaling.md).
    """
    narrow, (S, E) = weights.astype(values.dtype), values.shape[-2:]
    small = min(S, math.prod(weights.shape[2:5])) < E
    if partition.platform() != "tpu" or small:
        return jnp.einsum(equation, narrow, values), weights.sum(-1, keepdims=True)
    wide = jnp.pad(values, ((0, 0),) * (values.ndim - 1) + ((0, 1),), constant_values=1)
    both = jnp.einsum(equation, narrow, wide, preferred_element_type=jnp.float32)
    return both[..., :E], both[..., E:]


def _prefix_scores(q_BxFxWxRxKxE: jax.Array, keys: jax.Array) -> jax.Array:
    """float32 scores `[B, F, W, R, K, S]` of a prefix's keys, in blocks or not."""
    if keys.ndim == 4:
        return jnp.einsum("bgwrke,bges->bgwrks", q_BxFxWxRxKxE, keys, preferred_element_type=jnp.float32)
    B, F, blocks, E, _ = keys.shape
    # the queries, on the left, are repeated for every block: any other product copies the keys first
    q = jnp.repeat(q_BxFxWxRxKxE.reshape(B, F, 1, -1, E), blocks, 2)
    s = jnp.matmul(q, keys, preferred_element_type=jnp.float32)
    return s.swapaxes(2, 3).reshape(*q_BxFxWxRxKxE.shape[:-1], -1)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; the input may be wider than the model.

    Attributes:
      bias, out_bias: whether queries, keys and values have biases (Qwen2), and the output.
      head_norm: of each head's queries and keys before they are rotated (Qwen3, Gemma 3): a norm's epsilon
        and offset, or None.
      scale: of the scores; 0: E ** -0.5.
    """

    heads: int
    kv_heads: int
    head_size: int
    width: int
    rotary: Rotary
    dtype: jnp.dtype
    bias: bool = False
    out_bias: bool = False
    head_norm: tuple[float, float] | None = None
    scale: float = 0.0

    def setup(self) -> None:
        self.query = Linear(self.heads * self.head_size, self.dtype, self.bias)
        self.key = Linear(self.kv_heads * self.head_size, self.dtype, self.bias)
        self.value = Linear(self.kv_heads * self.head_size, self.dtype, self.bias)
        self.out = Linear(self.width, self.dtype, self.out_bias)
        if self.head_norm:
            self.query_norm, self.key_norm = RMSNorm(*self.head_norm), RMSNorm(*self.head_norm)

    def keys_values(self, x_BxWxKxI: jax.Array, positions_BxWxK: jax.Array) -> KeyValues:
        """Rotated keys and values of the given tokens, by window."""
        shape = (*x_BxWxKxI.shape[:3], self.kv_heads, self.head_size)
        keys = partition.keep_heads(self.key(x_BxWxKxI).reshape(shape))
        keys = rotate(self.key_norm(keys) if self.head_norm else keys, positions_BxWxK, self.rotary)
        values = partition.keep_heads(self.value(x_BxWxKxI).reshape(shape))
        return KeyValues(keys.transpose(0, 3, 1, 4, 2), values.transpose(0, 3, 1, 2, 4))

    def __call__(
        self,
        x_BxWxKxI: jax.Array,
        positions_BxWxK: jax.Array,
        prefix: KeyValues | None,
        visible: jax.Array | None,
        own: KeyValues | None,
        own_mask: jax.Array | None,
    ) -> jax.Array:
        """Attention output `[B, W, K, D]`; see `attend` for the arguments."""
        shape = (*x_BxWxKxI.shape[:3], self.heads, self.head_size)
        queries = partition.keep_heads(self.query(x_BxWxKxI).reshape(shape))
        queries = rotate(
            self.query_norm(queries) if self.head_norm else queries, positions_BxWxK, self.rotary
        )
        scale = self.scale or self.head_size**-0.5
        return self.out(attend(queries, prefix, visible, own, own_mask, scale))


ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}


class GatedMLP(nn.Module):
    """Gated feed-forward layer (Shazeer 2020): down(act(gate(x)) * up(x)); SwiGLU with silu."""

    hidden: int
    width: int
    dtype: jnp.dtype
    activation: str = "silu"

    def setup(self) -> None:
        self.gate = Linear(self.hidden, self.dtype)
        self.up = Linear(self.hidden, self.dtype)
        self.down = Linear(self.width, self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
