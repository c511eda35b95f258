"""The one primitive: step the drafter from anchors through windows.

Rollouts, teacher-forced scoring and drafting at inference are all `window_pass` with another `choose`. All
training is `known_windows.known_pass`, which has a gradient and knows its tokens before it begins. An anchor
is a position t whose target features are known up to t and whose tokens are known up to t + 1; step j of its
window predicts token t + 2 + j.

Shape letters: B rows, T text positions, A anchors, G windows a group, K steps of a window, N draft
vocabulary, V vocabulary, D width, C taps width, S prefix slots.
"""

import functools
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.models import blocks
from ppow_jax.models.cache import Cache, KeyValues, as_prefix
from ppow_jax.models.cache import visible as visible_slots
from ppow_jax.models.layers import likeliest
from ppow_jax.models.target import Target
from ppow_jax.parallel import partition

# choose(step, hidden_BxAxGxD, logits_BxAxGxN, given) -> (target ids to go on with [B, A, G], statistics). At
# step 0 it is handed [B, A, 1, ...], as a group shares its anchor, and still gives [B, A, G]. It may be asked
# about some anchors only.
Choose = Callable[[int, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
# given(step): what choose is given of every anchor besides, leaves [B, A, ...].
Given = Callable[[int], Any]


def anchor_mask(assistant_BxT: jax.Array) -> jax.Array:
    """bool `[B, T]`: positions t whose prediction, token t + 2, was written by the target."""
    ahead = jnp.pad(assistant_BxT[:, 2:], ((0, 0), (0, 2)))
    return ahead.astype(bool)


class Start(NamedTuple):
    """Where windows begin: fused features `[B, A, D]` and position `[B, A]` of the anchor t, and
    the token `[B, A]` at t + 1."""

    hidden: jax.Array
    token: jax.Array
    position: jax.Array


class Prefix(NamedTuple):
    """The target-conditioned prefix: keys and values of S slots by layer, fused features `[B, S, D]`."""

    keys_values: Cache
    hidden: jax.Array


def _embedded(weights: DrafterWeights, tokens: jax.Array) -> jax.Array:
    # left alone the compiler lets every device embed all rows of a batch, however many there are
    return partition.keep_rows(weights.embedding[tokens])


def prefix_pass(
    drafter: Drafter,
    weights: DrafterWeights,
    taps_BxTxC: jax.Array,
    next_tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    before: Cache | None = None,
) -> Prefix:
    """Keys, values and fused features of target-conditioned positions.

    Args:
      drafter: the module.
      weights: its weights.
      taps_BxTxC: the target's taps at these positions.
      next_tokens_BxT: the token *after* each position (see `models.drafter`).
      positions_BxT: int32, counted from 0.
      before: what was read of the positions before these; only drafters of several layers ask for it.
    """
    variables, positions_Bx1xT = {"params": weights.params}, positions_BxT[:, None]
    hidden = drafter.apply(variables, taps_BxTxC, method="features")
    inputs = (_embedded(weights, next_tokens_BxT)[:, None], hidden[:, None], positions_Bx1xT)
    visible = before and visible_slots(positions_BxT[:, 0], before[0].values.shape[2])
    _, read = drafter.apply(variables, *inputs, before, visible)
    return Prefix(as_prefix(read), hidden)


def text_prefix(
    drafter: Drafter, weights: DrafterWeights, taps_BxTxC: jax.Array, tokens_BxT: jax.Array
) -> Prefix:
    """`prefix_pass` of whole texts; the last position has no next token and no anchor may use it."""
    next_tokens = jnp.roll(tokens_BxT, -1, axis=1)
    positions = jnp.broadcast_to(jnp.arange(tokens_BxT.shape[1]), tokens_BxT.shape)
    return prefix_pass(drafter, weights, taps_BxTxC, next_tokens, positions)


def text_starts(prefix: Prefix, tokens_BxT: jax.Array, anchors_BxA: jax.Array) -> Start:
    """The windows' beginnings at the given anchors of known texts."""
    hidden = jnp.take_along_axis(prefix.hidden, anchors_BxA[..., None], 1, mode="clip")
    return Start(hidden, jnp.take_along_axis(tokens_BxT, anchors_BxA + 1, 1, mode="clip"), anchors_BxA)


class Windows(NamedTuple):
    """Windows between two steps; W of them a row.

    Attributes:
      hidden: `[B, W, 1, D]`, the drafter's hidden states, whose logits tell what comes next.
      position: int32 `[B, W, 1]` of the token read last.
      visible: bool `[B, W, S]`, the prefix slots that each sees.
      own: keys and values of the tokens beyond the anchors, None before the first of them.
    """

    hidden: jax.Array
    position: jax.Array
    visible: jax.Array
    own: Cache | None


def begin(drafter: Drafter, weights: DrafterWeights, prefix: Cache, start: Start) -> Windows:
    """The first step from every anchor: A windows a row."""
    visible_BxAxS = jnp.arange(prefix[0].values.shape[2]) <= start.position[..., None]
    hidden, _ = drafter.apply(
        {"params": weights.params},
        _embedded(weights, start.token)[:, :, None],
        start.hidden[:, :, None],
        start.position[..., None],
        prefix,
        visible_BxAxS,
        in_prefix=True,
    )
    return Windows(hidden, start.position[..., None], visible_BxAxS, None)


def repeat(windows: Windows, times: int) -> Windows:
    """Every window `times` times, one after the other: W times `times` a row. Before their second step."""
    one = lambda x: jnp.repeat(x, times, axis=1)  # noqa: E731
    return Windows(one(windows.hidden), one(windows.position), one(windows.visible), None)


def branch(windows: Windows, parents_BxW: jax.Array) -> Windows:
    """Windows that go on from those named, of the same row."""

    def pick(leaf: jax.Array, axis: int) -> jax.Array:
        shape = [leaf.shape[0]] + [1] * (leaf.ndim - 1)
        shape[axis] = -1
        return jnp.take_along_axis(leaf, parents_BxW.reshape(shape), axis)

    w = windows
    own = w.own and tuple(KeyValues(pick(kv.keys, 2), pick(kv.values, 2)) for kv in w.own)
    return Windows(pick(w.hidden, 1), pick(w.position, 1), pick(w.visible, 1), own)


def advance(
    drafter: Drafter, weights: DrafterWeights, prefix: Cache, windows: Windows, tokens_BxW: jax.Array
) -> Windows:
    """The next step: every window reads its next token."""
    embeddings, position = _embedded(weights, tokens_BxW)[:, :, None], windows.position + 1
    inputs = (embeddings, windows.hidden, position, prefix, windows.visible, windows.own)
    hidden, own = drafter.apply({"params": weights.params}, *inputs)
    return Windows(hidden, position, windows.visible, own)


_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


def window_pass(
    drafter: Drafter,
    weights: DrafterWeights,
    prefix: Cache,
    start: Start,
    choose: Choose,
    steps: int,
    given: Given = lambda step: (),
) -> Any:
    """Steps the drafter `steps` times from every anchor, through tokens that are chosen on the way.

    Args:
      drafter: the module.
      weights: its weights.
      prefix: S slots by layer; slot p holds position p, and a window sees the slots <= its anchor.
      start: the anchors.
      choose: picks the tokens; its statistics are `[B, A, G]` leaves. It sees so many anchors at a time that
        their logits fit into `blocks.VALUES`.
      steps: K, at least 1.
      given: what `choose` is given at a step.

    Returns:
      The statistics of all steps, stacked to `[B, A, G, K]`.
    """
    through, params = stepping(drafter, weights, prefix, start), head_at_hand(weights, drafter.config.dtype)
    tokens_BxAxG, collected = None, []
    for step in range(steps):
        hidden = through.send(tokens_BxAxG)
        of_step = functools.partial(choose, step)
        tokens_BxAxG, stats = by_parts(drafter, params, of_step, hidden, given(step))
        collected.append(stats)
    return stacked(collected)


def stepping(
    drafter: Drafter, weights: DrafterWeights, prefix: Cache, start: Start, remat: str = "none"
) -> Generator[jax.Array, Any, None]:
    """Gives the hidden states `[B, A, G, D]` of one step after the other, and is sent the tokens `[B, A, G]`
    to go on with: to begin with None, as there are none before step 0, where G is 1."""
    first: Callable[..., Windows] = functools.partial(begin, drafter)
    onward: Callable[..., Windows] = functools.partial(advance, drafter)
    if remat != "none":
        again = functools.partial(jax.checkpoint, policy=_POLICIES[remat])
        first, onward = again(first), again(onward)
    windows = first(weights, prefix, start)
    tokens_BxAxG = yield windows.hidden
    B, A, G = tokens_BxAxG.shape
    windows = repeat(windows, G)
    while True:
        windows = onward(weights, prefix, windows, tokens_BxAxG.reshape(B, A * G))
        tokens_BxAxG = yield windows.hidden.reshape(B, A, G, -1)


def head_at_hand(weights: DrafterWeights, dtype: Any) -> dict:
    """The drafter's parameters with the head, which every step reads, gathered in that dtype."""
    matrix_NxD = weights.params["head"]["weight"].astype(dtype)
    return weights.params | {"head": {"weight": partition.at_hand(matrix_NxD)}}


def count_of_logits(drafter: Drafter, hidden_BxAxGxD: jax.Array) -> int:
    """How many logits of a step a device holds."""
    B, A, G, _ = hidden_BxAxGxD.shape
    return partition.share(B, drafter.config.vocab_size) * A * G


def parts(drafter: Drafter, hidden_BxAxGxD: jax.Array) -> int:
    """Into how many parts anchors go, so that the logits of a part fit into `blocks.VALUES`."""
    return blocks.count(count_of_logits(drafter, hidden_BxAxGxD), hidden_BxAxGxD.shape[1])


def logits_of(drafter: Drafter, params: dict, hidden: jax.Array) -> jax.Array:
    """float32 `[..., N]` of hidden states `[..., D]`."""
    return drafter.apply({"params": params}, hidden, method="logits")


def by_parts(
    drafter: Drafter,
    params: dict,
    of: Callable[[jax.Array, jax.Array, Any], Any],
    hidden_BxAxGxD: jax.Array,
    given: Any,
) -> Any:
    """`of(hidden, logits, given)` of a step, by parts of its anchors. A backward pass computes it again."""

    def some(hidden_BxLxGxD: jax.Array, given: Any) -> Any:
        return of(hidden_BxLxGxD, logits_of(drafter, params, hidden_BxLxGxD), given)

    count = parts(drafter, hidden_BxAxGxD)  # of which `mapped` computes each again, unless it is the only one
    return blocks.mapped(some if count > 1 else jax.checkpoint(some), count, hidden_BxAxGxD, given)


def stacked(collected: list) -> Any:
    """The statistics `[B, A, G]` of all steps as `[B, A, G, K]`."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, -1), *collected)


def text_ahead(tokens_BxT: jax.Array, anchors_BxA: jax.Array, step: int) -> jax.Array:
    """int32 `[B, A, 1]`: what the texts themselves hold where step `step` of a window drafts."""
    return jnp.take_along_axis(tokens_BxT, anchors_BxA + 2 + step, 1, mode="clip")[..., None]


def greedy(vocab_N: jax.Array) -> Choose:
    """Takes the most likely draft token; statistics: its target id."""

    def choose(_: int, hidden: jax.Array, logits: jax.Array, given: Any) -> tuple[jax.Array, jax.Array]:
        tokens = vocab_N[likeliest(logits)]
        return tokens, tokens

    return choose


def target_window_pass(
    target: Target,
    params: dict,
    text: Cache,
    anchors_BxW: jax.Array,
    tokens_BxWxK: jax.Array,
) -> jax.Array:
    """The target's hidden states `[B, W, K, D]` at drafted tokens, all windows in one forward.

    Args:
      target: the module.
      params: its parameters.
      text: the cache of the text that the windows branch from, slot p = position p.
      anchors_BxW: t of each window; the window sees the text up to t + 1.
      tokens_BxWxK: drafted tokens at positions t + 2, t + 3, ...
    """
    slots = text[0].values.shape[2]
    visible = jnp.arange(slots) <= anchors_BxW[..., None] + 1
    positions = anchors_BxW[..., None] + 2 + jnp.arange(tokens_BxWxK.shape[-1])
    return target.apply({"params": params}, tokens_BxWxK, positions, text, visible).hidden
