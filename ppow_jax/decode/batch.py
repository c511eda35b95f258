"""Decoding of large batches: the rounds of `loop`, in stretches.

Between two stretches the rows that have finished leave the batch and the cache grows. In one loop from prompt
to stop all rows would be computed until the last one ends, and attention would read slots that nobody has
written: a large batch is bound by both.

What the target saw while it wrote can be kept as its lesson; then no text need be read again to train on it.

Shape letters as in `loop`; R rows of a stretch.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppow_jax import partition, teacher
from ppow_jax.decode.loop import DecodeConfig, Decoded, Seen, State, grow, next_round, prefill
from ppow_jax.models.target import Target
from ppow_jax.teacher import Lesson

_SLOTS = 32  # by which the cache grows; each of its lengths is compiled,
_SHARES = 8  # and each size of the batch, which are multiples of an eighth
_ROUNDS = 64  # at most, of a stretch


def decode_batch(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    mesh: Mesh,
    lesson_dtype: str = "",
) -> tuple[Decoded, Lesson | None]:
    """`loop.decode` without a drafter for many rows: the same texts, as NumPy arrays.

    Args:
      target, params, length_B, keys_B: as there.
      prompt_BxP: as there; where P is a multiple of 32, batches of other lengths need less compiling.
      config: as there, window 0.
      mesh: keeps the rows that are left spread over it.
      lesson_dtype: dtype of the taps and hidden states of a lesson to be kept; empty: none is.

    Returns:
      The texts, and the target's lesson on them, `[B, P + L, ...]` with the law where a token was written; a
      text's last token, which the target never reads, and what lies beyond it have none.
    """
    B, P = prompt_BxP.shape
    L = config.max_new_tokens
    static = {"target": target, "config": config, "dtype": lesson_dtype}
    state, lesson = _prefill(params=params, prompt_BxP=prompt_BxP, length_B=length_B, keys_B=keys_B, **static)
    where = np.arange(B)  # the rows of the batch that the state's are
    tokens, count, emitted = np.zeros((B, L), np.int32), np.zeros(B, np.int32), np.zeros((B, L), np.int32)
    book = _Book(lesson, np.asarray(length_B), P + L) if lesson_dtype else None
    while True:
        tokens[where], count[where] = np.asarray(state.tokens)[:, :L], np.asarray(state.count)
        emitted[where] = np.asarray(state.emitted_by_round)
        done = np.asarray(state.done)
        if done.all():
            break
        rows = np.argsort(done, kind="stable")[: rows_for(int((~done).sum()), B, mesh)]
        where = where[rows]
        slots = min(state.cache[0].values.shape[2] + _SLOTS, P + L + 1)
        first = int(state.round)
        state, lesson = _stretch(params=params, state=_regroup(state, rows, slots, mesh), **static)
        if book:
            book.add(lesson, where, first, int(state.round))
    tokens[np.arange(L) >= count[:, None]] = 0
    finished = np.isin(tokens[np.arange(B), count - 1], config.stop_ids)
    return Decoded(tokens, count, finished, emitted), book and book.close(count)


class _Book:
    """The lesson on a batch of texts, put together from prefill and stretches."""

    def __init__(self, prompts: Lesson, length_B: np.ndarray, slots: int) -> None:
        """Begins with `[B, P, ...]` of the prompts."""
        self._length_B = length_B
        more = slots - prompts.taps.shape[1]
        pad = lambda x: np.pad(np.asarray(x), ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))  # noqa: E731
        self._lesson = Lesson(*(pad(x) for x in prompts))

    def add(self, stretch: Lesson, where_R: np.ndarray, first: int, last: int) -> None:
        """Adds rounds `first` up to `last` of some rows, `[rounds, R, ...]`: one position each."""
        for whole, part in zip(self._lesson, map(np.asarray, stretch), strict=True):
            for number in range(first, last):
                whole[where_R, self._length_B[where_R] + number] = part[number - first]

    def close(self, count_B: np.ndarray) -> Lesson:
        """The lesson, with what lies beyond the texts set to 0."""
        for whole in self._lesson:
            beyond = np.arange(whole.shape[1]) >= (self._length_B + count_B)[:, None] - 1
            whole[beyond] = 0
        return self._lesson


def rows_for(texts: int, batch_size: int, mesh: Mesh) -> int:
    """Rows to compute for a number of texts, at most `batch_size`: few sizes, as each of them is compiled."""
    ways = partition.batch_ways(mesh)
    unit = -(-batch_size // (_SHARES * ways)) * ways
    return min(-(-texts // unit) * unit, batch_size)


@functools.partial(jax.jit, static_argnames=("target", "config", "dtype"))
def _prefill(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    dtype: str,
) -> tuple[State, Lesson | None]:
    state, seen = prefill(target, params, None, None, prompt_BxP, length_B, keys_B, config)
    if not dtype:
        return state, None
    law_B = teacher.law_of(seen.logits[:, 0], state.last)
    at_end = jnp.arange(prompt_BxP.shape[1]) == length_B[:, None] - 1
    law_BxP = (jnp.where(at_end, x[:, None], 0.0) for x in law_B)
    return state, Lesson(seen.taps.astype(dtype), seen.hidden.astype(dtype), *law_BxP)


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _regroup(state: State, rows_R: jax.Array, slots: int, mesh: Mesh) -> State:
    """Some rows of a state, with caches of `slots` slots."""
    layout = partition.batch_sharding(mesh, len(rows_R))

    def take(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.ndim == 0 else jax.lax.with_sharding_constraint(leaf[rows_R], layout)

    return grow(jax.tree.map(take, state), slots)


@functools.partial(jax.jit, static_argnames=("target", "config", "dtype"), donate_argnames="state")
def _stretch(
    target: Target, params: dict, state: State, config: DecodeConfig, dtype: str
) -> tuple[State, Lesson | None]:
    """Rounds until every text has ended, or one has no slots for another round; at most `_ROUNDS`.

    The lesson is `[_ROUNDS, R, ...]`: on the token that each round fed.
    """
    slots, first = state.cache[0].values.shape[2], state.round

    def lesson_of(seen: Seen, state: State) -> Lesson:
        law = teacher.law_of(seen.logits[:, 0], state.last)
        return Lesson(seen.taps[:, 0].astype(dtype), seen.hidden[:, 0].astype(dtype), *law)

    def more(carry: tuple[State, Lesson | None]) -> jax.Array:
        s = carry[0]
        return ~s.done.all() & (s.done | (s.known <= slots)).all() & (s.round < first + _ROUNDS)

    def body(carry: tuple[State, Lesson | None]) -> tuple[State, Lesson | None]:
        before, lesson = carry
        state, seen = next_round(target, params, None, None, before, config)
        if dtype:
            put = lambda all_, new: all_.at[before.round - first].set(new)  # noqa: E731
            lesson = jax.tree.map(put, lesson, lesson_of(seen, state))
        return state, lesson

    blank = None
    if dtype:
        one = jax.eval_shape(
            lambda s: lesson_of(*next_round(target, params, None, None, s, config)[::-1]), state
        )
        blank = jax.tree.map(lambda x: jnp.zeros((_ROUNDS, *x.shape), x.dtype), one)
    return jax.lax.while_loop(more, body, (state, blank))
