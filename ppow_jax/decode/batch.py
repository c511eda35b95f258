"""Decoding of large batches: the rounds of `loop`, in stretches.

Between two stretches the rows that have finished leave the batch and the cache grows. In one loop from prompt
to stop all rows would be computed until the last one ends, and attention would read slots that nobody has
written: a large batch is bound by both.

Shape letters as in `loop`.
"""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from ppow_jax import partition
from ppow_jax.decode.loop import DecodeConfig, Decoded, State, grow, next_round, prefill
from ppow_jax.models.drafter import Drafter, DrafterWeights
from ppow_jax.models.target import Target

_SLOTS = 32  # by which the cache grows; each of its lengths is compiled,
_SHARES = 8  # and each size of the batch, which are multiples of an eighth


def decode_batch(
    target: Target,
    params: dict,
    prompt_BxP: jax.Array,
    length_B: jax.Array,
    keys_B: jax.Array,
    config: DecodeConfig,
    mesh: Mesh,
    drafter: Drafter | None = None,
    weights: DrafterWeights | None = None,
) -> Decoded:
    """`loop.decode` for many rows; the same texts, as NumPy arrays.

    Args:
      target, params, length_B, keys_B, config, drafter, weights: as there.
      prompt_BxP: as there; where P is a multiple of 32, batches of other lengths need less compiling.
      mesh: keeps the rows that are left spread over it.
    """
    B, P = prompt_BxP.shape
    J, L = config.window + 1, config.max_new_tokens
    shared = {"target": target, "params": params, "drafter": drafter, "weights": weights, "config": config}
    state = _prefill(prompt_BxP=prompt_BxP, length_B=length_B, keys_B=keys_B, **shared)
    where = np.arange(B)  # the rows of the batch that the state's are
    tokens, count, emitted = np.zeros((B, L), np.int32), np.zeros(B, np.int32), np.zeros((B, L), np.int32)
    while True:
        tokens[where], count[where] = np.asarray(state.tokens)[:, :L], np.asarray(state.count)
        emitted[where] = np.asarray(state.emitted_by_round)
        done = np.asarray(state.done)
        if done.all():
            break
        rows = np.argsort(done, kind="stable")[: rows_for(int((~done).sum()), B, mesh)]
        slots = min(state.cache[0].values.shape[2] + max(_SLOTS, J), P + L + J)
        state = _stretch(state=_regroup(state, rows, slots, mesh), **shared)
        where = where[rows]
    tokens[np.arange(L) >= count[:, None]] = 0
    finished = np.isin(tokens[np.arange(B), count - 1], config.stop_ids)
    return Decoded(tokens, count, finished, emitted)


def rows_for(texts: int, batch_size: int, mesh: Mesh) -> int:
    """Rows to compute for a number of texts, at most `batch_size`: few sizes, as each of them is compiled."""
    ways = partition.batch_ways(mesh)
    unit = -(-batch_size // (_SHARES * ways)) * ways
    return min(-(-texts // unit) * unit, batch_size)


_STATIC = ("target", "drafter", "config")
_prefill = jax.jit(prefill, static_argnames=_STATIC)


@functools.partial(jax.jit, static_argnames=("slots", "mesh"))
def _regroup(state: State, rows_R: jax.Array, slots: int, mesh: Mesh) -> State:
    """Some rows of a state, with caches of `slots` slots."""
    layout = partition.batch_sharding(mesh, len(rows_R))

    def take(leaf: jax.Array) -> jax.Array:
        return leaf if leaf.ndim == 0 else jax.lax.with_sharding_constraint(leaf[rows_R], layout)

    return grow(jax.tree.map(take, state), slots)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnames="state")
def _stretch(
    target: Target,
    params: dict,
    drafter: Drafter | None,
    weights: DrafterWeights | None,
    state: State,
    config: DecodeConfig,
) -> State:
    """Rounds until every text has ended or one has no slots for another round."""
    slots = state.cache[0].values.shape[2]
    body = functools.partial(next_round, target, params, drafter, weights, config=config)

    def more(s: State) -> jax.Array:
        fits = s.known + config.window <= slots
        return ~s.done.all() & (s.done | fits).all()

    return jax.lax.while_loop(more, body, state)
