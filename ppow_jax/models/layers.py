"""Building blocks shared by the target and the drafter.

Shape letters, here and in every module that works on models: B batch rows, W windows (or any set of
independent continuations of one row), K tokens of a window, S slots of the shared prefix, D model
width, I input width of an attention layer, H query heads, F key/value heads, R = H / F, E head size,
V vocabulary. Attention has a file of its own, `attention`.
"""

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppow_jax.parallel import partition

FEW_ROWS = 64  # of a product: see there


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

    On a CPU the best block, then the best in it: most of the work is a plain maximum, which XLA's backend
    vectorises; its argmax takes 20 times as long (docs/performance.md). A TPU would copy the blocks first.
    """
    if partition.platform() != "cpu":
        return jnp.argmax(logits, -1).astype(jnp.int32)
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


def softmax_entropy(logits: jax.Array) -> jax.Array:
    """Nats `[...]`, of softmax(logits) `[..., N]`, without gradient."""
    log_probs = log_softmax(jax.lax.stop_gradient(logits))
    return -inner(jnp.exp(log_probs), log_probs)


@jax.custom_vjp
def at_ids(values: jax.Array, ids: jax.Array) -> jax.Array:
    """`[...]`, one value of `[..., N]` each. Its gradient is a comparison, where jax would scatter.

    An id must be one of the N: nothing looks whether it is, as jax would do at every look-up.
    """
    return jnp.take_along_axis(values, ids[..., None], -1, mode="clip")[..., 0]


def _at_ids_forward(values: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple]:
    return at_ids(values, ids), (ids, values.shape[-1])


def _at_ids_backward(kept: tuple, given: jax.Array) -> tuple[jax.Array, None]:
    ids, size = kept
    return jnp.where(jnp.arange(size) == ids[..., None], given[..., None], 0.0), None


at_ids.defvjp(_at_ids_forward, _at_ids_backward)


def draft_ids(vocab_N: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draft ids of target ids, int32, and whether the draft vocabulary has them; where not, the id is any."""
    ids = jnp.minimum(jnp.searchsorted(vocab_N, tokens), len(vocab_N) - 1)
    return ids, vocab_N[ids] == tokens


def _parameter(module: nn.Module, name: str, start: Callable, shape: tuple[int, ...]) -> jax.Array:
    """A parameter, begun with `start` where there is none. flax would trace `start` at every use too."""
    if module.has_variable("params", name):
        return module.get_variable("params", name)
    return module.param(name, start, shape)


class Linear(nn.Module):
    """A matrix `[features, I]`, as checkpoints of language models store it, applied to `[..., I]`."""

    features: int
    dtype: jnp.dtype
    bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        start = nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
        weight = _parameter(self, "weight", start, (self.features, x.shape[-1]))
        out = product(x.astype(self.dtype), weight.astype(self.dtype))
        if self.bias:
            out += _parameter(self, "bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out


class RMSNorm(nn.Module):
    """Root-mean-square normalisation, computed in float32 (Zhang and Sennrich 2019).

    `offset` is added to the scale: Gemma stores scales as their distance from 1.
    """

    epsilon: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = _parameter(self, "scale", nn.initializers.constant(1 - self.offset), (x.shape[-1],))
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
