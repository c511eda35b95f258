"""What the training stages share: state, batches, and the loop that saves, measures and resumes."""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ppow_jax import partition, preemption, teacher
from ppow_jax.console import log
from ppow_jax.data import features, texts
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.interop import eagle3
from ppow_jax.interop.checkpoint import Checkpoints, abstract
from ppow_jax.metrics import Writer
from ppow_jax.models.drafter import (
    Drafter,
    DrafterConfig,
    abstract_params,
    config_from,
    drafter_config,
    init_params,
)
from ppow_jax.models.target import TargetConfig
from ppow_jax.settings import DrafterSettings, OptimizerSettings

State = dict[str, Any]  # params, opt_state, vocab and what a stage adds
Batch = dict[str, jax.Array]  # see data.texts.Texts


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The responses as training and held-out texts."""

    train: texts.Texts
    held: texts.Texts
    indices: list[int]  # of the training records
    records: int  # all of them


def corpus(experiment: Experiment) -> Corpus:
    """Opens the responses and, if `data.cache_features`, computes the features that are missing."""
    data = experiment.settings.data
    train, held = texts.split(experiment.responses, data.length, data.holdout)
    kept = None
    if data.cache_features:
        kept = features.ensure(experiment)
    make = lambda indices: texts.Texts(experiment.responses, kept, indices, data.length)  # noqa: E731
    return Corpus(make(train), make(held), train, len(experiment.responses))


_taps = jax.jit(lambda *about: teacher.lesson_of(*about).taps, static_argnums=0)


def spread(available: int, wanted: int) -> range:
    """Indices of as many items as wanted, evenly spread; of all if there are no more."""
    count = min(wanted, available)
    return range(0, count * (available // count), available // count)


def stack(experiment: Experiment, items: Sequence[Mapping[str, Any]]) -> Batch:
    """Items of `data.texts.Texts` as a batch on the mesh."""
    arrays = {k: np.stack([item[k] for item in items]) for k in items[0]}
    return partition.shard_batch(arrays, experiment.mesh)


def taps_of(experiment: Experiment, batch: Batch) -> jax.Array:
    """The target's taps `[B, T, C]` on a batch, from its features or by running the target."""
    return _taps(experiment.target, experiment.target_params, batch)


def make_optimizer(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """AdamW, linear warm-up, cosine decay to a tenth, global-norm clipping."""
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, steps - 1),
        decay_steps=steps,
        end_value=settings.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=settings.weight_decay),
    )


@functools.cache
def imported(path: str, target: TargetConfig, fingerprint: str) -> eagle3.Imported:
    """The drafter that `config.drafter.path` names.

    Raises:
      UserError: it cannot be read, is of another target, or sees other layers of it than `target.taps`.
    """
    found = eagle3.read(pathlib.Path(path).expanduser(), target, fingerprint)
    if found.taps != target.taps:
        raise ConfigError(
            f"config.target.taps: found {target.taps}, expected {found.taps}, "
            f"which the drafter in {path} sees"
        )
    return found


def _imported(experiment: Experiment) -> eagle3.Imported | None:
    path = experiment.settings.drafter.path
    return imported(path, experiment.target.config, experiment.fingerprint) if path else None


def shape_of_drafter(experiment: Experiment) -> DrafterConfig:
    """The drafter's shape by the settings, or by the files that it begins with."""
    d = experiment.settings.drafter
    if found := _imported(experiment):
        return dataclasses.replace(found.config, dtype=d.dtype)
    return shape_by(d, experiment.target.config)


def shape_by(d: DrafterSettings, target: TargetConfig) -> DrafterConfig:
    """A new drafter's shape by the settings."""
    return drafter_config(target, d.vocab_size, d.mlp_hidden, d.dtype, d.kv_heads, d.layers, d.width)


def fresh_state(experiment: Experiment, optimizer: optax.GradientTransformation, vocab: np.ndarray) -> State:
    """A new drafter and its optimiser, on the mesh."""
    config = shape_of_drafter(experiment)
    params = init_params(
        config,
        experiment.target.config,
        experiment.target_params,
        jnp.asarray(vocab),
        experiment.key("drafter"),
    )
    return place(experiment, {"params": params, "vocab": vocab}, optimizer)


def place(experiment: Experiment, state: State, optimizer: optax.GradientTransformation) -> State:
    """Lays a state out on the mesh and adds a fresh optimiser state."""
    params = partition.shard(state["params"], experiment.mesh)
    opt_state = partition.shard(optimizer.init(params), experiment.mesh)
    vocab = partition.put(state["vocab"], partition.replicated(experiment.mesh))
    return {"params": params, "opt_state": opt_state, "vocab": vocab}


def checkpoints(experiment: Experiment, stage: str) -> Checkpoints:
    """The checkpoint directory of a stage."""
    directory = experiment.workdir / "checkpoints" / stage
    return Checkpoints(directory, experiment.settings.log.keep_checkpoints)


def load_drafter(experiment: Experiment, stage: str) -> tuple[State, dict[str, Any]]:
    """The drafter that a finished stage left (params and vocab), and what is noted about it.

    Before `supervise` has run, or for the name "imported", it is the one that was read from files.

    Raises:
      UserError: the stage has not run, or its checkpoint belongs to another target.
    """
    trained = (experiment.workdir / "checkpoints" / stage).exists()
    if stage in ("supervise", "imported") and not trained and (found := _imported(experiment)):
        about = {"drafter": dataclasses.asdict(found.config), "steps": 0, "seconds": 0.0}
        return {"params": partition.shard(found.params, experiment.mesh), "vocab": found.vocab}, about
    store = checkpoints(experiment, stage)
    if store.latest is None:
        raise UserError(f"{experiment.workdir}: no checkpoint of stage {stage!r}; add it to config.stages")
    about = store.about()
    if about["target"] != experiment.fingerprint:
        raise UserError(
            f"{experiment.workdir}/checkpoints/{stage}: drafter of target {about['target'][:12]}, "
            f"this target is {experiment.fingerprint[:12]}; use the target that it was trained for"
        )
    shapes = abstract_params(config_from(about["drafter"]))
    whole, ids = partition.replicated(experiment.mesh), (about["drafter"]["vocab_size"],)
    state = {
        "params": partition.laid_out(shapes, experiment.mesh),
        "vocab": jax.ShapeDtypeStruct(ids, np.int32, sharding=whole),
    }
    _, state, about = store.restore_part(state)
    store.close()
    return state, about


def split(state: State) -> tuple[State, jax.Array]:
    """What an update changes (and may donate): parameters and optimiser; and the draft vocabulary."""
    return {k: state[k] for k in ("params", "opt_state")}, state["vocab"]


def gradient(
    loss_of: Callable[..., tuple[jax.Array, dict[str, jax.Array]]], params: dict, parts: int, *rows: Any
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict]:
    """((loss, metrics), gradient) of a loss that is a sum over rows, in equal parts, one after the other.

    Args:
      loss_of: (params, *rows) -> loss, metrics; both add up over parts, but for metrics named `..._gap`, of
        which the largest counts.
      params: what the gradient is of.
      parts: divides the rows.
      rows: trees of arrays `[B, ...]`.
    """
    grad = jax.value_and_grad(loss_of, has_aux=True)
    if parts == 1:
        return grad(params, *rows)

    def cut(x: jax.Array) -> jax.Array:
        # every parts-th row, so that a part lies on all devices as the whole does
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def add(path: tuple, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) if partition.path_name(path).endswith("_gap") else a + b

    def one(total: Any, part: tuple) -> tuple[Any, None]:
        return jax.tree_util.tree_map_with_path(add, total, grad(params, *partition.keep_rows(part))), None

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, params, *rows))
    return jax.lax.scan(one, blank, jax.tree.map(cut, rows))[0]


Step = Callable[[int, State, Batch], tuple[State, Mapping[str, Any]]]
Measure = Callable[[State], Mapping[str, Any]]


def train(
    experiment: Experiment,
    stage: str,
    state: State,
    corpus: Corpus,
    steps: int,
    batch_size: int,
    order: str,
    step: Step,
    measure: Measure,
) -> None:
    """Runs a stage from its newest checkpoint to its last step.

    Args:
      experiment: the run.
      stage: its name, for checkpoints and metrics.
      state: what a first start begins with; also the template that a restart restores to.
      corpus: the texts.
      steps: of the stage.
      batch_size: texts a step.
      order: names the random order of the texts; stages with the same name see the same texts.
      step: step number (1-based), state, batch -> state, metrics.
      measure: acceptance metrics (see `curves`), `log.curve_points` times.

    Raises:
      UserError: a loss that is not finite, the newest checkpoint is then from before it; or the last step
        could not be saved.
      Stopped: the run was asked to end, and is saved.
    """
    every = experiment.settings.log
    seed = int(jax.random.randint(experiment.key(order), (), 0, 2**31 - 1))
    rows = partition.rows_here(experiment.mesh, batch_size)
    batches = texts.iterate(corpus.train, batch_size, seed, rows)
    store = checkpoints(experiment, stage)
    done, seconds = 0, 0.0
    if store.latest is not None:
        done, state, about = store.restore(abstract(state), batches)
        seconds = about["seconds"]
        log.info("%s: resumed after step %d", stage, done)
    about = {
        "target": experiment.fingerprint,
        "drafter": dataclasses.asdict(shape_of_drafter(experiment)),
        "steps": steps,
    }
    writer = Writer(experiment.workdir, stage, steps, done, seconds, every.every_steps, every.tensorboard)
    with contextlib.closing(store), writer, preemption.at_steps():
        for number in range(done + 1, steps + 1):
            began = time.monotonic()
            batch = partition.assemble(next(batches), experiment.mesh, batch_size)
            waited = time.monotonic() - began
            state, metrics = step(number, state, batch)
            metrics = dict(metrics) | {"seconds_waiting_for_data": round(waited, 4)}
            last = number == steps
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
                raise preemption.Stopped(f"{stage} is saved after step {number} of {steps}")


def drafter_of(experiment: Experiment) -> Drafter:
    """The drafter's module by the settings."""
    return Drafter(shape_of_drafter(experiment))
