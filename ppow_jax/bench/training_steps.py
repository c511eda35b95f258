"""Operations and times of the phases of training steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.stages import Wrapped

from ppow_jax.compile.operations import operations
from ppow_jax.decode import cost
from ppow_jax.drafters import windows
from ppow_jax.experiment import Experiment
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.anchors import AnchorRule, pick_anchors
from ppow_jax.objectives.base import Batch, Signal, Sizes
from ppow_jax.objectives.ppow import PPOW
from ppow_jax.objectives.rollout import Rollout, roll
from ppow_jax.objectives.verification import Verified, verify, windows_at_once
from ppow_jax.parallel import partition
from ppow_jax.settings import Settings, TrainSettings
from ppow_jax.training import loop
from ppow_jax.training.drafters import Trained
from ppow_jax.training.step import Recipe, State, gradient, make_signal, make_update

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
    recipe, state, batch = set_up(experiment, run, trained)
    objective, key = recipe.objective, jax.random.key(0)
    frozen = (state["vocab"], experiment.target_params, batch)
    learner, memory = {k: state[k] for k in ("params", "opt_state")}, state["memory"]
    inside: Phases = {}
    rounds = objective.rounds(run.batch_size)
    if isinstance(objective, PPOW):
        inside, rounds = _inside_ppow(recipe, objective, state["params"], *frozen, key)
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


def set_up(experiment: Experiment, run: TrainSettings, trained: Trained) -> tuple[Recipe, State, Batch]:
    """What a run's steps are made of, its state before the first, and a batch of `random_texts`; with uniform
    anchors."""
    objective = run.method
    if hasattr(objective, "anchor_rule"):
        objective = dataclasses.replace(objective, anchor_rule=AnchorRule())
    recipe = loop.recipe(experiment, dataclasses.replace(run, method=objective), trained.drafter, 1, _GAMMA)
    params = jax.tree.map(jnp.copy, trained.params)  # an update donates them
    sizes = Sizes(run.batch_size, experiment.settings.data.length)
    state = loop.place(experiment, recipe, params, trained.vocab, sizes)
    return recipe, state, random_texts(experiment, run.batch_size)


def parts(experiment: Experiment, run: TrainSettings, trained: Trained) -> Phases:
    """Of a supervised update: the prefix, the windows, head and losses, the optimiser.

    The times of all but the last are differences of gradients: of what the prefix gives, of the windows'
    hidden states, and of the losses, each with its forward pass. Operations of the head hold where its logits
    and the texts' distributions fit at once (`blocks.VALUES`); what is computed again counts as windows'.
    """
    recipe, state, batch = set_up(experiment, run, trained)
    frozen, objective = (state["vocab"], experiment.target_params, batch), recipe.objective
    key = jax.random.key(0)
    signal, _, _ = make_signal(recipe)(state["params"], *frozen, state["memory"], jnp.int32(1), key)

    def total(params: dict, vocab: jax.Array, target_params: dict, batch: Batch, windows_too: bool):
        models = recipe.models(target_params, params, vocab)
        outputs = outputs_of(recipe.target, target_params, batch)
        prefix = windows.text_prefix(models.drafter, models.weights, outputs.taps, batch["tokens"])
        if not windows_too:
            return sum(jnp.sum(x) for x in jax.tree.leaves(prefix))
        about = (models.drafter, models.weights, prefix.keys_values)
        reading = windows.begin(*about, windows.text_starts(prefix, batch["tokens"], signal.anchors))
        found = reading.hidden.sum()
        for step in range(objective.window - 1):
            reading = windows.advance(*about, reading, signal.tokens[:, :, 0, step])
            found += reading.hidden.sum()
        return found

    @jax.jit
    def losses(params: dict, vocab: jax.Array, target_params: dict, batch: Batch) -> dict:
        models = recipe.models(target_params, params, vocab)
        outputs = outputs_of(recipe.target, target_params, batch)
        return gradient(recipe, models, params, signal, batch, outputs)[1]

    @jax.jit
    def optimise(params: dict, opt_state: Any, grads: dict) -> tuple:
        updates, opt_state = recipe.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    of = jax.jit(jax.grad(total), static_argnums=4)
    about = (state["params"], *frozen)
    asked, prefix = _phase(of, (*about, False))
    _, whole = _phase(of, (*about, True))
    all_asked, everything = _phase(losses, about)
    B, A, _, K = signal.tokens.shape
    tokens, c = B * A * K, recipe.drafter.config
    # of the drafter three products, and the target's of what the windows read or of the whole text
    head = 2.0 * (3 * tokens + min(tokens, batch["tokens"].size)) * c.width * c.vocab_size
    return {
        "prefix": (asked, prefix),
        "windows": (all_asked - asked - head, max(whole - prefix, 1e-9)),
        "head and losses": (head, max(everything - whole, 1e-9)),
        "optimiser": _phase(optimise, (state["params"], state["opt_state"], losses(*about))),
    }


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


def _phase(function: Wrapped, arguments: tuple, rounds: int = 1) -> tuple[float, float]:
    """Operations and seconds of a jitted function; `rounds` of its loop that ends when data say so."""
    asks = operations(function.trace(*arguments).jaxpr, rounds)
    return asks, cost.median_seconds(lambda: function(*arguments), _REPEATS)


def _inside_ppow(
    recipe: Recipe,
    o: PPOW,
    params: dict,
    vocab: jax.Array,
    target_params: dict,
    batch: Batch,
    key: jax.Array,
) -> tuple[Phases, int]:
    """Rollout and verification apart, and how often the loop of verification runs."""

    @jax.jit
    def rollout(params: dict, vocab: jax.Array, target_params: dict, batch: Batch, key: jax.Array) -> Rollout:
        models = recipe.models(target_params, params, vocab)
        about = (models, batch, outputs_of(recipe.target, target_params, batch))
        picked, _ = pick_anchors(o.anchor_rule, *about, {}, jnp.int32(1), key, o.anchors, o.window)
        shape = (o.group, o.window, o.rollout_temperature)
        return roll(*about, picked.anchors, picked.real, key, *shape, o.along_text)

    @jax.jit
    def verification(
        params: dict,
        vocab: jax.Array,
        target_params: dict,
        batch: Batch,
        rolled: Rollout,
        key: jax.Array,
    ) -> Verified:
        models = recipe.models(target_params, params, vocab)
        outputs = outputs_of(recipe.target, target_params, batch)
        return verify(models, batch, outputs, rolled, key, o.temperature, o.scores_windows)

    frozen = (params, vocab, target_params, batch)
    rolled = rollout(*frozen, key)
    accepted = verification(*frozen, rolled, key).accepted
    scored = rolled.real[..., None] & ((accepted == 0) | (o.temperature > 0))
    B, A, G, K = rolled.tokens.shape
    rounds = -(-int(scored.sum((1, 2)).max()) // windows_at_once(B, A, G, K))
    return {
        "rollout": _phase(rollout, (*frozen, key)),
        "verification": _phase(verification, (*frozen, rolled, key), rounds),
    }, rounds
