"""The one attention of target and drafter.

The K tokens of each of W windows see a prefix that all windows of a row share and, causally or as a tree,
their own window. Prefill is W = 1 with an empty prefix, a decoding step is W = K = 1, the verification of
many drafted windows is the general case. Shape letters as in `layers`.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppow_jax.models import flash, softmax
from ppow_jax.models.cache import KeyValues
from ppow_jax.models.layers import Linear, RMSNorm
from ppow_jax.models.rotary import Rotary, rotate
from ppow_jax.parallel import partition

# a text of so many tokens is attended to in parts of a quarter of that, at most so many
_LONG, _PARTS = 1024, 8


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
    _, W, K, _, _ = queries_BxWxKxHxE.shape
    if own is not None and own_mask is None:
        if prefix is None and flash.applies(queries_BxWxKxHxE, own):
            return flash.causal(queries_BxWxKxHxE, own, scale)
        if W == 1 and K >= _LONG:
            return _attend_in_parts(queries_BxWxKxHxE, prefix, visible, own, scale)
        J = own.values.shape[-2]
        own_mask = jnp.tri(K, J, J - K, dtype=bool)
    return softmax.attend(queries_BxWxKxHxE, prefix, visible, own, own_mask, scale)


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
