"""Who drafts: the interface that the decoding loop talks to, and the trained drafter behind it.

Shape letters: B rows, T tokens that the target has read, C width of its taps.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ppow_jax.decode import tree
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.shapes import Shape
from ppow_jax.decode.verify import Draft
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import Start, prefix_pass
from ppow_jax.errors import ConfigError
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import Cache


class VerifiedTokens(NamedTuple):
    """Tokens that the target has just read, and what it made of them.

    Attributes:
      taps: `[B, T, C]`, its features at these tokens.
      next: int32 `[B, T]`, the token after each.
      offset: int32 `[B]`, the position of the first.
      last: int32 `[B]`, the index of the last one that counts; what is beyond it is anything.
      going_on: bool `[]`, False: nobody will draft again (see `cache.write`).
      preferred: int32 `[B, J]`, what the target finds likeliest after every node of the last round's tree;
        None after the prompt.
    """

    taps: jax.Array
    next: jax.Array
    offset: jax.Array
    last: jax.Array
    going_on: jax.Array | bool = True
    preferred: jax.Array | None = None


class Drafting(Protocol):
    """Proposes a tree a round. Static and hashable; arrays come in as `weights` and `state`, both pytrees."""

    @property
    def tokens(self) -> int:
        """J, of a tree, its root included."""

    @property
    def depth(self) -> int:
        """D, drafted tokens that can be accepted at most."""

    @property
    def straight(self) -> bool:
        """Whether every tree is a chain, node n + 1 below node n, so that any way is its first nodes."""

    def read(self, weights: Any, state: Any, verified: VerifiedTokens) -> Any:
        """The state after what the target has read; None before the prompt, which is read first."""

    def draft(self, weights: Any, state: Any, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """The trees of a round."""

    def grow(self, state: Any, slots: int) -> Any:
        """The state with room for `slots` positions."""


class EagleState(NamedTuple):
    """The target-conditioned prefix of every row, and its next anchor."""

    prefix: Cache
    start: Start


@dataclasses.dataclass(frozen=True)
class Eagle:
    """The trained drafter; its weights are `DrafterWeights`.

    Raises:
      ConfigError: the shape wants more candidates than the draft vocabulary has.
    """

    drafter: Drafter
    shape: Shape

    def __post_init__(self) -> None:
        has = self.drafter.config.vocab_size
        if self.shape.ranks > has:
            raise ConfigError(
                f"draft tree: found {self.shape.ranks} candidates after a token, expected at most {has}, "
                "the draft vocabulary"
            )

    @property
    def tokens(self) -> int:
        """See `Drafting`."""
        return self.shape.tokens

    @property
    def depth(self) -> int:
        """See `Drafting`."""
        return self.shape.depth

    @property
    def straight(self) -> bool:
        """See `Drafting`."""
        return self.shape.straight

    def read(self, weights: DrafterWeights, state: EagleState | None, verified: VerifiedTokens) -> EagleState:
        """See `Drafting`."""
        positions_BxT = verified.offset[:, None] + jnp.arange(verified.next.shape[1])
        before = None if state is None else state.prefix
        read = prefix_pass(self.drafter, weights, verified.taps, verified.next, positions_BxT, before)
        prefix = read.keys_values
        if state is not None:
            prefix = kv_cache.write(state.prefix, prefix, verified.offset, verified.going_on)
        last_Bx1 = verified.last[:, None]
        hidden = jnp.take_along_axis(read.hidden, last_Bx1[..., None], 1)
        token_Bx1 = jnp.take_along_axis(verified.next, last_Bx1, 1)
        return EagleState(prefix, Start(hidden, token_Bx1, verified.offset[:, None] + last_Bx1))

    def draft(
        self, weights: DrafterWeights, state: EagleState, sampling: Sampling, keys_B: jax.Array
    ) -> Draft:
        """See `Drafting`."""
        return tree.draft(self.drafter, weights, state.prefix, state.start, self.shape, sampling, keys_B)

    def grow(self, state: EagleState, slots: int) -> EagleState:
        """See `Drafting`."""
        return state._replace(prefix=kv_cache.grow(state.prefix, slots))


@dataclasses.dataclass(frozen=True)
class Together:
    """Two drafters' trees as one; weights and states are pairs.

    Where the two offer the same token, the text follows both.
    """

    first: Drafting
    second: Drafting

    @property
    def tokens(self) -> int:
        """See `Drafting`."""
        return self.first.tokens + self.second.tokens - 1

    @property
    def depth(self) -> int:
        """See `Drafting`."""
        return max(self.first.depth, self.second.depth)

    @property
    def straight(self) -> bool:
        """See `Drafting`."""
        return False

    def read(self, weights: tuple, state: tuple | None, verified: VerifiedTokens) -> tuple:
        """See `Drafting`."""
        cut = self.first.tokens
        own, other = verified, verified
        if verified.preferred is not None:
            own = verified._replace(preferred=verified.preferred[:, :cut])
            root = verified.preferred[:, :1]
            other = verified._replace(preferred=jnp.concatenate([root, verified.preferred[:, cut:]], 1))
        states = state or (None, None)
        return (
            self.first.read(weights[0], states[0], own),
            self.second.read(weights[1], states[1], other),
        )

    def draft(self, weights: tuple, state: tuple, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """See `Drafting`."""
        one = self.first.draft(weights[0], state[0], sampling, keys_B)
        two = self.second.draft(weights[1], state[1], sampling, keys_B)
        if two.drawn is not None:
            raise ValueError("of two drafters only the first may draw its drafts")
        later = two.parents[:, 1:]
        parents = jnp.where(later > 0, later + self.first.tokens - 1, 0)
        drawn, more = one.drawn, self.second.tokens - 1
        if drawn is not None:  # the second one's nodes have no drawn children
            row = jnp.pad(drawn.row, (0, more))
            children = jnp.pad(drawn.children, ((0, more), (0, 0)), constant_values=-1)
            drawn = drawn._replace(row=row, children=children)
        tokens = jnp.concatenate([one.tokens, two.tokens[:, 1:]], 1)
        unknown = jnp.full(tokens.shape, jnp.nan)
        log_q = [unknown[:, : d.tokens.shape[1]] if d.log_probs is None else d.log_probs for d in (one, two)]
        log_q_BxJ = jnp.concatenate([log_q[0], log_q[1][:, 1:]], 1)
        return Draft(tokens, jnp.concatenate([one.parents, parents], 1), drawn, log_q_BxJ)

    def grow(self, state: tuple, slots: int) -> tuple:
        """See `Drafting`."""
        return self.first.grow(state[0], slots), self.second.grow(state[1], slots)
