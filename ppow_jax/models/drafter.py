"""The drafter: EAGLE-3 (Li et al. 2025), one decoder layer fed with the target's features.

At position p it pairs the target's features at p with the embedding of token p + 1; its prediction is
token p + 2. Beyond the anchor of a window it feeds on its own hidden state. The embedding is the
target's and stays frozen; the head covers the draft vocabulary only.

Shape letters as in `layers`; C width of the target's taps, N size of the draft vocabulary.
"""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ppow_jax.errors import ConfigError
from ppow_jax.models.cache import as_prefix
from ppow_jax.models.layers import Attention, GatedMLP, KeyValues, Linear, RMSNorm, Rotary
from ppow_jax.models.target import TargetConfig, head_matrix


@dataclasses.dataclass(frozen=True)
class DrafterConfig:
    """Shape of an EAGLE-3 drafter; `vocab_size` is the draft vocabulary's."""

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


class DrafterWeights(NamedTuple):
    """All that a drafter needs at run time.

    Attributes:
      params: the trained parameters, a nested dict.
      embedding: `[V, D]`, the target's, frozen.
      vocab: int32 `[N]`, target ids of the draft ids, ascending.
    """

    params: dict
    embedding: jax.Array
    vocab: jax.Array


def weights_of(params: dict, target_params: dict, vocab_N: jax.Array) -> DrafterWeights:
    """The drafter's parameters with the target's frozen embedding."""
    return DrafterWeights(params, target_params["embedding"]["embedding"], vocab_N)


class Drafter(nn.Module):
    """One decoder layer on concat(norm(embedding), norm(hidden)), with its own head."""

    config: DrafterConfig

    def setup(self) -> None:
        c = self.config
        dtype = jnp.dtype(c.dtype)
        self.fuse = Linear(c.width, dtype)
        self.embedding_norm = RMSNorm(c.norm_epsilon)
        self.hidden_norm = RMSNorm(c.norm_epsilon)
        self.attention = Attention(c.heads, c.kv_heads, c.head_size, c.width, Rotary(c.rope_theta), dtype)
        self.mlp_norm = RMSNorm(c.norm_epsilon)
        self.mlp = GatedMLP(c.mlp_hidden, c.width, dtype)
        self.norm = RMSNorm(c.norm_epsilon)
        self.head = Linear(c.vocab_size, dtype)

    def features(self, taps: jax.Array) -> jax.Array:
        """The target's taps `[..., C]` fused to the drafter's width `[..., D]`."""
        return self.fuse(taps.astype(self.config.dtype))

    def inputs(self, embeddings: jax.Array, hidden: jax.Array) -> jax.Array:
        """What attention reads of a token, `[..., 2 D]`: its embedding and the hidden state, normed."""
        embeddings = embeddings.astype(self.config.dtype)
        return jnp.concatenate([self.embedding_norm(embeddings), self.hidden_norm(hidden)], -1)

    def keys_values(self, embeddings: jax.Array, hidden: jax.Array, positions: jax.Array) -> KeyValues:
        """Keys and values of tokens `[B, W, K, D]`, by window; all that a prefix needs."""
        return self.attention.keys_values(self.inputs(embeddings, hidden), positions)

    def __call__(
        self,
        embeddings_BxWx1xD: jax.Array,
        hidden_BxWx1xD: jax.Array,
        positions_BxWx1: jax.Array,
        prefix: KeyValues,
        visible_BxWxS: jax.Array,
        own: KeyValues | None,
    ) -> jax.Array:
        """One step: the next hidden state, before the final norm, `[B, W, 1, D]`.

        `own` holds the window's keys so far, this token's included; None at the anchor, whose key is
        in the prefix already.
        """
        x = self.inputs(embeddings_BxWx1xD, hidden_BxWx1xD)
        mask = None if own is None else jnp.ones((1, own.values.shape[3]), bool)
        attended = self.attention(x, positions_BxWx1, prefix, visible_BxWxS, own, mask)
        hidden = hidden_BxWx1xD + attended
        return hidden + self.mlp(self.mlp_norm(hidden))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits `[..., N]` over the draft vocabulary."""
        return self.head(self.norm(hidden)).astype(jnp.float32)

    def everything(self, taps: jax.Array, positions: jax.Array) -> jax.Array:
        """Touches every parameter, for `init`; taps `[B, 1, T, C]`."""
        hidden = self.features(taps)
        own = self.keys_values(hidden, hidden, positions)
        (prefix,) = as_prefix([own])
        visible = jnp.ones((1, 1, taps.shape[2]), bool)
        return self.logits(self(hidden[:, :, :1], hidden[:, :, :1], positions, prefix, visible, own))


def drafter_config(
    target: TargetConfig, vocab_size: int, mlp_hidden: int, dtype: str, kv_heads: int = 0
) -> DrafterConfig:
    """The drafter's shape for a target; what is 0 is as in the target's layers.

    More key/value heads than the target's widen the one way by which a token's embedding enters a hidden
    state, the values of attention.

    Raises:
      ConfigError: `kv_heads` does not fit between the target's key/value and query heads.
    """
    kv_heads = kv_heads or target.kv_heads
    if kv_heads % target.kv_heads or target.heads % kv_heads:
        raise ConfigError(
            f"config.drafter.kv_heads: found {kv_heads}, expected 0 or a multiple of {target.kv_heads} "
            f"that divides {target.heads} (the target's key/value and query heads)"
        )
    return DrafterConfig(
        vocab_size=vocab_size,
        width=target.width,
        taps_width=target.width * len(target.taps),
        heads=target.heads,
        kv_heads=kv_heads,
        head_size=target.head_size,
        mlp_hidden=mlp_hidden or target.mlp_hidden,
        rope_theta=target.rope_theta,
        norm_epsilon=target.norm_epsilon,
        dtype=dtype,
    )


def abstract_params(config: DrafterConfig) -> dict:
    """Shapes and dtypes (float32) of the trained parameters."""
    return jax.eval_shape(lambda: _init(config, jax.random.key(0)))


def _init(config: DrafterConfig, key: jax.Array) -> dict:
    taps = jnp.zeros((1, 1, 1, config.taps_width))
    positions = jnp.zeros((1, 1, 1), jnp.int32)
    return Drafter(config).init(key, taps, positions, method=Drafter.everything)["params"]


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
    see docs/experiments.md for what that wins. The MLP stays random if it is not as wide as the target's.
    """
    params = _init(config, key)
    last, D = target_params[f"layers_{target.layers - 1}"], config.width
    fuse = params["fuse"]["weight"]
    params["fuse"]["weight"] = jnp.zeros_like(fuse).at[:, -D:].set(jnp.eye(D))
    for name in ("query", "key", "value"):
        fresh = params["attention"][name]["weight"]  # [..., 2 D]: embedding first, then feature
        weight = last["attention"][name]["weight"]
        if name != "query":
            weight = _repeat_heads(weight, target.kv_heads, config.kv_heads)
        params["attention"][name]["weight"] = fresh.at[:, D:].set(weight)
    params["attention"]["out"] = last["attention"]["out"]
    norm = lambda of: {"scale": of["scale"].astype(jnp.float32) + target.norm_offset}  # noqa: E731
    params["hidden_norm"] = norm(last["attention_norm"])
    params["norm"] = norm(target_params["norm"])
    if config.mlp_hidden == target.mlp_hidden:
        params["mlp"], params["mlp_norm"] = last["mlp"], norm(last["mlp_norm"])
    params["head"]["weight"] = head_matrix(target, target_params)[vocab_N]
    # A copy even where the dtype is the same: training donates the drafter's buffers.
    return jax.tree.map(lambda x: jnp.array(x, jnp.float32), params)


def _repeat_heads(weight_GExD: jax.Array, heads: int, wanted: int) -> jax.Array:
    """Key or value projection with each of its heads repeated: the same attention with more heads."""
    by_head = weight_GExD.reshape(heads, -1, weight_GExD.shape[1])
    return jnp.repeat(by_head, wanted // heads, axis=0).reshape(-1, weight_GExD.shape[1])
