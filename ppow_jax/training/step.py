"""The one training step, of all objectives.

The target's outputs on a batch -> a signal without gradient -> updates on it, as the objective asks for: the
gradient over parts of the batch (window pass, the objective's observation, its loss) and the optimiser. Two
jitted functions, `signal` and `update`; see `objectives.base`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.stages import Wrapped

from ppow_jax.drafters import known_windows, windows
from ppow_jax.drafters.eagle3 import Drafter
from ppow_jax.errors import ConfigError
from ppow_jax.models.target import Target
from ppow_jax.models.target_outputs import TargetOutputs, outputs_of
from ppow_jax.objectives.base import Batch, Memory, Metrics, Models, Objective, Signal, Stats, models_of
from ppow_jax.parallel import partition
from ppow_jax.settings import OptimizerSettings

State = dict[str, Any]  # params, opt_state, vocab, memory
Learner = dict[str, Any]  # params and opt_state: what an update changes, and may donate
Step = Callable[[int, State, Batch], tuple[State, Mapping[str, Any]]]


class Average(NamedTuple):
    """The running mean of the parameters, which an optimiser keeps beside its own state."""

    params: dict


def make_optimizer(
    settings: OptimizerSettings, steps: int, average: float = 0.0
) -> optax.GradientTransformation:
    """AdamW, linear warm-up, cosine decay, global-norm clipping; `steps` counts updates.

    With an `average` above 0 the last of its states is an `Average` with that decay an update.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=min(settings.warmup_steps, steps - 1),
        decay_steps=steps,
        end_value=settings.learning_rate * settings.final_fraction,
    )
    clip = optax.clip_by_global_norm(settings.clip_norm)
    adamw = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=settings.weight_decay)
    return optax.chain(clip, adamw, *[_averaging(average)] * (average > 0))


def _averaging(decay: float) -> optax.GradientTransformation:
    """Changes no update; its state is the `Average` of the parameters after each, from those at the start."""

    def update(updates: dict, state: Average, params: dict) -> tuple[dict, Average]:
        after = optax.apply_updates(params, updates)
        return updates, Average(optax.incremental_update(after, state.params, 1 - decay))

    return optax.GradientTransformation(lambda params: Average(jax.tree.map(jnp.copy, params)), update)


def drafter_params(state: State) -> dict:
    """The parameters that a drafter decodes with: the average where one is kept, else those being trained."""
    last = state["opt_state"][-1]
    return last.params if isinstance(last, Average) else state["params"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a step is made of but arrays.

    Attributes:
      objective: what is optimised.
      target, drafter: the modules.
      optimizer: of the drafter's parameters.
      accumulate: parts of a batch that go through one after the other.
      remat: see `known_windows.known_pass`.
      stops: token ids that end a response.
      gamma: cost of a drafter step over that of a target step.
      mesh: which the learner is laid out on by `partition.TABLE`; None: one device.
    """

    objective: Objective
    target: Target
    drafter: Drafter
    optimizer: optax.GradientTransformation
    accumulate: int = 1
    remat: str = "none"
    stops: tuple[int, ...] = ()
    gamma: float = 0.0
    mesh: Mesh | None = None

    def models(self, target_params: dict, params: dict, vocab: jax.Array) -> Models:
        """The models with their parameters."""
        about = (target_params, params, vocab, self.stops, self.gamma)
        return models_of(self.target, self.drafter, *about)


def make_step(recipe: Recipe, target_params: dict, key: jax.Array, profile: bool = False) -> Step:
    """(number, state, batch) -> (state, metrics); the number counts from 1, and the state is donated.

    With `profile` the phases wait for each other, and the metrics have the share of time that each took.
    """
    signal, update = make_signal(recipe), make_update(recipe)

    def step(number: int, state: State, batch: Batch) -> tuple[State, Mapping[str, Any]]:
        learner, vocab = {k: state[k] for k in ("params", "opt_state")}, state["vocab"]
        clock = [time.monotonic()]

        def lap(value: Any) -> Any:
            if profile:
                jax.block_until_ready(value)
                clock.append(time.monotonic())
            return value

        frozen = (vocab, target_params, batch)
        here = jax.random.fold_in(key, number)
        made, memory, metrics = lap(signal(learner["params"], *frozen, state["memory"], number, here))
        learner, more = lap(update(learner, *frozen, made))
        if profile:
            shares = np.diff(clock) / (clock[-1] - clock[0])
            more |= {"share_signal": round(shares[0], 4), "share_update": round(shares[1], 4)}
        return state | learner | {"memory": memory}, metrics | more

    return step


def make_signal(recipe: Recipe) -> Wrapped:
    """(params, vocab, target parameters, batch, memory, number, key) -> (signal, memory, metrics), jitted.

    The memory is donated.
    """

    @functools.partial(jax.jit, donate_argnums=4)
    def signal(
        params: dict,
        vocab: jax.Array,
        target_params: dict,
        batch: Batch,
        memory: Memory,
        number: jax.Array,
        key: jax.Array,
    ) -> tuple[Signal, Memory, Metrics]:
        models = recipe.models(target_params, params, vocab)
        outputs = outputs_of(recipe.target, target_params, batch)
        return recipe.objective.signal(models, batch, outputs, memory, number, key)

    return signal


def make_update(recipe: Recipe) -> Wrapped:
    """(learner, vocab, target parameters, batch, signal) -> (learner, metrics), jitted; learner donated."""
    objective, optimizer = recipe.objective, recipe.optimizer

    @functools.partial(jax.jit, donate_argnums=0)
    def update(
        learner: Learner, vocab: jax.Array, target_params: dict, batch: Batch, signal: Signal
    ) -> tuple[Learner, Metrics]:
        outputs = outputs_of(recipe.target, target_params, batch)
        models = recipe.models(target_params, learner["params"], vocab)

        def once(carry: tuple, _: None) -> tuple[tuple, Metrics]:
            params, opt_state = carry
            (loss, metrics), grads = gradient(recipe, models, params, signal, batch, outputs)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            metrics |= {"loss": loss, "grad_norm": optax.global_norm(grads)}
            return (optax.apply_updates(params, updates), opt_state), metrics

        carry = (learner["params"], learner["opt_state"])
        (params, opt_state), stacked = jax.lax.scan(once, carry, length=objective.updates)
        # Before the first update what is recomputed is as it was when the signal was made, but for rounding.
        metrics = {k: v[0] if k.endswith("_gap") else v[-1] for k, v in stacked.items()}
        return partition.hold({"params": params, "opt_state": opt_state}, recipe.mesh), metrics

    return update


def gradient(
    recipe: Recipe, models: Models, params: dict, signal: Signal, batch: Batch, outputs: TargetOutputs
) -> tuple[tuple[jax.Array, Metrics], dict]:
    """((loss, metrics), gradient) of the objective's loss on a batch, part by part."""
    objective, rows = recipe.objective, (signal, batch, outputs)

    def observed(params: dict, signal: Signal, batch: Batch, outputs: TargetOutputs) -> Stats:
        return observe(objective, models.with_params(params), signal, batch, outputs, recipe.remat)

    def summary_of(params: dict, signal: Signal, *rest: Any) -> dict[str, jax.Array]:
        return objective.summarise(observed(params, signal, *rest), signal)

    summary = None
    if recipe.accumulate > 1 and jax.eval_shape(summary_of, params, *rows):
        summary = jax.lax.stop_gradient(added(summary_of, recipe.accumulate, params, *rows))

    def loss_of(params: dict, signal: Signal, *rest: Any) -> tuple[jax.Array, Metrics]:
        stats = observed(params, signal, *rest)
        whole = jax.lax.stop_gradient(objective.summarise(stats, signal)) if summary is None else summary
        return objective.loss(stats, signal, whole)

    return added(jax.value_and_grad(loss_of, has_aux=True), recipe.accumulate, params, *rows)


def observe(
    objective: Objective,
    models: Models,
    signal: Signal,
    batch: Batch,
    outputs: TargetOutputs,
    remat: str = "none",
) -> Stats:
    """What an objective observes along the windows of a signal; leaves `[B, A, G, K]`."""
    if signal.tokens.shape[-1] != objective.window:
        raise ConfigError(
            f"{type(objective).__name__}: found a signal with windows of {signal.tokens.shape[-1]} tokens, "
            f"expected {objective.window}, its key window"
        )
    prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, batch["tokens"])
    start = windows.text_starts(prefix, batch["tokens"], signal.anchors)

    prepared = objective.prepare(models, signal, batch, outputs)

    def observed(step: int, hidden: jax.Array, logits: jax.Array, inputs: Any) -> Stats:
        return objective.observe(models, step, hidden, logits, inputs, prepared)

    def given(step: int) -> Any:
        return objective.inputs(step, signal, prepared)

    about = (models.drafter, models.weights, prefix.keys_values, start, signal.tokens)
    return known_windows.known_pass(*about, observed, given, remat)


def added(of: Callable[..., Any], parts: int, params: dict, *rows: Any) -> Any:
    """`of(params, *rows)`, whose results add up over rows, from equal parts of them, one after the other.

    Args:
      of: its results add up over parts, but for leaves named `..._gap`, of which the largest counts.
      parts: divides the rows.
      params: handed on.
      rows: trees of arrays `[B, ...]`.
    """
    if parts == 1:
        return of(params, *rows)

    def cut(x: jax.Array) -> jax.Array:
        # every parts-th row, so that a part lies on all devices as the whole does
        return jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0)

    def add(path: tuple, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a, b) if partition.path_name(path).endswith("_gap") else a + b

    def one(total: Any, part: tuple) -> tuple[Any, None]:
        return jax.tree_util.tree_map_with_path(add, total, of(params, *partition.keep_rows(part))), None

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, params, *rows))
    return jax.lax.scan(one, blank, jax.tree.map(cut, rows))[0]
