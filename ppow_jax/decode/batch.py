"""Decoding of large batches: the rounds of `loop`, in stretches.

Between two stretches the rows that have finished leave the batch and the cache grows. In one loop from prompt
to stop all rows would be computed until the last one ends, and attention would read slots that nobody has
written: a large batch is bound by both.

The features that the target had while it wrote can be kept; then no text need be read again to train on it.

Shape letters as in `loop`; L rows of a stretch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ppow_jax.decode.drafting import Drafting
from ppow_jax.decode.loop import DecodeConfig, Decoded, State, grow, next_round, prefill
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import KeyValues
from ppow_jax.models.layers import FEW_ROWS
from ppow_jax.models.target import Target
from ppow_jax.models.target_outputs import Features
from ppow_jax.parallel import memory, partition, processes

# Tokens of prompts that a device reads at once: what they leave behind stays in a CPU's cache; accelerators
# gather weights for every part.
_READ = {"cpu": 2048, "default": 8192}
_SLOTS = 32  # by which the cache grows; each of its lengths is compiled,
_SHARES = 8  # and each size of the batch, which are multiples of an eighth
ROUNDS = 64  # at most, of a stretch


def decode_batch(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array | np.ndarray,
    length_B: jax.Array | np.ndarray,
    keys_B: jax.Array,
    config: DecodeConfig,
    mesh: Mesh,
    feature_dtype: str = "",
    drafting: Drafting | None = None,
    weights: Any = None,
) -> tuple[Decoded[np.ndarray], Features[np.ndarray] | None]:
    """`loop.decode` for many rows: the same texts, as NumPy arrays.

    Args:
      target, params, length_B, keys_B: as there.
      prompt_BxP: as there; a multiple of some number, so that few shapes are compiled.
      config: as there.
      mesh: keeps the rows that are left spread over it.
      feature_dtype: dtype of the features to be kept; empty: none are, as they must be with a drafter.
      drafting, weights: as there.

    Returns:
      The texts, and their features `[B, P + L, ...]`; those of a text's last token, which the target never
      reads, and of what lies beyond it are 0.
    """
    B, P = prompt_BxP.shape
    L = config.max_new_tokens
    each = drafting.tokens if drafting else 1  # tokens of a row that a round reads
    if drafting and feature_dtype:
        raise ValueError("features are kept where no drafter shifts the rounds of rows against each other")
    model = {"target": target, "config": config, "dtype": feature_dtype, "drafting": drafting}
    model["weights"] = weights
    turned = _turned(params) if partition.platform() == "cpu" and B * each > FEW_ROWS else None
    lengths = processes.host(length_B)
    first_slot = int(lengths.max())
    state, features = _prefill(
        params=params, prompt_BxP=prompt_BxP, length_B=length_B, keys_B=keys_B, mesh=mesh, **model
    )
    state = state._replace(prompt=np.int32(first_slot))  # what follows need not wait for padding to end
    where = np.arange(B)  # the rows of the batch that the state's are
    tokens, emitted, by_round = np.zeros((B, L), np.int32), np.zeros(B, np.int32), np.zeros((B, L), np.int32)
    book = _Book(features, lengths, P + L) if feature_dtype else None
    while True:
        found = processes.host((state.tokens, state.emitted, state.emitted_by_round, state.done))
        written, emitted[where], by_round[where], done = found
        tokens[where] = written[:, :L]
        if done.all():
            break
        rows = np.argsort(done, kind="stable")[: rows_for(int((~done).sum()), B, mesh)]
        leaving = len(rows) < len(done)
        where = where[rows] if leaving else where
        slots, first = state.cache[0].values.shape[2], int(state.round)
        full = not bool(_has_room(state, drafting))
        if leaving or full:
            state = _regroup(
                state, rows if leaving else None, slots + full * _more_slots(drafting), mesh, drafting
            )
        by_column = turned is not None and len(where) * each > FEW_ROWS
        state, features = _stretch(
            params=turned if by_column else params, by_column=by_column, state=state, **model
        )
        if book:
            book.add(features, where, first, int(state.round))
    tokens[np.arange(L) >= emitted[:, None]] = 0
    finished = np.isin(tokens[np.arange(B), emitted - 1], config.stop_ids)
    return Decoded(tokens, emitted, finished, by_round), book.close(emitted) if book else None


class _Book:
    """The features of a batch of texts, put together from prefill and stretches."""

    def __init__(self, prompts: Features, length_B: np.ndarray, slots: int) -> None:
        """Begins with `[B, P, ...]` of the prompts."""
        self._length_B = length_B
        more = slots - prompts.taps.shape[1]
        self._features = Features(*(np.pad(x, ((0, 0), (0, more), (0, 0))) for x in processes.host(prompts)))

    def add(self, stretch: Features, where_L: np.ndarray, first: int, last: int) -> None:
        """Adds rounds `first` up to `last` of some rows, `[rounds, L, ...]`: one position each."""
        for whole, part in zip(self._features, processes.host(stretch), strict=True):
            for number in range(first, last):
                whole[where_L, self._length_B[where_L] + number] = part[number - first]

    def close(self, emitted_B: np.ndarray) -> Features[np.ndarray]:
        """The features, with what lies beyond the texts set to 0."""
        for whole in self._features:
            beyond = np.arange(whole.shape[1]) >= (self._length_B + emitted_B)[:, None] - 1
            whole[beyond] = 0
        return self._features


def rows_for(texts: int, batch_size: int, mesh: Mesh) -> int:
    """Rows to compute for a number of texts, at most `batch_size`: few sizes, as each of them is compiled."""
    ways = partition.batch_ways(mesh)
    unit = -(-batch_size // (_SHARES * ways)) * ways
    return min(-(-texts // unit) * unit, batch_size)


@functools.partial(jax.jit, static_argnames=("target", "config", "dtype", "mesh", "drafting"))
def _prefill(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    dtype: str,
    mesh: Mesh,
    drafting: Drafting | None,
    weights: Any,
) -> tuple[State, Features | None]:
    """`loop.prefill`, a few rows at a time, with slots for what follows."""
    B, P = prompt_BxP.shape
    parts = _parts(B, P, mesh)
    layout = partition.batch_sharding(mesh, B // parts)

    def some(here: dict, *rows: jax.Array) -> tuple[State, Features | None]:
        prompt, length, keys = jax.lax.with_sharding_constraint(rows, layout)
        state, features = prefill(target, here, prompt, length, keys, config, drafting, weights)
        reach = drafting.depth + 1 if drafting else 1
        state = grow(state, -(-(P + reach) // _SLOTS) * _SLOTS, drafting)
        if partition.platform() == "cpu" and not drafting:
            state = state._replace(cache=kv_cache.in_blocks(state.cache, _SLOTS))
        state = state._replace(keys=state.prompt)  # any scalar: no zeros can stand for keys
        return state, Features(*(x.astype(dtype) for x in features)) if dtype else None

    # On several devices a part is every so manieth row, so that it lies on all of them; on one, rows that
    # follow each other: nothing is copied.
    axis = 1 if partition.batch_ways(mesh) > 1 else 0

    def split(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], parts, *shape[1:]) if axis else (parts, *shape)

    # Each part goes to its place in the whole: put together afterwards, the caches would be held three times.
    def blank(part: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(split(part.shape) if part.ndim else (), part.dtype)

    def add(number: jax.Array, whole: Any) -> Any:
        picked = [jax.lax.dynamic_index_in_dim(x, number, axis, False) for x in rows]
        part = some(partition.in_turn(params, number), *picked)
        put = lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, number, axis) if x.ndim else x  # noqa: E731
        return jax.tree.map(put, whole, part)

    rows = tuple(x.reshape(split((B // parts, *x.shape[1:]))) for x in (prompt_BxP, length_B, keys_B))
    one = jax.eval_shape(some, params, *(jax.eval_shape(lambda x: x.take(0, axis), x) for x in rows))
    whole = jax.lax.fori_loop(0, parts, add, jax.tree.map(blank, one))
    state, features = jax.tree.map(lambda x: x.reshape(B, *x.shape[2:]) if x.ndim else x, whole)
    return state._replace(keys=keys_B), features


def _parts(rows: int, length: int, mesh: Mesh) -> int:
    """Into how many equal parts prefill cuts the rows: a device reads at most `_READ` tokens of each."""
    ways, most = partition.batch_ways(mesh), partition.suited(_READ)
    possible = [n for n in range(1, rows + 1) if rows % n == 0 and rows // n % ways == 0] or [1]
    fitting = [n for n in possible if rows // n // ways * length <= most]
    return min(fitting, default=possible[-1])


@jax.jit
def _turned(params: dict) -> dict:
    """The parameters with all weights transposed: with a hundred rows and more XLA's CPU backend multiplies
    faster by a matrix that lies column by column (docs/performance.md)."""
    turn = lambda path, x: x.T if path[-1].key == "weight" else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(turn, params)


@functools.partial(jax.jit, static_argnames="drafting")
def _has_room(state: State, drafting: Drafting | None) -> jax.Array:
    """Whether there are slots for one more round."""
    slots = state.cache[0].values.shape[2]
    if drafting is None:
        return state.prompt + state.round < slots
    return jnp.where(state.done, 0, state.known).max() + drafting.depth <= slots


def _more_slots(drafting: Drafting | None) -> int:
    """By how many slots a cache grows."""
    return -(-(drafting.depth + 1 if drafting else 1) // _SLOTS) * _SLOTS


def _regroup(
    state: State, rows_L: np.ndarray | None, slots: int, mesh: Mesh, drafting: Drafting | None
) -> State:
    """Some rows of a state, None: all, with caches of `slots` slots. The old state is no more.

    Layer by layer, so that no two caches are held at once.
    """
    old, cache = state.cache, []
    state = _rows_of(state._replace(cache=()), rows_L, mesh)
    for layer in old:
        cache.append(_layer_of(layer, rows_L, slots, mesh))
        jax.block_until_ready(cache[-1])
        for leaf in layer:
            leaf.delete()
        memory.give_back()
    if drafting:
        state = state._replace(drafts=drafting.grow(state.drafts, slots))
    return state._replace(cache=tuple(cache))


@functools.partial(jax.jit, static_argnames="mesh")
def _rows_of(tree: Any, rows_L: jax.Array | None, mesh: Mesh) -> Any:
    """The named rows of all leaves that have rows; None: all. Heads stay where they are."""
    if rows_L is None:
        return tree
    spread = partition.batch_sharding(mesh, len(rows_L)).spec or (None,)

    def take(leaf: jax.Array) -> jax.Array:
        if leaf.ndim == 0:
            return leaf
        layout = PartitionSpec(*spread, *[PartitionSpec.UNCONSTRAINED] * (leaf.ndim - 1))
        return jax.lax.with_sharding_constraint(leaf[rows_L], NamedSharding(mesh, layout))

    return jax.tree.map(take, tree)


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _layer_of(layer: KeyValues, rows_L: jax.Array | None, slots: int, mesh: Mesh) -> KeyValues:
    return kv_cache.grow(_rows_of((layer,), rows_L, mesh), slots)[0]


@functools.partial(
    jax.jit,
    static_argnames=("target", "by_column", "config", "dtype", "drafting"),
    donate_argnames="state",
)
def _stretch(
    target: Target,
    params: dict,
    by_column: bool,
    state: State,
    config: DecodeConfig,
    dtype: str,
    drafting: Drafting | None,
    weights: Any,
) -> tuple[State, Features | None]:
    """Rounds until every text has ended or the slots are used up; at most `ROUNDS`.

    With `by_column` the parameters are `_turned`. The features are `[ROUNDS, L, ...]`: of the token that
    each round fed.
    """
    first = state.round
    L, c = len(state.done), target.config
    widths = (len(c.taps) * c.width, c.width)
    blank = Features(*(jnp.zeros((ROUNDS, L, width), dtype) for width in widths)) if dtype else None

    def more(carry: tuple[State, Features | None]) -> jax.Array:
        s = carry[0]
        return ~s.done.all() & _has_room(s, drafting) & (s.round < first + ROUNDS)

    def body(carry: tuple[State, Features | None]) -> tuple[State, Features | None]:
        state, features = carry
        at = state.round - first
        # turned back within the loop, which is a matter of names: the product reads the matrix as it lies
        own = _turned(params) if by_column else params
        state, done = next_round(target, own, state, config, drafting, weights)
        if dtype:
            put = lambda all_, new: all_.at[at].set(new[:, 0].astype(dtype))  # noqa: E731
            features = jax.tree.map(put, features, done.features)
        return state, features

    return jax.lax.while_loop(more, body, (state, blank))
