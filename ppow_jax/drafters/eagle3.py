"""The drafter: EAGLE-3 (Li et al. 2025), a decoder layer (or more) fed with the target's features.

At position p it pairs the target's features at p with the embedding of token p + 1; its prediction is
token p + 2. Beyond the anchor of a window it feeds on its own hidden state. The embedding is the
target's and stays frozen; the head covers the draft vocabulary only.

Shape letters as in `layers`; C width of the target's taps, N size of the draft vocabulary.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppow_jax import keys
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models import rotary
from ppow_jax.models.attention import Attention
from ppow_jax.models.cache import Cache, append
from ppow_jax.models.layers import GatedMLP, Linear, RMSNorm
from ppow_jax.models.target import TargetConfig, head_matrix
from ppow_jax.parallel import partition

_MOST_LAYERS = 1000
EAGLE3 = "eagle3"  # the name of `Drafter` in a config


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Shape of an EAGLE-3 drafter; `vocab_size` is the draft vocabulary's.

    Attributes:
      embedding_size: V of an embedding of its own; 0: it reads the target's.
      layers: decoder layers; those after the first read hidden states alone.
      rope_scaling: keys and values that `rotary.scaled` takes.
      rope_context: the longest text, where the scaling depends on it.
      attention_bias, out_bias, head_norms: see `attention.Attention`.
      taps: how many there are.
      tap_norms: norms of the taps before they are fused: "each", one a tap; "all", one over all; or none.
      normed_residual: whether what the first layer adds to is the hidden state after its norm (the
        speculators library's `norm_before_residual`) and not, as in EAGLE-3, before it.
      module: names the class, `eagle3` or `module:Class` of one's own.
      feeds_normed: whether a step is fed with the hidden state after the final norm (`norm_output` of the
        speculators library) and not, as in EAGLE-3, before it.
    """

    vocab_size: int
    width: int
    taps_width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_hidden: int
    rope_theta: float
    norm_epsilon: float
    dtype: str = "float32"
    embedding_size: int = 0
    layers: int = 1
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    rope_context: int = 0
    attention_bias: bool = False
    out_bias: bool = False
    head_norms: bool = False
    taps: int = 3
    tap_norms: str = ""
    normed_residual: bool = False
    feeds_normed: bool = False
    module: str = EAGLE3


class DrafterWeights(NamedTuple):
    """All that a drafter needs at run time.

    Attributes:
      params: the trained parameters, a nested dict.
      embedding: `[V, D]`, its own or the target's, which is frozen.
      vocab: int32 `[N]`, target ids of the draft ids, ascending.
    """

    params: dict
    embedding: jax.Array
    vocab: jax.Array


def weights_of(params: dict, target_params: dict, vocab_N: jax.Array) -> DrafterWeights:
    """The drafter's parameters with the embedding that it reads."""
    embedding = params.get("embedding", target_params["embedding"])["embedding"]
    return DrafterWeights(params, embedding, vocab_N)


class DecoderLayer(nn.Module):
    """A decoder layer after the first: Llama's."""

    config: DrafterConfig

    def setup(self) -> None:
        c = self.config
        self.attention_norm, self.mlp_norm = RMSNorm(c.norm_epsilon), RMSNorm(c.norm_epsilon)
        self.attention, self.mlp = _attention(c), GatedMLP(c.mlp_hidden, c.width, jnp.dtype(c.dtype))


def _attention(c: DrafterConfig) -> Attention:
    rope = rotary.scaled(dict(c.rope_scaling), c.rope_theta, c.head_size, c.rope_context)
    head_norm = (c.norm_epsilon, 0.0) if c.head_norms else None
    how = (rope, jnp.dtype(c.dtype), c.attention_bias, c.out_bias, head_norm)
    return Attention(c.heads, c.kv_heads, c.head_size, c.width, *how)


class Drafter(nn.Module):
    """Decoder layers, the first on concat(norm(embedding), norm(hidden)), with its own head."""

    config: DrafterConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.fuse = Linear(c.width, dtype)
        self.embedding_norm = RMSNorm(c.norm_epsilon)
        self.hidden_norm = RMSNorm(c.norm_epsilon)
        self.attention = _attention(c)
        self.mlp_norm = RMSNorm(c.norm_epsilon)
        self.mlp = GatedMLP(c.mlp_hidden, c.width, dtype)
        self.layers = [DecoderLayer(c) for _ in range(c.layers - 1)]
        self.norm = RMSNorm(c.norm_epsilon)
        self.head = Linear(c.vocab_size, dtype)
        if c.embedding_size:
            self.embedding = nn.Embed(c.embedding_size, c.width, dtype=dtype)
        self.tap_norms = [
            RMSNorm(c.norm_epsilon) for _ in range({"each": c.taps, "all": 1, "": 0}[c.tap_norms])
        ]

    def features(self, taps: jax.Array) -> jax.Array:
        """The target's taps `[..., C]` fused to the drafter's width `[..., D]`."""
        taps = taps.astype(self.config.dtype)
        if self.tap_norms:
            parts = jnp.split(taps, len(self.tap_norms), -1)
            normed = [norm(part) for norm, part in zip(self.tap_norms, parts, strict=True)]
            taps = jnp.concatenate(normed, -1)
        return self.fuse(taps)

    def inputs(self, embeddings: jax.Array, hidden: jax.Array) -> jax.Array:
        """What the first attention reads of a token, `[..., 2 D]`: embedding and hidden state, normed."""
        embeddings = embeddings.astype(self.config.dtype)
        return jnp.concatenate([self.embedding_norm(embeddings), self.hidden_norm(hidden)], -1)

    def __call__(
        self,
        embeddings_BxWxKxD: jax.Array,
        hidden_BxWxKxD: jax.Array,
        positions_BxWxK: jax.Array,
        prefix: Cache | None,
        visible_BxWxS: jax.Array | None,
        own: Cache | None = None,
        in_prefix: bool = False,
    ) -> tuple[jax.Array, Cache | None]:
        """A step, or the reading of a text.

        Args:
          embeddings_BxWxKxD: of the tokens after the given positions.
          hidden_BxWxKxD: what is known there: fused features, or the hidden state of the step before.
          positions_BxWxK: int32.
          prefix: what all windows of a row share, by layer.
          visible_BxWxS: bool, the slots of it that a window sees.
          own: what the windows have read of their own so far, by layer.
          in_prefix: whether keys and values of these tokens (anchors) are in the prefix already.

        Returns:
          Hidden states `[B, W, K, D]`, before the final norm unless that is fed on, and `own` with the tokens
          now read.
        """
        x = self.hidden_norm(hidden_BxWxKxD) if self.config.normed_residual else hidden_BxWxKxD
        inputs, read = self.inputs(embeddings_BxWxKxD, hidden_BxWxKxD), []
        layers: tuple[Drafter | DecoderLayer, ...] = (self, *self.layers)
        for i, layer in enumerate(layers):
            if i:
                inputs = layer.attention_norm(x)
            mine = own[i] if own else None
            if not in_prefix:
                mine = append(mine, layer.attention.keys_values(inputs, positions_BxWxK))
                read.append(mine)
            shared = prefix[i] if prefix else None
            x = x + layer.attention(inputs, positions_BxWxK, shared, visible_BxWxS, mine, None)
            x = partition.keep_rows(x + layer.mlp(layer.mlp_norm(x)))
        return self.norm(x) if self.config.feeds_normed else x, tuple(read) or None

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., N]` over the draft vocabulary."""
        return self.head(hidden if self.config.feeds_normed else self.norm(hidden)).astype(jnp.float32)

    def everything(self, taps: jax.Array, positions: jax.Array) -> jax.Array:
        """Touches every parameter, for `init`; taps `[B, 1, T, C]`."""
        hidden = self.features(taps)
        if self.config.embedding_size:
            self.embedding(positions)
        return self.logits(self(hidden, hidden, positions, None, None)[0])


def drafter_of(config: DrafterConfig) -> Drafter:
    """The module of a shape: `Drafter`, or the subclass of it that `module` names.

    Raises:
      ConfigError: there is no such class.
    """
    if config.module == EAGLE3:
        return Drafter(config)
    complaint = (
        f"config.drafter.module: found {config.module!r}, expected {EAGLE3}, or module:Class of a subclass "
        "of ppow_jax.drafters.eagle3.Drafter"
    )
    found = keys.imported(config.module, complaint)
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise ConfigError(f"{complaint} ({found} is none)")
    return found(config)


def drafter_config(
    target: TargetConfig,
    vocab_size: int,
    mlp_hidden: int,
    dtype: str,
    kv_heads: int = 0,
    layers: int = 1,
    width: int = 0,
    module: str = EAGLE3,
) -> DrafterConfig:
    """The drafter's shape for a target; what is 0 is as in the target's layers.

    More key/value heads than the target's widen the one way by which a token's embedding enters a hidden
    state, the values of attention. Of another width than the target it has an embedding of its own, and fewer
    or more heads of the same size.

    Raises:
      ConfigError: heads of the target's size do not make up `width`, `kv_heads` does not fit, or the target
        has fewer tokens than `vocab_size`.
    """
    if vocab_size > target.vocab_size:
        raise ConfigError(
            f"config.drafter.vocab_size: found {vocab_size}, expected at most the target's "
            f"{target.vocab_size}"
        )
    width = width or target.width
    same = width == target.width
    heads = target.heads if same else width // target.head_size
    if not same and (heads < 1 or width % target.head_size):
        raise ConfigError(
            f"config.drafter.width: found {width}, expected 0 or a multiple of {target.head_size}, the "
            "size of the target's heads"
        )
    kv_heads, least = kv_heads or math.gcd(target.kv_heads, heads), target.kv_heads if same else 1
    if kv_heads % least or heads % kv_heads:
        raise ConfigError(
            f"config.drafter.kv_heads: found {kv_heads}, expected 0 or a multiple of {least} that divides "
            f"{heads} (the target's key/value and the drafter's query heads)"
        )
    return DrafterConfig(
        vocab_size=vocab_size,
        width=width,
        taps_width=target.width * len(target.taps),
        heads=heads,
        kv_heads=kv_heads,
        head_size=target.head_size,
        mlp_hidden=mlp_hidden or target.mlp_hidden * width // target.width,
        rope_theta=target.rope_theta,
        norm_epsilon=target.norm_epsilon,
        dtype=dtype,
        embedding_size=0 if same else target.vocab_size,
        layers=layers,
        taps=len(target.taps),
        module=module,
    )


def config_from(values: Any, where: str, module: str = EAGLE3) -> DrafterConfig:
    """A shape as JSON has kept it.

    Args:
      values: its fields.
      where: the file, for errors.
      module: `config.drafter.module`. A file may name no other class of one's own, for that would be run.

    Raises:
      UserError: it is none that a drafter can have, or of another class.
    """
    tuples = lambda value: tuple(value) if isinstance(value, list) else value  # noqa: E731
    try:
        scaling = tuple((key, tuples(value)) for key, value in values.get("rope_scaling", ()))
        config = DrafterConfig(**dict(values) | {"rope_scaling": scaling})
        if config.module not in (EAGLE3, module):
            raise ConfigError(
                f"{where}: found a drafter of the class {config.module!r}, expected {module}; if you trust "
                f"the code that it names, set config.drafter.module={config.module}"
            )
        if not 0 < config.layers <= _MOST_LAYERS:
            raise ValueError(f"{config.layers} layers")
        abstract_params(config)
    except UserError:
        raise
    except Exception as e:  # whatever comes of a shape that cannot be built
        reason = f"{type(e).__name__}: {e}".partition("\n")[0]
        raise UserError(f"{where}: the drafter's shape in it is damaged ({reason}); train again") from e
    return config


def abstract_params(config: DrafterConfig) -> dict:
    """Shapes and dtypes (float32) of the trained parameters."""
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def _init(config: DrafterConfig, key: jax.Array) -> dict:
    taps = jnp.zeros((1, 1, 1, config.taps_width))
    positions = jnp.zeros((1, 1, 1), jnp.int32)
    return drafter_of(config).init(key, taps, positions, method="everything")["params"]


def init_params(
    config: DrafterConfig,
    target: TargetConfig,
    target_params: dict,
    vocab_N: jax.Array,
    key: jax.Array,
) -> dict:
    """Fresh float32 parameters that begin as a piece of the target.

    The fused feature is the highest tap, the decoder layer is the target's last one (it reads the feature;
    what it makes of the embedding is random), norm and head are the target's, the head on `vocab`'s rows:
    see docs/log.md for what that wins. The MLP stays random if it is not as wide as the target's;
    the other layers add nothing at first. A drafter of another width begins with the target's embedding,
    highest tap and head in a random subspace, its layers at random.
    """
    params = _init(config, key)
    D, head = target.width, head_matrix(target, target_params)[vocab_N]
    fuse, subspace = jnp.zeros_like(params["fuse"]["weight"]), jnp.eye(D)
    if config.width == D:
        params |= _last_layer(params, config, target, target_params)
    else:
        square = jax.random.normal(jax.random.fold_in(key, 1), (max(D, config.width),) * 2)
        subspace = jnp.linalg.qr(square)[0][:D, : config.width]  # [the target's width, its own]
        params["embedding"]["embedding"] = target_params["embedding"]["embedding"] @ subspace
        head = head @ subspace
    params["fuse"]["weight"] = fuse.at[:, -D:].set(subspace.T)
    params["head"]["weight"] = head
    for i in range(config.layers - 1):  # adds nothing at first
        for module, leaf in (("attention", "out"), ("mlp", "down")):
            weight = params[f"layers_{i}"][module][leaf]["weight"]
            params[f"layers_{i}"][module][leaf]["weight"] = jnp.zeros_like(weight)
    # A copy even where the dtype is the same: training donates the drafter's buffers.
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


def _last_layer(params: dict, config: DrafterConfig, target: TargetConfig, target_params: dict) -> dict:
    """What a drafter of the target's width takes of its last layer and its final norm."""
    last, D = target_params[f"layers_{target.layers - 1}"], config.width
    attention = dict(params["attention"])
    for name in ("query", "key", "value"):
        fresh = attention[name]["weight"]  # [..., 2 D]: embedding first, then feature
        weight = last["attention"][name]["weight"]
        if name != "query":
            weight = _repeat_heads(weight, target.kv_heads, config.kv_heads)
        attention[name] = attention[name] | {"weight": fresh.at[:, D:].set(weight)}
    attention["out"] = {"weight": last["attention"]["out"]["weight"]}
    norm = lambda of: {"scale": of["scale"].astype(jnp.float32) + target.norm_offset}  # noqa: E731
    taken = {"attention": attention, "hidden_norm": norm(last["attention_norm"])}
    taken["norm"] = norm(target_params["norm"])
    if config.mlp_hidden == target.mlp_hidden:
        taken |= {"mlp": last["mlp"], "mlp_norm": norm(last["mlp_norm"])}
    return taken


def _repeat_heads(weight_FExD: jax.Array, heads: int, wanted: int) -> jax.Array:
    """Key or value projection with each of its heads repeated: the same attention with more heads."""
    by_head = weight_FExD.reshape(heads, -1, weight_FExD.shape[1])
    return jnp.repeat(by_head, wanted // heads, axis=0).reshape(-1, weight_FExD.shape[1])
