"""Our own training step: a process of its own, spoken to as `trainer_worker` is.

    python -m ppow_jax.bench.own_worker CONFIG.json RUN     # a resolved config, and one of its training runs

A step is of a batch of random texts with features; no other work is done in the process.
"""

import json
import pathlib
import sys
import tempfile

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # as the command does

import jax
import jax.numpy as jnp

from ppow_jax import config, experiment
from ppow_jax.bench import training_steps
from ppow_jax.bench.machine import fresh_drafter
from ppow_jax.bench.trainer_worker import answer, matrix_rate
from ppow_jax.compile.operations import operations
from ppow_jax.training.step import make_signal, make_step, make_update


def main(path: str, name: str) -> None:
    """Answers until the input ends."""
    settings = config.from_config(json.loads(pathlib.Path(path).read_text()))
    answers, sys.stdout = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as scratch:
        made = experiment.build(settings, pathlib.Path(scratch))
        with jax.set_mesh(made.mesh):
            _answer(made, name, answers)


def _answer(made: experiment.Experiment, name: str, answers: object) -> None:
    run = made.settings.train[name]
    recipe, state, batch = training_steps.set_up(made, run, fresh_drafter(made))
    step, number = make_step(recipe, made.target_params, made.key(name, run.seed)), 0

    def once() -> float:
        nonlocal state, number
        number += 1
        state, metrics = step(number, state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    frozen = (state["vocab"], made.target_params, batch)
    about = (state["params"], *frozen, state["memory"], jnp.int32(1), made.key(name))
    make = make_signal(recipe)
    traced, learner = make.trace(*about), {k: state[k] for k in ("params", "opt_state")}
    update = make_update(recipe).trace(learner, *frozen, traced.out_info[0])
    rounds = recipe.objective.rounds(run.batch_size)  # of a loop that data end; at most
    asked = operations(traced.jaxpr, rounds) + operations(update.jaxpr)
    signal, kept, _ = make(*about)
    state["memory"] = kept  # what it was given is donated
    counted = max(int((x > 0).sum()) for x in signal.weights.values())
    first = {"version": f"jax {jax.__version__}", "positions": counted, "operations": asked}
    answer(once, first | {"rate": matrix_rate("jax")}, answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
