"""Windows whose tokens are known before they begin, and their gradient: all training.

Shape letters: B rows, A anchors, G windows a group, K steps of a window, N draft vocabulary, D width,
S prefix slots.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.drafters.windows import (
    Given,
    Start,
    by_parts,
    count_of_logits,
    head_at_hand,
    logits_of,
    parts,
    stacked,
    stepping,
)
from ppow_jax.errors import ConfigError
from ppow_jax.models import blocks
from ppow_jax.models.cache import Cache

# observe(step, hidden_BxAxGxD, logits_BxAxGxN, given) -> statistics, leaves [B, A, G]. At step 0 it is handed
# [B, A, 1, ...], as a group shares its anchor, and still gives [B, A, G]. It may be asked about some anchors
# only.
Observe = Callable[[int, jax.Array, jax.Array, Any], Any]


def known_pass(
    drafter: Drafter,
    weights: DrafterWeights,
    prefix: Cache,
    start: Start,
    tokens_BxAxGxK: jax.Array,
    observe: Observe,
    given: Given = lambda step: (),
    remat: str = "none",
) -> Any:
    """Steps the drafter through tokens that are known, as training does.

    Args:
      drafter, weights, prefix, start: as in `windows.window_pass`.
      tokens_BxAxGxK: target ids that the windows hold.
      observe: gives statistics, `[B, A, G]` leaves, G the same in every step. It sees so many anchors at a
        time that their logits fit into `blocks.VALUES`. In the backward pass it is computed again, and so are
        the logits where they did not fit as a whole: no more of the arrays as wide as the vocabulary is kept.
      given: what `observe` is given at a step.
      remat: what the backward pass computes again of a step: "none", "dots" (all but matrix products), "all".

    Returns:
      The statistics of all steps, stacked to `[B, A, G, K]`.

    Raises:
      ConfigError: a statistic is not `[B, A, G]`, or not the same in every step.
    """
    through = stepping(drafter, weights, prefix, start, remat)
    steps = range(tokens_BxAxGxK.shape[-1])
    hidden = [through.send(tokens_BxAxGxK[..., step - 1] if step else None) for step in steps]
    given_K = [given(step) for step in steps]
    if all(parts(drafter, h) == 1 for h in hidden):
        params = head_at_hand(weights, drafter.config.dtype)
        collected = _observed(drafter, observe, params, hidden, given_K)
    else:
        # In float32: the gradients of so many parts would be added up in another dtype.
        params = head_at_hand(weights, jnp.float32)
        of_step = [functools.partial(observe, step) for step in steps]
        collected = [by_parts(drafter, params, of_step[k], hidden[k], given_K[k]) for k in steps]
    _check_shapes(collected, tokens_BxAxGxK.shape[:2])
    return stacked(collected)


def _check_shapes(collected: list, rows_and_anchors: tuple[int, ...]) -> None:
    first = jax.tree_util.tree_leaves_with_path(collected[0])
    for (path, _), *leaves in zip(first, *map(jax.tree.leaves, collected), strict=True):
        shapes = [leaf.shape for leaf in leaves]
        if len(set(shapes)) > 1 or shapes[0][:-1] != rows_and_anchors:
            B, A = rows_and_anchors
            raise ConfigError(
                f"observe: found the statistic {jax.tree_util.keystr(path)} of shapes {shapes}, expected "
                f"({B}, {A}, G) at every step: rows, anchors, windows a group"
            )


def _observed(drafter: Drafter, observe: Observe, params: dict, hidden: list, given: list) -> list:
    """`observe(step, hidden, logits, given)` of every step; in the backward pass it is computed again from
    the logits.

    They are the only arrays as wide as the vocabulary that are kept between the passes. `jax.checkpoint`
    would copy what it keeps. The gradient of the head is one product for all steps whose logits fit into
    `blocks.VALUES`: it is as large as the head itself, and each step's own would be written, sent to other
    devices, and added up.
    """

    def all_steps(hidden: list, logits: list, given: list) -> list:
        return [observe(step, *about) for step, about in enumerate(zip(hidden, logits, given, strict=True))]

    # What `observe` closes over becomes an argument like others, as a custom derivative demands.
    logits = jax.eval_shape(lambda: [logits_of(drafter, params, h) for h in hidden])
    traced, shape = jax.make_jaxpr(all_steps, return_shape=True)(hidden, logits, given)

    def observed(closed_over: list, hidden: list, logits: list, given: list) -> list:
        run = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, closed_over))
        return jax.tree.unflatten(jax.tree.structure(shape), run(*jax.tree.leaves((hidden, logits, given))))

    @jax.custom_vjp
    def whole(params: dict, closed_over: list, hidden: list, given: list) -> list:
        return forward(params, closed_over, hidden, given)[0]

    def forward(params: dict, closed_over: list, hidden: list, given: list) -> tuple[list, tuple]:
        logits = [logits_of(drafter, params, h) for h in hidden]
        return observed(closed_over, hidden, logits, given), (params, closed_over, hidden, logits, given)

    def backward(kept: tuple, wanted: list) -> tuple:
        params, _, hidden, *_ = kept
        of_closed_over, of_hidden, of_logits, of_given = jax.vjp(observed, *kept[1:])[1](wanted)
        of_params, through_head = [], []
        for some in _together(drafter, hidden):
            shapes = [h.shape for h in hidden[some]]
            joined = [
                jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in arrays[some]], 1)
                for arrays in (hidden, of_logits)
            ]
            to_head = jax.vjp(functools.partial(logits_of, drafter), params, joined[0])[1]
            of_some, through = to_head(joined[1])
            of_params.append(of_some)
            ends = np.cumsum([A * G for _, A, G, _ in shapes])[:-1]
            through_head += [x.reshape(s) for x, s in zip(jnp.split(through, ends, 1), shapes, strict=True)]
        of_hidden = jax.tree.map(jnp.add, of_hidden, through_head)
        return jax.tree.map(_sum, *of_params), of_closed_over, of_hidden, of_given

    whole.defvjp(forward, backward)
    return whole(params, traced.consts, hidden, given)


def _together(drafter: Drafter, hidden: list) -> list[slice]:
    """The steps, as many at a time as have logits that fit into `blocks.VALUES`; at least one."""
    firsts, values = [0], 0
    for step, h in enumerate(hidden):
        values += count_of_logits(drafter, h)
        if step > firsts[-1] and blocks.count(values, len(hidden)) > 1:
            firsts.append(step)
            values = count_of_logits(drafter, h)
    return [slice(*ends) for ends in itertools.pairwise([*firsts, len(hidden)])]


def _sum(first: jax.Array, *others: jax.Array) -> jax.Array:
    """Added up in float32; in the dtype of the first."""
    return sum((x.astype(jnp.float32) for x in others), first.astype(jnp.float32)).astype(first.dtype)
