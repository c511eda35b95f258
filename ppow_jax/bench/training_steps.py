"""Operations and times of the phases of training steps."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.compile.operations import operations
from ppow_jax.config import Settings, TrainSettings
from ppow_jax.decode import cost
from ppow_jax.experiment import Experiment
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.anchors import AnchorRule, pick_anchors
from ppow_jax.objectives.base import Batch, Signal, Sizes
from ppow_jax.objectives.ppow import PPOW
from ppow_jax.objectives.rollout import Rollout, roll
from ppow_jax.objectives.verification import Verified, verify, windows_at_once
from ppow_jax.parallel import partition
from ppow_jax.training import loop
from ppow_jax.training.drafters import Trained
from ppow_jax.training.step import Recipe, make_signal, make_update

_REPEATS = 3
_GAMMA = 0.12  # the work does not depend on it

Phases = dict[str, tuple[float, float]]  # operations of all matrix products, and seconds, by name


def kinds(settings: Settings) -> dict[str, TrainSettings]:
    """Of the runs whose steps do the same work, the first."""
    found: dict[str, TrainSettings] = {}
    for name, run in settings.chosen().items():
        work = (run.method, run.batch_size, run.accumulate)
        if all(work != (other.method, other.batch_size, other.accumulate) for other in found.values()):
            found[name] = run
    return found


def phases(experiment: Experiment, run: TrainSettings, trained: Trained) -> Phases:
    """Signal and update of a run's step, on texts of random ids; of PPOW's signal also its parts.

    Anchors are uniform: other rules score a text once in many steps, which is left out.
    """
    objective = run.method
    if hasattr(objective, "anchor_rule"):
        objective = dataclasses.replace(objective, anchor_rule=AnchorRule())
    run = dataclasses.replace(run, method=objective)
    recipe = loop.recipe(experiment, run, trained.drafter, 1, _GAMMA)
    params = jax.tree.map(jnp.copy, trained.params)  # an update donates them
    batch, key = random_texts(experiment, run.batch_size), jax.random.key(0)
    sizes = Sizes(run.batch_size, experiment.settings.data.length)
    state = loop.place(experiment, recipe, params, trained.vocab, sizes)
    frozen = (state["vocab"], experiment.target_params, batch)
    learner, memory = {k: state[k] for k in ("params", "opt_state")}, state["memory"]
    inside, rounds = {}, objective.rounds(run.batch_size)
    if isinstance(objective, PPOW):
        inside, rounds = _inside_ppow(recipe, state["params"], *frozen, key)
    signal, update = make_signal(recipe), make_update(recipe)

    def asked() -> tuple:
        return learner["params"], *frozen, memory, jnp.int32(1), key

    def make() -> Signal:
        nonlocal memory  # it is donated
        made, memory, _ = signal(*asked())
        return made

    def once() -> Any:
        nonlocal learner  # it is donated
        learner, _ = update(learner, *frozen, made)
        return learner

    asks = operations(signal.trace(*asked()).jaxpr, rounds)
    made = make()
    whole = {"signal": (asks, cost.median_seconds(make, _REPEATS))}
    asks = operations(update.trace(learner, *frozen, made).jaxpr)
    return whole | inside | {"update": (asks, cost.median_seconds(once, _REPEATS))}


def random_texts(experiment: Experiment, rows: int) -> Batch:
    """A batch of texts of random ids, all written by the target, with features if the settings keep them."""
    data, size = experiment.settings.data, experiment.settings.drafter.vocab_size
    tokens = np.random.default_rng(0).integers(size, size=(rows, data.length)).astype(np.int32)
    batch = {"index": np.arange(rows, dtype=np.int32), "tokens": tokens}
    batch = partition.shard_batch(batch | {"assistant": np.ones(tokens.shape, bool)}, experiment.mesh)
    if data.cache_features:
        about = (experiment.target, experiment.target_params, batch)
        outputs = jax.jit(outputs_of, static_argnums=0)(*about)
        batch |= {name: getattr(outputs, name).astype(data.feature_dtype) for name in ("taps", "hidden")}
    return batch


def _phase(function: Callable[..., Any], arguments: tuple, rounds: int = 1) -> tuple[float, float]:
    """Operations and seconds of a jitted function; `rounds` of its loop that ends when data say so."""
    asks = operations(function.trace(*arguments).jaxpr, rounds)
    return asks, cost.median_seconds(lambda: function(*arguments), _REPEATS)


def _inside_ppow(
    recipe: Recipe, params: dict, vocab: jax.Array, target_params: dict, batch: Batch, key: jax.Array
) -> tuple[Phases, int]:
    """Rollout and verification apart, and how often the loop of verification runs."""
    o = recipe.objective

    @jax.jit
    def rollout(params: dict, vocab: jax.Array, target_params: dict, batch: Batch, key: jax.Array) -> Rollout:
        models = recipe.models(target_params, params, vocab)
        about = (models, batch, outputs_of(recipe.target, target_params, batch))
        picked, _ = pick_anchors(o.anchor_rule, *about, {}, 1, key, o.anchors, o.window)
        shape = (o.group, o.window, o.rollout_temperature, o.along_text)
        return roll(*about, picked.anchors, picked.real, key, *shape)

    @jax.jit
    def verification(
        params: dict,
        vocab: jax.Array,
        target_params: dict,
        batch: Batch,
        windows: Rollout,
        key: jax.Array,
    ) -> Verified:
        models = recipe.models(target_params, params, vocab)
        outputs = outputs_of(recipe.target, target_params, batch)
        return verify(models, batch, outputs, windows, key, o.temperature, o.scores_windows)

    frozen = (params, vocab, target_params, batch)
    windows = rollout(*frozen, key)
    accepted = verification(*frozen, windows, key).accepted
    scored = windows.real[..., None] & ((accepted == 0) | (o.temperature > 0))
    B, A, G, K = windows.tokens.shape
    rounds = -(-int(scored.sum((1, 2)).max()) // windows_at_once(B, A, G, K))
    return {
        "rollout": _phase(rollout, (*frozen, key)),
        "verification": _phase(verification, (*frozen, windows, key), rounds),
    }, rounds
