"""Drafts without training: n-grams of the text itself, and of what the target says beside it.

Shape letters: B rows, S positions, T tokens just read, J nodes of a tree, K window, N n-gram, W columns,
G candidates, V vocabulary.
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
    """Texts so far: tokens int32 `[B, S]`, `NOTHING` where none is known, and how many positions are,
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
        at_BxT = verified.offset[:, None] + 1 + jnp.arange(verified.next.shape[1])
        real_BxT = jnp.arange(verified.next.shape[1]) <= verified.last[:, None]
        new_BxT = jnp.where(real_BxT, verified.next, NOTHING)
        if state is None:
            tokens = jnp.pad(new_BxT, ((0, 0), (1, 0)), constant_values=NOTHING)
        else:
            rows = jnp.arange(len(new_BxT))[:, None]
            tokens = state.tokens.at[rows, at_BxT].set(new_BxT, mode="drop")
        return History(tokens, verified.offset + verified.last + 2)

    def draft(self, weights: None, state: History, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """See `Drafting`."""
        branches_BxGxK = jax.vmap(self._branches)(*state)
        last_Bx1 = jnp.take_along_axis(state.tokens, state.known[:, None] - 1, 1)
        nodes = [branches_BxGxK[:, path[0], len(path) - 1] for path in self.shape.paths]
        tokens = jnp.concatenate([last_Bx1, jnp.stack(nodes, 1)], 1)
        return Draft(tokens, jnp.broadcast_to(jnp.array(self.shape.parents), tokens.shape))

    def grow(self, state: History, slots: int) -> History:
        """See `Drafting`."""
        more = slots - state.tokens.shape[1]
        return state._replace(tokens=jnp.pad(state.tokens, ((0, 0), (0, more)), constant_values=NOTHING))

    def _branches(self, text_S: jax.Array, known: jax.Array) -> jax.Array:
        """int32 `[G, K]` for one text."""
        S = len(text_S)
        position = jnp.arange(S)
        matching, matched = jnp.ones(S, bool), jnp.zeros(S, jnp.int32)
        for back in range(self.ngram):  # matched: tokens up to this position that are the text's last
            wanted = jnp.where(known > back, text_S[known - 1 - back], NOTHING - 1)
            matching &= jnp.pad(text_S, (back, 0), constant_values=NOTHING)[:S] == wanted
            matched += matching
        next_S = jnp.roll(text_S, -1)
        value_S = jnp.where((position < known - 1) & (matched > 0), matched * S + position, -1)
        found = []
        for _ in range(self.branches):
            best = jnp.argmax(value_S)
            period = jnp.maximum(known - 1 - best, 1)
            branch_K = text_S[best + 1 + jnp.arange(self.window) % period]
            found.append(jnp.where(value_S[best] >= 0, branch_K, NOTHING))
            value_S = jnp.where(next_S == branch_K[0], -1, value_S)
        return jnp.stack(found)


class Pool(NamedTuple):
    """The state of `Lookahead`.

    Attributes:
      last: int32 `[B]`, the last known token.
      window: int32 `[B, N - 1, W]`, guesses: row by row those of earlier rounds, the oldest first.
      grams: int32 `[B, V, G, N - 1]`, of every token up to G continuations.
      count: int32 `[B, V]`, continuations ever seen; the next replaces the oldest.
    """

    last: jax.Array
    window: jax.Array
    grams: jax.Array
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class Lookahead:
    """Lookahead decoding (Fu et al. 2024, arXiv 2402.02057): Jacobi iteration fills a pool of n-grams.

    Beside the candidates the tree holds W columns of guesses: the first row is a chain from the root, and
    from each of its nodes hangs a column. What the target says at a column's end makes an n-gram of it and
    the next row of guesses.

    Attributes:
      vocab_size: V, of the target.
      columns: W.
      ngram: N, at least 3.
      candidates: G, branches a round from the pool.
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
        if state is None:  # as guesses, what ends the prompt
            rows, columns = self.ngram - 1, self.columns
            back = jnp.arange(rows)[:, None] + jnp.arange(columns) - rows - columns
            at = jnp.maximum(verified.last[:, None] + back.reshape(-1), 0)
            window = jnp.take_along_axis(verified.next, at, 1).reshape(B, rows, columns)
            grams = jnp.full((B, self.vocab_size, self.candidates, rows), NOTHING)
            return Pool(last_B, window, grams, jnp.zeros((B, self.vocab_size), jnp.int32))
        said_BxW = verified.preferred[:, -self.columns :]
        ngrams = jnp.concatenate([state.window, said_BxW[:, None]], 1)  # [B, N, W]
        grams, count = jax.vmap(self._add)(state.grams, state.count, ngrams)
        return Pool(last_B, ngrams[:, 1:], grams, count)

    def draft(self, weights: None, state: Pool, sampling: Sampling, keys_B: jax.Array) -> Draft:
        """See `Drafting`."""
        B = len(state.last)
        candidates_BxGxN = state.grams[jnp.arange(B), state.last]
        parts = (state.last[:, None], candidates_BxGxN.reshape(B, -1), state.window.reshape(B, -1))
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

    def _add(self, grams_VxGxN: jax.Array, count_V: jax.Array, ngrams_NxW: jax.Array) -> tuple:
        """The pool of one text with one n-gram more for each column, unless it is there."""
        for column in range(self.columns):
            first, rest = ngrams_NxW[0, column], ngrams_NxW[1:, column]
            new = ~(grams_VxGxN[first] == rest).all(-1).any()
            at = jnp.where(new, count_V[first] % self.candidates, self.candidates)
            grams_VxGxN = grams_VxGxN.at[first, at].set(rest, mode="drop")
            count_V = count_V.at[first].add(new)
        return grams_VxGxN, count_V
