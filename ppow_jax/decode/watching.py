"""Watching a text while it is decoded: what is told after every round, and to whom.

Shape letters: B rows, J nodes of a tree, M tokens that a round emits at most, V vocabulary.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from ppow_jax.decode.sampling import Sampling, log_probs
from ppow_jax.decode.verify import Draft, Walk


class Watched(NamedTuple):
    """What those who watch are told of a round.

    Attributes:
      tokens: int32 `[B, M]`, the text's.
      kept: int32 `[B]`, how many of them a row emitted; 0: it had ended before.
      drafted: int32 `[B, J]`, the trees; node 0 is the last token known before. Negative: nothing.
      parents: int32 `[B, J]`, as in `verify.Draft`.
      nodes: int32 `[B, M]`, the way that the text took through the tree, as in `verify.Walk`.
      accepted: int32 `[B]`, drafted tokens that agreed; a stop token among them, or the longest text, may
        have ended the text before the last of them.
      drafter_log_probs: float32 `[B, J]`, of each drafted token after its parent, over the draft vocabulary;
        NaN at node 0, and where no distribution proposes. None unless they are asked for.
      target_log_probs: the same of the target, over its own vocabulary.
    """

    tokens: np.ndarray | jax.Array
    kept: np.ndarray | jax.Array
    drafted: np.ndarray | jax.Array
    parents: np.ndarray | jax.Array
    nodes: np.ndarray | jax.Array
    accepted: np.ndarray | jax.Array
    drafter_log_probs: np.ndarray | jax.Array | None = None
    target_log_probs: np.ndarray | jax.Array | None = None


Watch = Callable[[Watched], None]


@dataclasses.dataclass
class _Watcher:
    """Who watches, and what went wrong there, which JAX would wrap into an error of its own."""

    watch: Watch
    error: BaseException | None = None


_watchers: dict[int, _Watcher] = {}
_numbers = itertools.count()


@contextlib.contextmanager
def numbered(watch: Watch) -> Iterator[np.int32]:
    """The number by which a compiled program names who watches, so that another one compiles nothing.

    Raises:
      BaseException: whatever `watch` has raised.
    """
    number = next(_numbers)
    _watchers[number] = watcher = _Watcher(watch)
    try:
        yield np.int32(number)
    except jax.errors.JaxRuntimeError:
        if watcher.error is not None:
            raise watcher.error from None
        raise
    finally:
        del _watchers[number]


def tell(number: jax.Array, about: Watched) -> None:
    """Has the program call the watcher of this number, in the order of the rounds."""
    io_callback(_call, None, number, about, ordered=True)


def _call(number: np.ndarray, about: Watched) -> None:
    watcher = _watchers[int(number)]
    try:
        watcher.watch(jax.tree.map(np.asarray, about))
    except BaseException as e:  # Ctrl-C among them
        watcher.error = e
        raise


def watched(
    draft: Draft, way: Walk, kept_B: jax.Array, scored: tuple[jax.Array, Sampling] | None = None
) -> Watched:
    """What there is to tell of a pass.

    Args:
      draft: what the target verified.
      way: that the text took through it.
      kept_B: int32, how many of its tokens each row emitted.
      scored: where log-probabilities are wanted, the target's logits `[B, J, V]` after every node, and how
        its tokens are picked.
    """
    told = Watched(way.tokens, kept_B, draft.tokens, draft.parents, way.nodes, way.accepted)
    if scored is None:
        return told
    B, J = draft.tokens.shape
    log_p_BxJxV = log_probs(*scored)
    log_p_BxJ = log_p_BxJxV[jnp.arange(B)[:, None], draft.parents, jnp.maximum(draft.tokens, 0)]
    log_q_BxJ = jnp.nan if draft.log_probs is None else draft.log_probs
    unknown_BxJ = (jnp.arange(J) == 0) | (draft.tokens < 0)
    return told._replace(
        drafter_log_probs=jnp.where(unknown_BxJ, jnp.nan, log_q_BxJ),
        target_log_probs=jnp.where(unknown_BxJ, jnp.nan, log_p_BxJ),
    )
