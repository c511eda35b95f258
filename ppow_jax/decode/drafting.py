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
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.drafter import Drafter, DrafterWeights
from ppow_jax.models.layers import KeyValues
from ppow_jax.windows import Start, prefix_pass


class Seen(NamedTuple):
    """Tokens that the target has just read, and what it made of them.

    Attributes:
      taps: `[B, T, C]`, its features at these tokens.
      next: int32 `[B, T]`, the token after each.
      offset: int32 `[B]`, the position of the first.
      last: int32 `[B]`, the index of the last one that counts; what is beyond it is anything.
      going_on: bool `[]`, False: nobody will draft again (see `cache.write`).
    """

    taps: jax.Array
    next: jax.Array
    offset: jax.Array
    last: jax.Array
    going_on: jax.Array | bool = True


class Drafting(Protocol):
    """Proposes a tree a round. Static and hashable; arrays come in as `weights` and `state`, both pytrees.

    Attributes:
      tokens: J, of a tree, its root included.
      depth: D, drafted tokens that can be accepted at most.
    """

    tokens: int
    depth: int

    def read(self, weights: Any, state: Any, seen: Seen) -> Any:
        """The state after what the target has read; None before the prompt, which is read first."""

    def draft(self, weights: Any, state: Any, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """The trees of a round."""

    def grow(self, state: Any, slots: int) -> Any:
        """The state with room for `slots` positions."""


class EagleState(NamedTuple):
    """The target-conditioned prefix of every row, and its next anchor."""

    prefix: KeyValues
    start: Start


@dataclasses.dataclass(frozen=True)
class Eagle:
    """The trained drafter; its weights are `DrafterWeights`."""

    drafter: Drafter
    shape: Shape

    @property
    def tokens(self) -> int:
        """See `Drafting`."""
        return self.shape.tokens

    @property
    def depth(self) -> int:
        """See `Drafting`."""
        return self.shape.depth

    def read(self, weights: DrafterWeights, state: EagleState | None, seen: Seen) -> EagleState:
        """See `Drafting`."""
        positions_BxT = seen.offset[:, None] + jnp.arange(seen.next.shape[1])
        read = prefix_pass(self.drafter, weights, seen.taps, seen.next, positions_BxT)
        prefix = read.keys_values
        if state is not None:
            (prefix,) = kv_cache.write((state.prefix,), (prefix,), seen.offset, seen.going_on)
        last_Bx1 = seen.last[:, None]
        hidden = jnp.take_along_axis(read.hidden, last_Bx1[..., None], 1)
        token_Bx1 = jnp.take_along_axis(seen.next, last_Bx1, 1)
        return EagleState(prefix, Start(hidden, token_Bx1, seen.offset[:, None] + last_Bx1))

    def draft(
        self, weights: DrafterWeights, state: EagleState, sampling: Sampling, keys_B: jax.Array
    ) -> Draft:
        """See `Drafting`."""
        return tree.draft(self.drafter, weights, state.prefix, state.start, self.shape, sampling, keys_B)

    def grow(self, state: EagleState, slots: int) -> EagleState:
        """See `Drafting`."""
        return state._replace(prefix=kv_cache.grow((state.prefix,), slots)[0])
