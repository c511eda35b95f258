"""What the compiled steps cost, as rows and as a table."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ppow_jax.bench.machine import show as show_table
from ppow_jax.compile import hlo
from ppow_jax.compile.chips import Chip
from ppow_jax.compile.operations import operations
from ppow_jax.compile.steps import Plan, Step, Steps
from ppow_jax.errors import out_of_memory
from ppow_jax.parallel import memory
from ppow_jax.parallel.console import log

Row = dict[str, Any]


class DoesNotFitError(Exception):
    """The named step needs more memory than a chip has."""


def compile_steps(group: Callable[[Plan], Steps], plan: Plan, chip: Chip) -> Iterator[Row]:
    """Compiles the steps of a group, one after the other.

    Raises:
      DoesNotFitError: a step does not fit a chip. Those after it are made from what it returns: none come.
    """
    steps, results = group(plan), None
    with contextlib.suppress(StopIteration):
        while True:
            step = steps.send(results)
            began = time.monotonic()
            lowered = step.traced.lower()
            program = _compiled(step, lowered)
            log.info("compile: %s took %.0f s", step.name, time.monotonic() - began)
            yield _row(step, program, plan, chip)
            results = jax.tree.map(_placed, lowered.out_info, program.output_shardings)
            del step, lowered, program
            memory.give_back()  # gigabytes, of a large target


def _compiled(step: Step, lowered: Any) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if not out_of_memory(e):
            raise
        log.error("compile: %s: %s", step.name, str(e).splitlines()[0][:200])
        raise DoesNotFitError(step.name) from e


def crowded(rows: list[Row], chip: Chip) -> list[str]:
    """Steps that compile but do not fit a chip beside what is held: the compiler counts what a step reads."""
    return [row["step"] for row in rows if row["bytes"] > chip.memory]


def _placed(out: Any, at: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=at)


def _row(step: Step, program: Any, plan: Plan, chip: Chip) -> Row:
    held, costs = program.memory_analysis(), hlo.analyse(program.as_text(), step.rounds)
    asked, chips = operations(step.traced.jaxpr, step.rounds), plan.mesh.size
    kind, many = step.counted
    computing, sending = costs.cycles / chip.clock, sum(costs.bytes.values()) / chip.links
    seconds = max(computing, sending)
    new = held.output_size_in_bytes - held.alias_size_in_bytes
    parts = {name: _held(tree) for name, tree in step.held.items()}
    return {
        "step": step.name,
        "held": parts,
        "results": new,
        "temporary": held.temp_size_in_bytes,
        # whatever the step itself reads: all that is held lies there
        "bytes": sum(parts.values()) + new + held.temp_size_in_bytes + held.generated_code_size_in_bytes,
        "operations": asked,
        "computing": computing,
        "sending": sending,
        "collectives": {k: [costs.counts[k], costs.bytes[k]] for k in sorted(costs.counts)},
        "utilisation": asked / chips / (seconds * chip.peak) if seconds else math.nan,
        "counted": kind,
        "per_second": many / seconds if seconds else math.nan,
    }


def _held(tree: Any) -> int:
    """Bytes of a tree on one device."""
    size = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
    return sum(size(x) for x in jax.tree.leaves(tree) if x.sharding is not None)


def show(title: str, rows: list[Row], chip: Chip) -> None:
    """Prints the table."""
    gb = lambda x: f"{x / 2**30:.2f}"  # noqa: E731
    lines = []
    for row in rows:
        sent = ", ".join(f"{n:.0f} {kind} {b / 1e6:.0f} MB" for kind, (n, b) in row["collectives"].items())
        lines.append(
            [
                row["step"],
                ", ".join(f"{name} {gb(size)}" for name, size in row["held"].items()),
                gb(row["temporary"]),
                f"{gb(row['bytes'])} ({row['bytes'] / chip.memory:.0%})",
                f"{row['operations'] / 1e12:.1f}",
                sent or "none",
                f"{row['computing'] * 1e3:.1f}",
                f"{row['sending'] * 1e3:.1f}",
                f"{row['utilisation']:.0%}",
                f"{row['per_second']:.0f} {row['counted']}",
            ]
        )
    columns = ["step", "held (GiB)", "temporary", "all (of memory)", "operations (1e12)", "sent by a chip"]
    columns += ["computing (ms)", "sending (ms)", "utilisation", "a second"]
    show_table(title, columns, lines)
