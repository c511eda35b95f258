"""The target: a frozen decoder with feature taps, of any of the families in `families`.

Shape letters as in `layers`; T = K tokens of a text, C = 3 D width of the concatenated taps.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppow_jax.errors import ConfigError
from ppow_jax.models.attention import Attention
from ppow_jax.models.cache import Cache, KeyValues
from ppow_jax.models.layers import GatedMLP, Linear, RMSNorm, product
from ppow_jax.models.rotary import Rotary
from ppow_jax.parallel import partition, processes


@dataclasses.dataclass(frozen=True)
class TargetConfig:
    """Shape of a decoder; what `families` reads from a model's files. The defaults are Llama's.

    Attributes:
      taps: the layers whose *inputs* the drafter sees, 0-based, low to high; the convention of the EAGLE-3
        reference code: (2, n // 2, n - 3). n, the number of layers, stands for the output of the last one.
      rope_divisors, rope_scale: see `rotary.Rotary`; not of layers with wavelengths of their own.
      attention_bias, out_bias, head_norms, query_scale: see `attention.Attention`.
      norm_offset: see `layers.RMSNorm`.
      post_norms: whether attention and MLP have a norm behind them too (Gemma's sandwich).
      activation: of the MLP.
      embedding_scale: what embeddings are multiplied with.
      spans: of each layer, how many tokens it sees, itself included, 0: all; empty: all layers see all.
      local_theta: base of the wavelengths of layers with a span; 0: the wavelengths of the others.
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
    rope_divisors: tuple[float, ...] = ()
    rope_scale: float = 1.0
    attention_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False
    query_scale: float = 0.0
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    spans: tuple[int, ...] = ()
    local_theta: float = 0.0

    def span(self, layer: int) -> int:
        """How many tokens a layer sees; 0: all."""
        return self.spans[layer] if self.spans else 0


def default_taps(layers: int) -> tuple[int, ...]:
    """Inputs of layers 2, n // 2 and n - 3, the taps of EAGLE-3 (Li et al. 2025); (): too few layers."""
    return (2, layers // 2, layers - 3) if layers >= 7 else ()


def with_taps(config: TargetConfig, taps: tuple[int, ...] | None) -> TargetConfig:
    """A target with the taps that `config.target.taps` names; (): its own; None: as it is, nobody reads them.

    Raises:
      ConfigError: they are not among its layers, or none are named and there are too few layers for others.
    """
    if taps is None:
        return config
    n, taps = config.layers, taps or config.taps
    if not taps:
        raise ConfigError(
            f"config.target.taps: found none, expected some: a target of {n} layers is too shallow for the "
            f"usual (2, n // 2, n - 3); name them, ascending from 0 to {n}, such as "
            f"{tuple(sorted({0, n // 2, n}))}"
        )
    if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] > n:
        raise ConfigError(
            f"config.target.taps: found {taps}, expected ascending layers from 0 to {n}, "
            "the number of the target's"
        )
    return dataclasses.replace(config, taps=taps)


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
    """Attention and MLP with residuals, a norm before each and perhaps one behind."""

    config: TargetConfig
    span: int = 0

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        norm = functools.partial(RMSNorm, c.norm_epsilon, c.norm_offset)
        rotary = Rotary(c.rope_theta, c.rope_divisors, c.rope_scale)
        if self.span and c.local_theta:
            rotary = Rotary(c.local_theta)
        head_norm = (c.norm_epsilon, c.norm_offset) if c.head_norms else None
        how = (rotary, dtype, c.attention_bias, c.out_bias, head_norm, c.query_scale)
        self.attention = Attention(c.heads, c.kv_heads, c.head_size, c.width, *how)
        self.mlp = GatedMLP(c.mlp_hidden, c.width, dtype, c.activation)
        self.attention_norm, self.mlp_norm = norm(), norm()
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm(), norm()

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        prefix: KeyValues | None,
        visible: jax.Array | None,
        own_mask: jax.Array | None,
    ) -> tuple[jax.Array, KeyValues]:
        normed = self.attention_norm(x)
        own = self.attention.keys_values(normed, positions)
        attended = self.attention(normed, positions, prefix, visible, own, own_mask)
        x = x + (self.attention_post_norm(attended) if self.config.post_norms else attended)
        after = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(after) if self.config.post_norms else after), own


@functools.partial(jax.jit, static_argnums=0)
def _layer(block: Block, params: dict, *arguments: Any) -> tuple[jax.Array, KeyValues]:
    """A layer. Being a program of its own, it is traced and lowered once for all that are alike."""
    return block.apply({"params": params}, *arguments)


class Target(nn.Module):
    """The decoder. `apply` is pure; the parameters are a plain nested dict."""

    config: TargetConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.embedding = nn.Embed(c.vocab_size, c.width, dtype=dtype)
        self.layers = [Block(c, c.span(i)) for i in range(c.layers)]
        self.norm = RMSNorm(c.norm_epsilon, c.norm_offset)
        if not c.tied_head:
            self.head = Linear(c.vocab_size, dtype)

    def __call__(
        self,
        tokens_BxWxK: jax.Array,
        positions_BxWxK: jax.Array,
        cache: Cache | None = None,
        visible_BxWxS: jax.Array | None = None,
        own_mask: jax.Array | None = None,
        places_BxS: jax.Array | None = None,
    ) -> TargetOutput:
        """Runs the K tokens of every window, each window seeing `visible` slots of the row's cache.

        Of its own window a token sees what the mask `[B, W, K, K]` says; without one, itself and those before
        it. `places` are the positions of the slots, None: their numbers; layers with a span ask for them.
        """
        c = self.config
        x = self.embedding(tokens_BxWxK)
        if c.embedding_scale != 1:
            x *= jnp.asarray(c.embedding_scale, x.dtype)
        x = partition.keep_rows(x)
        masks = {
            span: _within(span, positions_BxWxK, visible_BxWxS, own_mask, places_BxS)
            for span in {c.span(i) for i in range(c.layers)}
        }
        inputs, new = {}, []
        for i, layer in enumerate(self.layers):
            inputs[i] = x
            prefix = None if cache is None else cache[i]
            arguments = (x, positions_BxWxK, prefix, *masks[c.span(i)])
            if self.is_initializing():
                x, own = layer(*arguments)
            else:
                x, own = _layer(Block(c, c.span(i), parent=None), layer.variables["params"], *arguments)
            x = partition.keep_rows(x)
            new.append(own)
        inputs[c.layers] = x
        taps = jnp.concatenate([inputs[i] for i in c.taps], -1)
        return TargetOutput(self.norm(x), taps, tuple(new))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., V]` of final hidden states `[..., D]`."""
        if self.config.tied_head:
            return product(hidden, self.embedding.embedding.astype(self.config.dtype)).astype(jnp.float32)
        return self.head(hidden).astype(jnp.float32)

    def everything(self, tokens_BxWxK: jax.Array, positions_BxWxK: jax.Array) -> jax.Array:
        """Logits of a text; touches every parameter, for `init`."""
        return self.logits(self(tokens_BxWxK, positions_BxWxK).hidden)


def _within(
    span: int,
    positions_BxWxK: jax.Array,
    visible_BxWxS: jax.Array | None,
    own_mask: jax.Array | None,
    places_BxS: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """`visible` and the own mask of a layer that sees `span` tokens; 0: no fewer than any other."""
    if not span:
        return visible_BxWxS, own_mask
    K = positions_BxWxK.shape[-1]
    own_mask = jnp.tri(K, dtype=bool) if own_mask is None else own_mask
    own_mask = own_mask & (positions_BxWxK[..., None] - positions_BxWxK[..., None, :] < span)
    if visible_BxWxS is None:
        return None, own_mask
    places = jnp.arange(visible_BxWxS.shape[-1]) if places_BxS is None else places_BxS[:, None, None]
    return visible_BxWxS[:, :, None] & (positions_BxWxK[..., None] - places < span), own_mask


def head_matrix(config: TargetConfig, params: dict) -> jax.Array:
    """The output matrix `[V, D]`, whether tied or not."""
    if config.tied_head:
        return params["embedding"]["embedding"]
    return params["head"]["weight"]


def draft_head(config: TargetConfig, params: dict, vocab_N: jax.Array) -> jax.Array:
    """The output matrix over the draft vocabulary `[N, D]`: see `partition.at_hand`."""
    return partition.at_hand(head_matrix(config, params)[vocab_N])


def head_at_hand(config: TargetConfig, params: dict) -> dict:
    """The parameters for a loop of `Target.logits`: see `partition.at_hand`."""
    module, leaf = ("embedding", "embedding") if config.tied_head else ("head", "weight")
    return params | {module: params[module] | {leaf: partition.at_hand(params[module][leaf])}}


def abstract_params(config: TargetConfig) -> dict:
    """Shapes and dtypes of the parameters, without allocating them."""
    token, plain = jnp.zeros((1, 1, 1), jnp.int32), dataclasses.replace(config, taps=(0,))
    init = lambda key: Target(plain).init(key, token, token, method=Target.everything)  # noqa: E731
    shapes = jax.eval_shape(init, jax.random.key(0))["params"]
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(config.dtype)), shapes)


def fingerprint(config: TargetConfig, params: dict) -> str:
    """sha256 that names a target whatever file it came from and whatever dtype it runs in.

    It covers the shape and 256 evenly spaced values of every tensor, rounded to bfloat16.
    """
    import hashlib

    plain = {f.name: f.default for f in dataclasses.fields(config)}
    shape = dataclasses.asdict(config) | {"dtype": None, "taps": None}
    # what is as in Llama is not named: a field that is new to us changes no target's name
    shape = {k: v for k, v in shape.items() if k == "dtype" or v != plain[k]}
    digest = hashlib.sha256(repr(sorted(shape.items(), key=str)).encode())
    for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda kv: str(kv[0])):
        step = max(1, leaf.size // 256)
        sample = processes.host(leaf.reshape(-1)[::step][:256].astype(jnp.bfloat16))
        digest.update(jax.tree_util.keystr(path).encode() + sample.tobytes())
    return digest.hexdigest()
