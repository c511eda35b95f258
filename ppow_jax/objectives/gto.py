"""`gto`: group tree optimisation (GTO, arXiv 2509.22134), longer accepted paths in draft trees.

From each of m adjacent anchors, a group, a tree is drafted as decoding drafts it, by the drafter as it is and
by the one that the run began with. What a tree is worth follows from the target's probabilities of its nodes,
without sampling. With L_i the expected accepted length of its i-th path from the root to a leaf, the sum over
the nodes on it of the product of the target's probabilities down to there (eq. 3 and 4), a tree earns

    r = log(sum over i of exp(eta L_i)) / eta                                                  (eq. 5),

and R = r - r of the start's tree (eq. 9), which takes out how hard the place is. Within a group R is
standardised to advantages A (eq. 10). The drafter learns them along the longest path that the target accepts,
of l tokens, by a clipped ratio per token to the start (eq. 11 and 12), beside the losses of `supervised`:

    s = exp((log q - log q of the start) / max(l, 1)),
    L = L_supervised - omega mean of min(s A, clip(s) A).

The path that the target accepts is the text itself, as far as the tree holds it: such trees follow from the
text alone, so decoding draws the target's own token and goes on below it (`decode.verify`).

m = 8, eta = 1 and omega = 0.5 are the paper's, with 16 groups a text, trees of 60 tokens and a learning rate
of 5e-6 (appendix B); its clip and the floor of the standard deviation are not published. Ours are: rewards at
a temperature of verification, at 0 from the text without running the target; and `tree_reward` "expected",
the expected accepted length of the tree itself, the sum over its nodes of the chance to come so far, which
eq. 5 exceeds by more the more leaves there are.

Shape letters: B texts, T positions, A anchors, G windows of an anchor, K window, J nodes of a tree, L some of
the trees, N draft vocabulary, D width.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.decode import shapes, tree, verify
from ppow_jax.decode.sampling import GREEDY, Sampling
from ppow_jax.decode.shapes import Dynamic, Shape
from ppow_jax.drafters import windows
from ppow_jax.drafters.windows import Start
from ppow_jax.errors import ConfigError
from ppow_jax.keys import key
from ppow_jax.models import blocks, target_outputs
from ppow_jax.models.layers import draft_ids
from ppow_jax.models.target import Target, head_at_hand
from ppow_jax.models.target_outputs import TargetOutputs
from ppow_jax.objectives import losses
from ppow_jax.objectives.advantages import centred
from ppow_jax.objectives.anchors import sample_anchors
from ppow_jax.objectives.base import (
    Batch,
    Memory,
    Metrics,
    Models,
    Signal,
    Sizes,
    Stats,
    along_text,
    written,
)
from ppow_jax.objectives.rollout import log_prob_of
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.objectives.verification import windows_at_once
from ppow_jax.parallel import partition


class Extra(NamedTuple):
    """What the update asks for besides windows and weights; the anchors of groups come after the others.

    Attributes:
      uniform, outside: as in `supervised.Extra`.
      start: float32 `[B, A, 1, K]`, log-probabilities of the text by the drafter that the run began with.
      length: int32 `[B, A, 1]`, of the text how many tokens the tree holds.
      advantage: float32 `[B, A, 1]`.
    """

    uniform: jax.Array
    outside: dict[str, jax.Array]
    start: jax.Array
    length: jax.Array
    advantage: jax.Array


class Trees(NamedTuple):
    """Drafted trees; node 0 is the text's token after the anchor.

    Attributes:
      tokens: int32 `[..., J]`.
      parents: int32 `[..., J]`, below the node's own number; 0 for node 0.
      above: bool `[..., J, J]`, whether the second node is the first one or above it.
    """

    tokens: jax.Array
    parents: jax.Array
    above: jax.Array


@dataclasses.dataclass(frozen=True)
class GTO(Supervised):
    """The losses of `supervised`, and advantages of trees over those of the run's start."""

    window: int = key(8, "steps of training-time test, no fewer than the tree has levels", at_least=1)
    groups: int = key(2, "groups of adjacent anchors a text, besides `anchors`; the paper's: 16", at_least=1)
    group_size: int = key(8, "m, anchors of a group; the paper's", at_least=2)
    tree: str = key("tree:60x8x10", "Shape of the trees, as decode.shape; this is the paper's.")
    temperature: float = key(
        1.0,
        "of verification: of the target's probabilities in the reward. At 0 the text alone tells them, and "
        "the target need not run.",
    )
    tree_reward: str = key(
        "smooth_max",
        "smooth_max, the paper's: a smooth maximum of the expected accepted lengths of a tree's paths; or "
        "expected, that of the tree",
        choices=("smooth_max", "expected"),
    )
    eta: float = key(1.0, "of smooth_max: the larger, the nearer to the maximum; the paper's", above=0)
    spread_floor: float = key(1e-3, "added to the standard deviation of a group, tokens", above=0)
    clip: float = key(0.2, "of the ratio of probabilities")
    gto_weight: float = key(0.5, "omega, beside the losses of supervised; the paper's")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape.depth > self.window:
            raise ConfigError(
                f"window: found {self.window}, expected at least {self.shape.depth}, the levels of "
                f"{self.tree}"
            )

    @property
    def shape(self) -> Shape:
        """Of the trees."""
        return shapes.parse(self.tree, "tree")

    def check(self, draft_vocabulary: int) -> None:
        """No more candidates after a token than the drafter has."""
        if self.shape.ranks > draft_vocabulary:
            raise ConfigError(
                f"tree: found {self.shape.ranks} candidates after a token in {self.tree}, expected at most "
                f"{draft_vocabulary}, the draft vocabulary"
            )

    def init(self, sizes: Sizes, params: dict) -> Memory:
        """Of the rule for anchors, and the parameters that the run begins with."""
        return super().init(sizes, params) | {"start": jax.tree.map(jnp.copy, params)}

    def signal(
        self,
        models: Models,
        batch: Batch,
        outputs: TargetOutputs,
        memory: Memory,
        step: jax.Array,
        key: jax.Array,
    ) -> tuple[Signal, Memory, Metrics]:
        """That of `supervised`, and behind its windows those of groups with what their trees earn."""
        ours, memory, metrics = super().signal(models, batch, outputs, memory, step, key)
        keys = jax.random.split(jax.random.fold_in(key, 2))
        grouped, real_groups = pick_groups(keys[0], batch["assistant"], self.groups, self.group_size)
        B, groups, size = grouped.shape
        anchors, real = grouped.reshape(B, groups * size), jnp.repeat(real_groups, size, 1)
        start = models.with_params(memory["start"])
        trees = self.draft(models, start, batch, outputs, anchors)
        matched = text_matches(trees, batch, anchors, real, self.shape.depth)
        log_prob = matched
        if self.temperature > 0:
            log_prob = score_trees(models, batch, trees, anchors, self.temperature)
        reward_BxAx2, expected_BxAx2 = self.rewards(trees, log_prob)
        advantage, spread = self.advantages(reward_BxAx2.reshape(B, groups, size, 2), real_groups)
        length = path_lengths(trees.above, matched)[1].max(-1)[..., 0]  # of the current drafter's trees
        extra = Extra(
            _joined(ours.extra.uniform, jax.random.uniform(keys[1], (B, groups * size, 1, self.window))),
            ours.extra.outside,
            _behind(ours, text_log_prob(start, batch, outputs, anchors, self.window)),
            _behind(ours, length.astype(jnp.int32)[..., None]),
            _behind(ours, advantage.reshape(B, groups * size, 1)),
        )
        text = along_text(batch["tokens"], anchors, 2, self.window)[:, :, None]
        policy = real / jnp.maximum(real.sum(), 1)
        weights = {
            "valid": _joined(ours.weights["valid"], jnp.zeros(text.shape)),
            "policy": _behind(ours, policy[..., None, None]),
        }
        signal = Signal(_joined(ours.anchors, anchors), _joined(ours.tokens, text), weights, extra)
        mean = functools.partial(losses.masked_mean, mask=real)
        return (
            signal,
            memory,
            metrics
            | {
                "tree_reward": mean(reward_BxAx2[..., 0]),
                "tree_reward_start": mean(reward_BxAx2[..., 1]),
                "tree_accepted": mean(expected_BxAx2[..., 0]),
                "tree_accepted_start": mean(expected_BxAx2[..., 1]),
                "tree_accepted_text": mean(length),
                "group_spread": losses.masked_mean(spread, real_groups),
            },
        )

    def draft(
        self, models: Models, start: Models, batch: Batch, outputs: TargetOutputs, anchors_BxA: jax.Array
    ) -> Trees:
        """Trees `[B, A, 2, ...]` from every anchor, by the drafter as it is and by the run's start."""
        shape = self.shape
        tempered = isinstance(shape, Dynamic) and self.temperature > 0
        about = (batch, outputs, anchors_BxA, shape, Sampling(self.temperature) if tempered else GREEDY)
        tokens, parents = (
            jnp.stack(both, 2)
            for both in zip(draft_trees(models, *about), draft_trees(start, *about), strict=True)
        )
        flat = parents.reshape(-1, parents.shape[-1])
        above = verify.ancestors(flat, shape.depth).reshape(*parents.shape, -1)
        return Trees(tokens, parents, above)

    def rewards(self, trees: Trees, log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 `[B, A, 2]` twice: what each tree earns, and its expected accepted length."""
        reach, lengths = path_lengths(trees.above, log_prob)
        expected = reach.sum(-1)
        if self.tree_reward == "expected":
            return expected, expected
        return smooth_max(lengths, leaves(trees.parents), self.eta), expected

    def advantages(self, rewards: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        """float32 `[B, groups, size]` advantages, and `[B, groups]` the standard deviation of what they are
        made from."""
        debiased = rewards[..., 0] - rewards[..., 1]
        spread = debiased.std(-1)
        advantage = centred(debiased) / (spread[..., None] + self.spread_floor)
        return advantage * real[..., None], spread

    def observe(
        self, models: Models, step: int, hidden: jax.Array, logits: jax.Array, inputs: Any, prepared: Any
    ) -> Stats:
        """That of `supervised`, and the log-probability of the text's token."""
        stats = super().observe(models, step, hidden, logits, inputs, prepared)
        ids, _ = draft_ids(models.weights.vocab, inputs[0][..., None])
        return stats | {"log_prob": log_prob_of(logits, ids)}

    def loss(self, stats: Stats, signal: Signal, summary: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        """The losses of `supervised` plus omega times the clipped surrogate of the groups."""
        total, metrics = super().loss(stats, signal, summary)
        extra, weights = signal.extra, signal.weights["policy"][..., 0]
        on_path = jnp.arange(self.window) < extra.length[..., None]
        each = [
            jnp.sum(x * on_path, -1) / jnp.maximum(extra.length, 1) for x in (stats["log_prob"], extra.start)
        ]
        about = (*each, extra.advantage, self.clip)
        policy = jnp.sum(losses.clipped_policy_loss(*about) * weights)
        clipped = jnp.sum(losses.clip_fraction(*about) * weights)
        metrics |= {"policy_loss": policy, "clip_fraction": clipped}
        return total + self.gto_weight * policy, metrics


def _joined(ours: jax.Array, more: jax.Array) -> jax.Array:
    """`[B, A, ...]` of the anchors of `supervised` and of those of groups, one after the other."""
    return jnp.concatenate([ours, more.astype(ours.dtype)], 1)


def _behind(ours: Signal, more: jax.Array) -> jax.Array:
    """The same of what the former have not: zeros."""
    return jnp.pad(more, [(0, 0), (ours.anchors.shape[1], 0)] + [(0, 0)] * (more.ndim - 2))


def pick_groups(
    key: jax.Array, assistant_BxT: jax.Array, groups: int, size: int
) -> tuple[jax.Array, jax.Array]:
    """Draws groups of adjacent anchors, which do not overlap (eq. 6 and 7), uniformly.

    Returns:
      int32 `[B, groups, size]` positions; bool `[B, groups]`, False where a text has no more of them.
    """
    possible, (B, T) = windows.anchor_mask(assistant_BxT), assistant_BxT.shape
    ahead = [jnp.pad(possible[:, i:], ((0, 0), (0, i))) for i in range(size)]
    whole = functools.reduce(operator.and_, ahead)
    keys = jax.random.split(key)
    offset_Bx1 = jax.random.randint(keys[0], (B, 1), 0, size)
    begins = whole & ((jnp.arange(T) - offset_Bx1) % size == 0)
    first, real, _ = sample_anchors(keys[1], begins.astype(jnp.float32), groups)
    return first[..., None] + jnp.arange(size), real


def draft_trees(
    models: Models,
    batch: Batch,
    outputs: TargetOutputs,
    anchors_BxA: jax.Array,
    shape: Shape,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array]:
    """Tokens and parents, int32 `[B, A, J]`, of a tree from every anchor, one anchor a text after another."""
    drafter, weights, tokens = models.drafter, models.weights, batch["tokens"]
    prefix = windows.text_prefix(drafter, weights, outputs.taps, tokens)
    start = windows.text_starts(prefix, tokens, anchors_BxA)
    keys_B = jax.random.split(jax.random.key(0), len(tokens))  # unused: candidates are the likeliest tokens

    def one(start: Start) -> tuple[jax.Array, jax.Array]:
        only = Start(*(x[:, None] for x in start))
        draft = tree.draft(drafter, weights, prefix.keys_values, only, shape, sampling, keys_B)
        return draft.tokens, draft.parents

    swapped = lambda tree: jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tree)  # noqa: E731
    return swapped(jax.lax.map(one, swapped(start)))


def text_log_prob(
    models: Models, batch: Batch, outputs: TargetOutputs, anchors_BxA: jax.Array, steps: int
) -> jax.Array:
    """float32 `[B, A, 1, steps]`: log-probability of the text's tokens by a drafter, along the text."""
    tokens, vocab = batch["tokens"], models.weights.vocab
    prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, tokens)
    start = windows.text_starts(prefix, tokens, anchors_BxA)

    def choose(_: int, hidden: jax.Array, logits: jax.Array, ahead: Any) -> tuple[jax.Array, jax.Array]:
        return ahead, log_prob_of(logits, draft_ids(vocab, ahead)[0])

    about = (models.drafter, models.weights, prefix.keys_values, start, choose, steps)
    return windows.window_pass(*about, lambda step: windows.text_ahead(tokens, anchors_BxA, step))


def text_matches(
    trees: Trees, batch: Batch, anchors_BxA: jax.Array, real_BxA: jax.Array, depth: int
) -> jax.Array:
    """float32 `[B, A, G, J]`: 0 where a node holds the text's token of its level, else -inf; node 0: 0."""
    level = trees.above.sum(-1) - 1
    ahead = along_text(batch["tokens"], anchors_BxA, 2, depth)
    ahead = jnp.where(written(batch, anchors_BxA, real_BxA, depth)[:, :, 0], ahead, -1)
    ahead = jnp.pad(ahead, ((0, 0), (0, 0), (1, 0)))[:, :, None]
    same = trees.tokens == jnp.take_along_axis(ahead, level, -1)
    return jnp.where(same | (level == 0), 0.0, -jnp.inf)


def score_trees(
    models: Models, batch: Batch, trees: Trees, anchors_BxA: jax.Array, temperature: float
) -> jax.Array:
    """float32 `[B, A, G, J]`: the target's log-probability of every node after those above it; node 0: 0.

    So many trees of a text at a time as `verification.windows_at_once` tells.
    """
    outputs, cache = target_outputs.read(models.target, models.target_params, batch["tokens"])
    target, (B, A, G, J) = models.target, trees.tokens.shape
    size, slots = windows_at_once(B, A, G, J), outputs.hidden.shape[1]
    params = head_at_hand(target.config, models.target_params)

    def log_probs(context_BxLxJxD: jax.Array, tokens_BxLxJ: jax.Array) -> jax.Array:
        logits = target.apply({"params": params}, context_BxLxJxD, method=Target.logits)
        logp = jax.nn.log_softmax(logits / temperature)
        return jnp.take_along_axis(logp, tokens_BxLxJ[..., None], -1)[..., 0]

    def some(turn: tuple) -> jax.Array:
        i, anchors_BxL, (tokens, parents, above) = turn
        last = anchors_BxL[..., None] + 1  # the position of node 0, which the text's cache holds
        positions, visible = last + above.sum(-1) - 1, jnp.arange(slots) <= last
        here = {"params": partition.in_turn(models.target_params, i)}
        below = (tokens[..., 1:], positions[..., 1:], cache, visible, above[..., 1:, 1:])
        hidden = jnp.concatenate(
            [jnp.take_along_axis(outputs.hidden, last, 1)[:, :, None], target.apply(here, *below).hidden], 2
        )
        context = jnp.take_along_axis(hidden, parents[..., None], 2)
        parts = blocks.count(partition.share(B, target.config.vocab_size) * size * J, size)
        return blocks.mapped(log_probs, parts, context, tokens).at[..., 0].set(0.0)

    def cut(x_BxAxG: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BxAxG.reshape(B, -1, size, *x_BxAxG.shape[3:]), 1, 0)

    anchors = cut(jnp.broadcast_to(anchors_BxA[..., None], (B, A, G)))
    found = jax.lax.map(some, (jnp.arange(len(anchors)), anchors, jax.tree.map(cut, trees)))
    return jnp.moveaxis(found, 0, 1).reshape(B, A, G, J)


def path_lengths(above: jax.Array, log_prob: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float32 `[..., J]` twice: the chance that the target comes to each node, 0 for node 0, and the expected
    accepted length of the way to it (eq. 4 and 3).

    Args:
      above: bool `[..., J, J]`, see `Trees`.
      log_prob: float32 `[..., J]`, of each node after those above it; 0 for node 0.
    """
    reach = jnp.exp(jnp.sum(jnp.where(above, log_prob[..., None, :], 0.0), -1)).at[..., 0].set(0.0)
    return reach, jnp.sum(jnp.where(above, reach[..., None, :], 0.0), -1)


def leaves(parents: jax.Array) -> jax.Array:
    """bool `[..., J]`: nodes that no other node is below of."""
    J = parents.shape[-1]
    return ~(parents[..., None, 1:] == jnp.arange(J)[:, None]).any(-1)


def smooth_max(lengths: jax.Array, counted: jax.Array, eta: float) -> jax.Array:
    """log(sum of exp(eta L)) / eta over the counted of the last axis (eq. 5), float32 `[...]`."""
    return jax.nn.logsumexp(jnp.where(counted, eta * lengths, -jnp.inf), -1) / eta
