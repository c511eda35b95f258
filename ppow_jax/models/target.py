"""The target: a frozen Llama-style decoder with feature taps.

Shape letters as in `layers`; T = K tokens of a text, C = 3 D width of the concatenated taps.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.models.cache import Cache
from ppow_jax.models.layers import Attention, GatedMLP, KeyValues, Linear, RMSNorm, product


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Shape of a Llama-style decoder.

    `taps` are the layers whose *inputs* the drafter sees, 0-based, low to high; the convention of the
    EAGLE-3 reference code: (2, n // 2, n - 3).
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_hidden: int
    context: int
    rope_theta: float
    norm_epsilon: float
    tied_head: bool
    taps: tuple[int, ...]
    dtype: str = "float32"


def default_taps(layers: int) -> tuple[int, int, int]:
    """Inputs of layers 2, n // 2 and n - 3, the taps of EAGLE-3 (Li et al. 2025)."""
    return (2, layers // 2, layers - 3)


class TargetOutput(NamedTuple):
    """What one forward pass yields.

    Attributes:
      hidden: `[B, W, K, D]`, after the final norm; `Target.logits` turns it into logits.
      taps: `[B, W, K, C]`, the tapped layer inputs, concatenated low to high.
      new: for each layer the keys and values of the given tokens, by window.
    """

    hidden: jax.Array
    taps: jax.Array
    new: tuple[KeyValues, ...]


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    config: TargetConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.attention_norm = RMSNorm(c.norm_epsilon)
        self.attention = Attention(c.heads, c.kv_heads, c.head_size, c.width, c.rope_theta, dtype)
        self.mlp_norm = RMSNorm(c.norm_epsilon)
        self.mlp = GatedMLP(c.mlp_hidden, c.width, dtype)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        prefix: KeyValues | None,
        visible: jax.Array | None,
        own_mask: jax.Array,
    ) -> tuple[jax.Array, KeyValues]:
        normed = self.attention_norm(x)
        own = self.attention.keys_values(normed, positions)
        x = x + self.attention(normed, positions, prefix, visible, own, own_mask)
        return x + self.mlp(self.mlp_norm(x)), own


class Target(nn.Module):
    """The decoder. `apply` is pure; the parameters are a plain nested dict."""

    config: TargetConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.embedding = nn.Embed(c.vocab_size, c.width, dtype=dtype)
        self.layers = [Block(c) for _ in range(c.layers)]
        self.norm = RMSNorm(c.norm_epsilon)
        if not c.tied_head:
            self.head = Linear(c.vocab_size, dtype)

    def __call__(
        self,
        tokens_BxWxK: jax.Array,
        positions_BxWxK: jax.Array,
        cache: Cache | None = None,
        visible_BxWxS: jax.Array | None = None,
        own_mask_BxWxKxK: jax.Array | None = None,
    ) -> TargetOutput:
        """Runs the K tokens of every window, each window seeing `visible` slots of the row's cache.

        Of its own window a token sees what the mask says; without one, itself and those before it.
        """
        x = self.embedding(tokens_BxWxK)
        K = tokens_BxWxK.shape[-1]
        mask = jnp.tril(jnp.ones((K, K), bool)) if own_mask_BxWxKxK is None else own_mask_BxWxKxK
        inputs, new = {}, []
        for i, layer in enumerate(self.layers):
            inputs[i] = x
            prefix = None if cache is None else cache[i]
            x, own = layer(x, positions_BxWxK, prefix, visible_BxWxS, mask)
            new.append(own)
        taps = jnp.concatenate([inputs[i] for i in self.config.taps], -1)
        return TargetOutput(self.norm(x), taps, tuple(new))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., V]` of final hidden states `[..., D]`."""
        if self.config.tied_head:
            return product(hidden, self.embedding.embedding.astype(self.config.dtype)).astype(jnp.float32)
        return self.head(hidden).astype(jnp.float32)

    def everything(self, tokens_BxWxK: jax.Array, positions_BxWxK: jax.Array) -> jax.Array:
        """Logits of a text; touches every parameter, for `init`."""
        return self.logits(self(tokens_BxWxK, positions_BxWxK).hidden)


def head_matrix(config: TargetConfig, params: dict) -> jax.Array:
    """The output matrix `[V, D]`, whether tied or not."""
    if config.tied_head:
        return params["embedding"]["embedding"]
    return params["head"]["weight"]


def abstract_params(config: TargetConfig) -> dict:
    """Shapes and dtypes of the parameters, without allocating them."""
    token = jnp.zeros((1, 1, 1), jnp.int32)
    init = lambda key: Target(config).init(key, token, token, method=Target.everything)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(config.dtype)), shapes)


def fingerprint(config: TargetConfig, params: dict) -> str:
    """sha256 that names a target whatever file it came from and whatever dtype it runs in.

    It covers the shape and 256 evenly spaced values of every tensor, rounded to bfloat16.
    """
    import hashlib

    shape = dataclasses.asdict(config) | {"dtype": None, "taps": None}
    digest = hashlib.sha256(repr(sorted(shape.items(), key=str)).encode())
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda kv: str(kv[0])):
        step = max(1, leaf.size // 256)
        sample = np.asarray(leaf.reshape(-1)[::step][:256].astype(jnp.bfloat16))
        digest.update(jax.tree_util.keystr(path).encode() + sample.tobytes())
    return digest.hexdigest()
