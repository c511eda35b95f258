"""How many operations a program asks for: its matrix products, from JAX's own description of it."""

import math
from typing import Any

import jax
from jax.extend import core
from jax.interpreters import partial_eval


def operations(closed: core.ClosedJaxpr, rounds: int = 1) -> float:
    """Multiplications and additions of all matrix products, on all devices together.

    What no result depends on does not count: the compiler leaves it out. The body of a `scan` counts as often
    as it runs; of a `while`, whose rounds depend on data, `rounds` times, within another such loop once; of
    the branches of a condition the dearest.
    """
    jaxpr = closed.jaxpr
    return _count(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], rounds)


def _count(jaxpr: Any, rounds: int) -> float:
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
            continue
        loop = equation.primitive.name == "while"
        parts = [_count(j, 1 if loop else rounds) for j in _inner(equation.params)]
        if equation.primitive.name == "scan":
            total += equation.params["length"] * sum(parts)
        elif loop:
            total += rounds * sum(parts)
        elif equation.primitive.name == "cond":
            total += max(parts)
        else:
            total += sum(parts)
    return total


def _product(equation: Any) -> float:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (operand.aval.shape for operand in equation.invars)
    if len(left) == len(right) == len(contracted) + len(batch):  # of vectors, as in `layers.inner`
        return 0.0
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _inner(params: dict[str, Any]) -> list[Any]:
    is_one = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
    return [x for x in jax.tree.leaves(list(params.values()), is_leaf=is_one) if is_one(x)]
