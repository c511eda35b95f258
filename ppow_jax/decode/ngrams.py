"""Drafts without training: n-grams of the text itself, and of what the target says beside it.

Shape letters: B rows, T positions of a text, M tokens that a round emits at most, K tokens of a branch (one
less than an n-gram), W columns, Q candidates, V vocabulary.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ppow_jax.decode.drafting import VerifiedTokens
from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.shapes import Fixed, group
from ppow_jax.decode.verify import Draft

NOTHING = -1  # a token that no text has


class History(NamedTuple):
    """Texts so far: tokens int32 `[B, T]`, `NOTHING` where none is known, and how many positions are,
    `[B]`."""

    tokens: jax.Array
    known: jax.Array


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Prompt lookup (Saxena 2023): what followed where the text's last tokens stood before.

    The longest match first, of equals the latest; a text that repeats itself is taken to go on doing so.

    Attributes:
      window: K, tokens of a branch.
      branches: windows a round, each with another first token.
      ngram: tokens to match at most; at least one must.
    """

    window: int
    branches: int = 1
    ngram: int = 3

    @property
    def shape(self) -> Fixed:
        """The tree."""
        return group(self.branches, self.window)

    @property
    def tokens(self) -> int:
        """See `Drafting`."""
        return self.shape.tokens

    @property
    def depth(self) -> int:
        """See `Drafting`."""
        return self.window

    @property
    def straight(self) -> bool:
        """See `Drafting`."""
        return self.shape.straight

    def read(self, weights: None, state: History | None, verified: VerifiedTokens) -> History:
        """See `Drafting`."""
        at_BxM = verified.offset[:, None] + 1 + jnp.arange(verified.next.shape[1])
        real_BxM = jnp.arange(verified.next.shape[1]) <= verified.last[:, None]
        new_BxM = jnp.where(real_BxM, verified.next, NOTHING)
        if state is None:
            tokens = jnp.pad(new_BxM, ((0, 0), (1, 0)), constant_values=NOTHING)
        else:
            rows = jnp.arange(len(new_BxM))[:, None]
            tokens = state.tokens.at[rows, at_BxM].set(new_BxM, mode="drop")
        return History(tokens, verified.offset + verified.last + 2)

    def draft(self, weights: None, state: History, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """See `Drafting`."""
        branches_BxQxK = jax.vmap(self._branches)(*state)
        last_Bx1 = jnp.take_along_axis(state.tokens, state.known[:, None] - 1, 1)
        nodes = [branches_BxQxK[:, path[0], len(path) - 1] for path in self.shape.paths]
        tokens = jnp.concatenate([last_Bx1, jnp.stack(nodes, 1)], 1)
        return Draft(tokens, jnp.broadcast_to(jnp.array(self.shape.parents), tokens.shape))

    def grow(self, state: History, slots: int) -> History:
        """See `Drafting`."""
        more = slots - state.tokens.shape[1]
        return state._replace(tokens=jnp.pad(state.tokens, ((0, 0), (0, more)), constant_values=NOTHING))

    def _branches(self, text_T: jax.Array, known: jax.Array) -> jax.Array:
        """int32 `[Q, K]` for one text."""
        T = len(text_T)
        position = jnp.arange(T)
        matching, matched = jnp.ones(T, bool), jnp.zeros(T, jnp.int32)
        for back in range(self.ngram):  # matched: tokens up to this position that are the text's last
            wanted = jnp.where(known > back, text_T[known - 1 - back], NOTHING - 1)
            matching &= jnp.pad(text_T, (back, 0), constant_values=NOTHING)[:T] == wanted
            matched += matching
        next_T = jnp.roll(text_T, -1)
        value_T = jnp.where((position < known - 1) & (matched > 0), matched * T + position, -1)
        found = []
        for _ in range(self.branches):
            best = jnp.argmax(value_T)
            period = jnp.maximum(known - 1 - best, 1)
            branch_K = text_T[best + 1 + jnp.arange(self.window) % period]
            found.append(jnp.where(value_T[best] >= 0, branch_K, NOTHING))
            value_T = jnp.where(next_T == branch_K[0], -1, value_T)
        return jnp.stack(found)


class Pool(NamedTuple):
    """The state of `Lookahead`.

    Attributes:
      last: int32 `[B]`, the last known token.
      window: int32 `[B, K, W]`, guesses: row by row those of earlier rounds, the oldest first.
      grams: int32 `[B, V, Q, K]`, of every token up to Q continuations.
      seen: int32 `[B, V]`, continuations ever seen; the next replaces the oldest.
    """

    last: jax.Array
    window: jax.Array
    grams: jax.Array
    seen: jax.Array


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Lookahead decoding (Fu et al. 2024, arXiv 2402.02057): Jacobi iteration fills a pool of n-grams.

    Beside the candidates the tree holds W columns of guesses: the first row is a chain from the root, and
    from each of its nodes hangs a column. What the target says at a column's end makes an n-gram of it and
    the next row of guesses.

    Attributes:
      vocab_size: V, of the target.
      columns: W.
      ngram: K + 1, at least 3.
      candidates: Q, branches a round from the pool.
    """

    vocab_size: int
    columns: int = 4
    ngram: int = 3
    candidates: int = 2

    @property
    def tokens(self) -> int:
        """See `Drafting`."""
        return len(self._parents())

    @property
    def depth(self) -> int:
        """See `Drafting`: along the first row of guesses and down its last column."""
        return self.columns + self.ngram - 2

    @property
    def straight(self) -> bool:
        """See `Drafting`."""
        return False

    def read(self, weights: None, state: Pool | None, verified: VerifiedTokens) -> Pool:
        """See `Drafting`."""
        B = len(verified.last)
        last_B = jnp.take_along_axis(verified.next, verified.last[:, None], 1)[:, 0]
        if state is None or verified.preferred is None:  # as guesses, what ends the prompt
            rows, columns = self.ngram - 1, self.columns
            back = jnp.arange(rows)[:, None] + jnp.arange(columns) - rows - columns
            at = jnp.maximum(verified.last[:, None] + back.reshape(-1), 0)
            window = jnp.take_along_axis(verified.next, at, 1).reshape(B, rows, columns)
            grams = jnp.full((B, self.vocab_size, self.candidates, rows), NOTHING)
            return Pool(last_B, window, grams, jnp.zeros((B, self.vocab_size), jnp.int32))
        said_BxW = verified.preferred[:, -self.columns :]
        ngrams = jnp.concatenate([state.window, said_BxW[:, None]], 1)  # [B, K + 1, W]
        grams, seen = jax.vmap(self._add)(state.grams, state.seen, ngrams)
        return Pool(last_B, ngrams[:, 1:], grams, seen)

    def draft(self, weights: None, state: Pool, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """See `Drafting`."""
        B = len(state.last)
        candidates_BxQxK = state.grams[jnp.arange(B), state.last]
        parts = (state.last[:, None], candidates_BxQxK.reshape(B, -1), state.window.reshape(B, -1))
        tokens = jnp.concatenate(parts, 1)
        return Draft(tokens, jnp.broadcast_to(jnp.array(self._parents()), tokens.shape))

    def grow(self, state: Pool, slots: int) -> Pool:
        """See `Drafting`."""
        return state

    def _parents(self) -> list[int]:
        """Root; candidates one after the other; guesses row by row."""
        length, W = self.ngram - 1, self.columns
        parents, first = [0], 1 + self.candidates * length
        for candidate in range(self.candidates):
            begin = 1 + candidate * length
            parents += [0, *range(begin, begin + length - 1)]
        parents += [0, *range(first, first + W - 1)]
        return parents + list(range(first, first + W * (length - 1)))

    def _add(self, grams_VxQxK: jax.Array, seen_V: jax.Array, ngrams: jax.Array) -> tuple:
        """The pool of one text with one n-gram more for each column, unless it is there."""
        for column in range(self.columns):
            first, rest = ngrams[0, column], ngrams[1:, column]
            new = ~(grams_VxQxK[first] == rest).all(-1).any()
            at = jnp.where(new, seen_V[first] % self.candidates, self.candidates)
            grams_VxQxK = grams_VxQxK.at[first, at].set(rest, mode="drop")
            seen_V = seen_V.at[first].add(new)
        return grams_VxQxK, seen_V
