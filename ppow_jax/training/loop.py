"""The loop around the training step: it saves, measures, resumes, and settles how many steps there are."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ppow_jax.data import texts
from ppow_jax.decode.cost import measure_gamma
from ppow_jax.drafters.eagle3 import Drafter, config_from, drafter_of, weights_of
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.objectives.base import Memory, Sizes
from ppow_jax.parallel import files, partition, preemption, processes
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.parallel.console import log
from ppow_jax.parallel.progress import duration
from ppow_jax.settings import TrainSettings
from ppow_jax.training import curves, drafters
from ppow_jax.training.metrics import Writer
from ppow_jax.training.step import Recipe, State, Step, drafter_params, make_optimizer, make_step

# A run of so many minutes is timed over so many steps and seconds, whichever is more, but no more than the
# last; the first ones, which compile, are left out.
_LEFT_OUT, _TIMED_STEPS, _TIMED_SECONDS, _TIMED_AT_MOST = 2, 5, 20.0, 100
_LATE = 2**20  # number of the first of these steps: past the warm-up of any rule for anchors

Measure = Callable[[State], Mapping[str, Any]]


def train(experiment: Experiment, run: str, corpus: texts.Corpus) -> None:
    """Trains a run from its newest checkpoint, or its start, to its last step.

    Args:
      experiment: with the settings of the run.
      run: its name in `config.train`.
      corpus: the texts.

    Raises:
      UserError: a loss that is not finite, the newest checkpoint is then from before it; or the last step
        could not be saved.
      Stopped: the run was asked to end, and is saved.
    """
    with contextlib.closing(drafters.checkpoints(experiment, run)) as store:
        _train(experiment, run, corpus, store)


def _train(experiment: Experiment, run: str, corpus: texts.Corpus, store: Checkpoints) -> None:
    settings, log_settings = experiment.settings.train[run], experiment.settings.log
    sizes = Sizes(corpus.records, experiment.settings.data.length)
    batches = _batches(experiment, run, corpus)
    if store.latest is None:
        start = drafters.begin(experiment, run, corpus)
        drafter, gamma = start.drafter, gamma_of(experiment, run, start.drafter)
        steps = settings.steps or _steps_in_minutes(experiment, run, corpus, start, gamma, sizes)
        made = recipe(experiment, settings, drafter, steps, gamma)
        done, seconds, state = 0, 0.0, place(experiment, made, start.params, start.vocab, sizes)
    else:
        where = drafters.directory(experiment.workdir, run)
        about = drafters.checked(store.readable_about(), where)
        shape = config_from(about["drafter"], str(where), experiment.settings.drafter.module)
        drafter, steps = drafter_of(shape), about["steps"]
        made = recipe(experiment, settings, drafter, steps, gamma_of(experiment, run, drafter))
        done, state, about = store.restore(abstract_state(experiment, made, sizes), batches)
        seconds = about["seconds"]
        log.info("%s: resumed after step %d", run, done)
    key = experiment.key(run, settings.seed)
    step = make_step(made, experiment.target_params, key, log_settings.profile)
    about = {"target": experiment.fingerprint, "drafter": dataclasses.asdict(drafter.config), "steps": steps}
    measure, numbers = curves.acceptance(experiment, corpus, drafter), range(done + 1, steps + 1)
    about_run = (experiment.workdir, run, steps, done, seconds, log_settings)
    with Writer(*about_run) as writer, preemption.at_steps():
        _walk(experiment, run, state, step, batches, measure, numbers, store, writer, about)


def _walk(
    experiment: Experiment,
    run: str,
    state: State,
    step: Step,
    batches: Iterator,
    measure: Measure,
    numbers: range,
    store: Checkpoints,
    writer: Writer,
    about: dict[str, Any],
) -> None:
    """Makes the steps of these numbers, and saves, measures and logs on the way."""
    every, size = experiment.settings.log, experiment.settings.train[run].batch_size
    steps = about["steps"]
    for number in numbers:
        began = time.monotonic()
        batch = partition.assemble(next(batches), experiment.mesh, size)
        waited = time.monotonic() - began
        state, metrics = step(number, state, batch)
        metrics = dict(metrics) | {"seconds_waiting_for_data": round(waited, 4)}
        if last := number == steps:
            state = state | {"params": jax.tree.map(jnp.copy, drafter_params(state))}
        if number * every.curve_points // steps > (number - 1) * every.curve_points // steps:
            metrics |= measure(state)
        writer.write(number, metrics)
        stop = preemption.asked()
        if number % every.checkpoint_every_steps == 0 or last or stop:
            writer.flush()  # refuses a loss that is not finite before it is saved
            store.save(number, state, batches, about | {"seconds": writer.seconds})
        if last or stop:
            store.require(number)
        if stop:
            raise preemption.Stopped(f"{run} is saved after step {number} of {steps}")


def _batches(experiment: Experiment, run: str, corpus: texts.Corpus) -> Iterator:
    """The texts of a run, in its order; of each batch the rows that belong to this process."""
    settings = experiment.settings.train[run]
    key = experiment.key(settings.order or run, settings.seed)
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    rows = partition.rows_here(experiment.mesh, settings.batch_size)
    try:
        return texts.iterate(corpus.train, settings.batch_size, seed, rows)
    except UserError as e:
        raise UserError(f"config.train.{run}.{e}") from e


def recipe(
    experiment: Experiment, settings: TrainSettings, drafter: Drafter, steps: int, gamma: float
) -> Recipe:
    """What the steps of a run are made of."""
    return Recipe(
        settings.method,
        experiment.target,
        drafter,
        make_optimizer(settings.optimizer, steps * settings.method.updates, settings.average),
        settings.accumulate,
        experiment.settings.drafter.remat,
        experiment.tokenizer.stop_ids,
        gamma,
        experiment.mesh,
    )


def place(experiment: Experiment, recipe: Recipe, params: dict, vocab: Any, sizes: Sizes) -> State:
    """The state before the first step, on the mesh."""
    whole = partition.replicated(experiment.mesh)
    params = partition.shard(params, experiment.mesh)
    memory = recipe.objective.init(sizes, params)
    return {
        "params": params,
        "opt_state": partition.shard(recipe.optimizer.init(params), experiment.mesh),
        "vocab": partition.put(vocab, whole),
        "memory": jax.tree.map(partition.put, memory, memory_layout(memory, experiment.mesh)),
    }


def memory_layout(memory: Memory, mesh: Mesh) -> Any:
    """Where an objective's memory lies: parameters by the table, all else on every device."""
    whole = partition.replicated(mesh)
    return {
        name: partition.shardings(x, mesh) if isinstance(x, dict) else whole for name, x in memory.items()
    }


def abstract_state(experiment: Experiment, recipe: Recipe, sizes: Sizes) -> State:
    """Shapes of a state with their places, to restore to."""
    state = drafters.shapes(experiment, recipe.drafter)
    opt_state = jax.eval_shape(recipe.optimizer.init, state["params"])
    shapes = jax.eval_shape(lambda params: recipe.objective.init(sizes, params), state["params"])
    memory = jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
        shapes,
        memory_layout(shapes, experiment.mesh),
    )
    return state | {"opt_state": partition.laid_out(opt_state, experiment.mesh), "memory": memory}


def gamma_of(experiment: Experiment, run: str, drafter: Drafter) -> float:
    """gamma as a run's objective has it, or measured once for a workdir and shape; 0 for one without any."""
    given = getattr(experiment.settings.train[run].method, "gamma", "0")
    if given != "measured":
        return float(given)
    path = experiment.workdir / "gamma.json"
    kept = files.read_json(path) or {}
    mark = json.dumps([dataclasses.asdict(drafter.config), experiment.target.config.dtype])
    if mark not in kept:
        shapes = drafters.shapes(experiment, drafter)
        blank = jax.tree.map(lambda x: partition.put(jnp.zeros(x.shape, x.dtype), x.sharding), shapes)
        weights = weights_of(blank["params"], experiment.target_params, blank["vocab"])
        gamma = measure_gamma(experiment.target, experiment.target_params, drafter, weights)
        kept[mark] = processes.agreed(gamma)
        files.write_json(path, kept)
    log.info("%s: gamma measured on this machine: %.4f", run, kept[mark])
    return kept[mark]


def _steps_in_minutes(
    experiment: Experiment,
    run: str,
    corpus: texts.Corpus,
    start: drafters.Trained,
    gamma: float,
    sizes: Sizes,
) -> int:
    """How many steps fit into a run's minutes, settled once for a workdir."""
    settings = experiment.settings.train[run]
    path = experiment.workdir / "train" / f"{run}.json"
    known = files.read_json(path)
    if known is None:
        made = recipe(experiment, settings, start.drafter, _LATE, gamma)
        copied = jax.tree.map(jnp.copy, start.params)  # a step donates them
        state = place(experiment, made, copied, start.vocab, sizes)
        seconds = _seconds_a_step(experiment, run, corpus, made, state)
        steps = max(2, round(settings.minutes * 60 / seconds))
        known = processes.agreed({"steps": steps, "seconds_a_step": seconds, "minutes": settings.minutes})
        files.write_json(path, known)
    about = (known["steps"], duration(known["minutes"] * 60), known["seconds_a_step"])
    log.info("%s: %d steps in %s, at %.3f s each", run, *about)
    return known["steps"]


def _seconds_a_step(
    experiment: Experiment, run: str, corpus: texts.Corpus, recipe: Recipe, state: State
) -> float:
    """Mean time of a step, waiting for texts included, over some that are thrown away."""
    settings = experiment.settings.train[run]
    step = make_step(recipe, experiment.target_params, experiment.key("timing"))
    batches = _batches(experiment, run, corpus)
    log.info("%s: timing some steps, to see how many fit into %s", run, duration(settings.minutes * 60))
    for count in range(1 - _LEFT_OUT, _TIMED_AT_MOST + 1):
        batch = partition.assemble(next(batches), experiment.mesh, settings.batch_size)
        state, metrics = step(_LATE + count, state, batch)
        jax.block_until_ready((state, metrics))
        if count <= 0:
            began = time.monotonic()
            continue
        spent = time.monotonic() - began
        if processes.agreed(count >= _TIMED_STEPS and spent >= _TIMED_SECONDS):
            break
    return spent / count
