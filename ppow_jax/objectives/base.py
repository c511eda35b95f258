"""The seam between objectives and the training step (`training.step`).

An objective is a frozen dataclass whose fields are its keys in a training run's section of the config. A step
asks it twice. `signal`, without gradient: which windows to read, and what they are worth. Then, for each
of its `updates`, the drafter steps through those windows: `observe` turns each step's logits into a few
numbers per token, and `loss` adds them up. A batch may go through in parts, one after the other, so whatever
is a mean over the batch is normalised in `signal`, where the whole batch is at hand; or in `summarise`.

Shape letters: B texts, T positions of a text, A anchors, G windows of an anchor, K steps of a window, L some
of the A anchors, N draft vocabulary, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights, weights_of
from ppow_jax.models.layers import at_ids, draft_ids, logsumexp
from ppow_jax.models.target import Target, draft_head
from ppow_jax.models.target_outputs import TargetOutputs

Batch = Mapping[str, jax.Array]  # see data.texts.Texts
# What an objective keeps from step to step; saved with the checkpoint. A nested dict in it is parameters of a
# drafter, and lies on the mesh as such.
Memory = dict[str, Any]
Metrics = dict[str, jax.Array]
Stats = dict[str, jax.Array]  # of every token, [B, A, G, K]


@struct.dataclass
class Models:
    """Target and drafter with their parameters.

    Attributes:
      target, drafter: the modules.
      stops: token ids that end a response.
      gamma: cost of a drafter step over that of a target step.
      target_params: the target's parameters.
      weights: the drafter's parameters, the embedding that it reads, and its vocabulary.
      head_NxD: rows of the target's output matrix for the draft vocabulary: with the target's hidden states
        they give its logits.
    """

    target: Target = struct.field(pytree_node=False)
    drafter: Drafter = struct.field(pytree_node=False)
    stops: tuple[int, ...] = struct.field(pytree_node=False)
    gamma: float = struct.field(pytree_node=False)
    target_params: dict
    weights: DrafterWeights
    head_NxD: jax.Array

    def with_params(self, params: dict) -> "Models":
        """The same with other parameters of the drafter."""
        weights = weights_of(params, self.target_params, self.weights.vocab)
        return dataclasses.replace(self, weights=weights)


def models_of(
    target: Target,
    drafter: Drafter,
    target_params: dict,
    params: dict,
    vocab_N: jax.Array,
    stops: tuple[int, ...] = (),
    gamma: float = 0.0,
) -> Models:
    """`Models` from their parts."""
    weights = weights_of(params, target_params, vocab_N)
    head = draft_head(target.config, target_params, vocab_N)
    return Models(target, drafter, stops, gamma, target_params, weights, head)


class Signal(NamedTuple):
    """What a batch teaches; made once for all updates on it, without gradient. All leaves are `[B, ...]`.

    Attributes:
      anchors: int32 `[B, A]`, positions where windows begin.
      tokens: int32 `[B, A, G, K]`, target ids of what the windows read on; G may be 1 where a group shares
        them.
      weights: by name, float32 `[B, A, G, K]`, what each token counts. They are normalised over the whole
        batch, so that the losses of its parts add up.
      extra: whatever else `observe` and `loss` ask for, as behaviour log-probabilities and advantages.
    """

    anchors: jax.Array
    tokens: jax.Array
    weights: dict[str, jax.Array]
    extra: Any = ()


class Sizes(NamedTuple):
    """What `init` may size its memory by: how many records there are, and the tokens of a text."""

    records: int
    length: int


class Objective(Protocol):
    """What the training step asks of an objective; subclass it for the defaults.

    Attributes:
      window: K.
      updates: optimiser steps on each signal.
    """

    window: int

    @property
    def updates(self) -> int:
        """Optimiser steps on each signal."""
        return 1

    def check(self, draft_vocabulary: int) -> None:
        """Whether the keys suit drafters of so many tokens.

        Raises:
          ConfigError: they do not; the message begins with the key.
        """

    def rounds(self, texts: int) -> int:
        """At most how many turns a loop of `signal` takes that ends when data say so, on so many texts."""
        return 1

    def init(self, sizes: Sizes, params: dict) -> Memory:
        """The memory before the first step.

        Args:
          sizes: what it may be sized by.
          params: the drafter's that the run begins with; a step donates them, so what is kept is a copy.
        """
        return {}

    def signal(
        self,
        models: Models,
        batch: Batch,
        outputs: TargetOutputs,
        memory: Memory,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[Signal, Memory, Metrics]:
        """What this batch teaches.

        Args:
          models: target and drafter; the drafter as it is before the updates.
          batch: the texts.
          outputs: the target's on them.
          memory: as the last step left it.
          step: its number, from 1.
          key: the random key of this step.
        """
        ...

    def prepare(self, models: Models, signal: Signal, batch: Batch, outputs: TargetOutputs) -> Any:
        """What `inputs` and `observe` draw upon at all steps, as `distributions.along_windows`."""
        return ()

    def inputs(self, step: int, signal: Signal, prepared: Any) -> Any:
        """What `observe` is given of every anchor at a step of the windows; leaves `[B, A, ...]`."""
        ...

    def observe(
        self, models: Models, step: int, hidden: jax.Array, logits: jax.Array, inputs: Any, prepared: Any
    ) -> Stats:
        """Numbers of every token at a step of the windows, by name, leaves `[B, L, G]`.

        Args:
          models: target and drafter.
          step: of the windows, from 0.
          hidden: `[B, L, G, D]`, the drafter's hidden states.
          logits: float32 `[B, L, G, N]`, what they say; at step 0 a group shares them, `[B, L, 1, N]`.
          inputs: of these anchors, from `inputs`.
          prepared: from `prepare`.
        """
        ...

    def summarise(self, stats: Stats, signal: Signal) -> dict[str, jax.Array]:
        """Sums over the batch, without gradient, that `loss` asks for; they add up over its parts.

        Where there are some and the batch goes through in parts, the windows are read once more for them.
        """
        return {}

    def loss(self, stats: Stats, signal: Signal, summary: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """The loss and what to log; of a part of a batch, its share in both.

        Args:
          stats: what `observe` found, stacked over the steps, leaves `[B, A, G, K]`.
          signal: of these texts.
          summary: from `summarise`, of the whole batch.

        Returns:
          loss, metrics; both add up over parts, but for metrics named `..._gap`, of which the largest counts.
        """
        ...


def at(values_BxT: jax.Array, positions_BxA: jax.Array) -> jax.Array:
    """Values `[B, A, ...]` at positions, or at the last one where these lie beyond."""
    where = positions_BxA.reshape(*positions_BxA.shape, *[1] * (values_BxT.ndim - 2))
    return jnp.take_along_axis(values_BxT, where, 1, mode="clip")


def along_text(values_BxT: jax.Array, anchors_BxA: jax.Array, first: int, window: int) -> jax.Array:
    """Values `[B, A, K, ...]` along windows of the text, from `first` positions after their anchors on."""
    return jnp.stack([at(values_BxT, anchors_BxA + first + step) for step in range(window)], 2)


def written(batch: Batch, anchors_BxA: jax.Array, real_BxA: jax.Array, window: int) -> jax.Array:
    """bool `[B, A, 1, K]`: whether the target wrote the text's token at each step of a window."""
    T = batch["tokens"].shape[1]
    positions_BxAxK = anchors_BxA[..., None] + 2 + jnp.arange(window)
    wrote = along_text(batch["assistant"], anchors_BxA, 2, window)
    return (real_BxA[..., None] & (positions_BxAxK < T) & wrote)[:, :, None]


def per_step(mask_BxAxGxK: jax.Array) -> jax.Array:
    """float32 weights whose sum over the batch is 1 at each step of the windows, or 0 where none counts."""
    return _normalised(mask_BxAxGxK, mask_BxAxGxK.sum((0, 1, 2)))


def per_token(mask_BxAxGxK: jax.Array) -> jax.Array:
    """float32 weights whose sum is 1 over the batch, or 0 where nothing counts."""
    return _normalised(mask_BxAxGxK, mask_BxAxGxK.sum())


def _normalised(weights: jax.Array, total: jax.Array) -> jax.Array:
    return weights / jnp.where(total > 0, total, 1.0)


def prob_of(logits_BxLxGxN: jax.Array, vocab_N: jax.Array, tokens_BxLxG: jax.Array) -> jax.Array:
    """float32 `[B, L, G]`: the drafter's probabilities of target ids; 0 outside the draft vocabulary."""
    ids, inside = draft_ids(vocab_N, tokens_BxLxG)
    return jnp.exp(at_ids(logits_BxLxGxN, ids) - logsumexp(logits_BxLxGxN)) * inside
