"""The run's own jitted steps, asked for with shapes in place of arrays.

Shape letters: B rows, T tokens of a text, P of a prompt, S cache slots, N draft vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ppow_jax.config import from_config, to_dict
from ppow_jax.decode import batch, loop, shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.sampling import Sampling
from ppow_jax.drafters import eagle3
from ppow_jax.drafters.eagle3 import Drafter, weights_of
from ppow_jax.models.target import Target, TargetConfig
from ppow_jax.models.target import abstract_params as target_shapes
from ppow_jax.objectives.base import Objective, Signal, Sizes
from ppow_jax.parallel import partition
from ppow_jax.settings import Settings
from ppow_jax.training import drafters
from ppow_jax.training.loop import memory_layout
from ppow_jax.training.step import Recipe, make_optimizer, make_signal, make_update

_TEXTS = 2**16  # that an objective's memory is sized by, as ADAW's table
_STOPS = (0,)
_GAMMA = 0.12  # where it would be measured


@dataclasses.dataclass(frozen=True)
class Step:
    """A step to compile.

    Attributes:
      name: of the step.
      traced: the jitted function with its arguments' shapes.
      counted: what it deals with, "windows" or "tokens", and how many of them.
      held: arguments by what they are.
      rounds: of its loop, if data say when that ends; at most.
    """

    name: str
    traced: Any
    counted: tuple[str, int]
    held: dict[str, Any]
    rounds: int = 1


Steps = Generator[Step, Any, None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that the steps are made of: settings, models, and shapes of what they hold on the mesh.

    Attributes:
      settings: of the run.
      mesh: of the slice.
      target, drafter: the modules.
      params: the target's parameters.
      drafter_params: the drafter's.
      vocab: int32 `[N]`, target ids of the draft ids.
    """

    settings: Settings
    mesh: Mesh
    target: Target
    drafter: Drafter
    params: dict
    drafter_params: dict
    vocab: Any

    def whole(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array that every device holds."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=partition.replicated(self.mesh))

    def rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An array `[B, ...]` that is split by rows."""
        layout = partition.batch_sharding(self.mesh, shape[0])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=layout)

    def batch(self, B: int) -> dict[str, jax.ShapeDtypeStruct]:
        """See `data.texts.Texts`."""
        data, c = self.settings.data, self.target.config
        arrays = {
            "index": self.rows((B,), np.int32),
            "tokens": self.rows((B, data.length), np.int32),
            "assistant": self.rows((B, data.length), bool),
        }
        if data.cache_features:
            arrays["taps"] = self.rows((B, data.length, len(c.taps) * c.width), data.feature_dtype)
            arrays["hidden"] = self.rows((B, data.length, c.width), data.feature_dtype)
        return arrays

    def opt_state(self, optimizer: optax.GradientTransformation) -> Any:
        """Of the drafter's parameters."""
        state = jax.eval_shape(optimizer.init, self.drafter_params)
        return partition.laid_out(state, self.mesh)

    def memory(self, objective: Objective) -> dict[str, Any]:
        """What an objective keeps from step to step, laid out as in `training.loop.place`."""
        sizes = Sizes(_TEXTS, self.settings.data.length)
        shapes = jax.eval_shape(lambda params: objective.init(sizes, params), self.drafter_params)
        return jax.tree.map(
            lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout),
            shapes,
            memory_layout(shapes, self.mesh),
        )

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """A random key."""
        return self.whole((), jax.eval_shape(lambda: jax.random.key(0)).dtype)

    def keys(self, B: int) -> jax.ShapeDtypeStruct:
        """A random key a row."""
        layout = partition.batch_sharding(self.mesh, B)
        return jax.ShapeDtypeStruct((B,), self.key.dtype, sharding=layout)


def plan(settings: Settings, shape: TargetConfig, mesh: Mesh) -> Plan:
    """What a run of these settings would hold on the mesh, with a drafter that `config.drafter` describes."""
    drafter = eagle3.drafter_of(drafters.shape_by(settings.drafter, shape))
    params = partition.laid_out(target_shapes(shape), mesh)
    drafter_params = partition.laid_out(eagle3.abstract_params(drafter.config), mesh)
    vocab = jax.ShapeDtypeStruct((drafter.config.vocab_size,), np.int32, sharding=partition.replicated(mesh))
    return Plan(settings, mesh, Target(shape), drafter, params, drafter_params, vocab)


def _respond(plan: Plan) -> Steps:
    """Reading the prompts of a batch, then tokens of every row with the cache at its longest."""
    s, B = plan.settings.respond, plan.settings.respond.batch_size
    P = max(8, plan.settings.data.length - s.max_new_tokens)
    config = DecodeConfig(s.max_new_tokens, _STOPS, Sampling(s.temperature))
    dtype = plan.settings.data.feature_dtype if plan.settings.data.cache_features else ""
    model = {"target": plan.target, "params": plan.params, "config": config, "dtype": dtype}
    model |= {"drafting": None, "weights": None}
    prompts = {"prompt_BxP": plan.rows((B, P), np.int32), "length_B": plan.rows((B,), np.int32)}
    prompts["keys_B"] = plan.keys(B)
    held = {"target": plan.params}
    traced = batch._prefill.trace(**prompts, **model, mesh=plan.mesh)
    state, _ = yield Step("respond: prompts", traced, ("tokens", B * P), held | {"batch": prompts})
    state = _with_slots(state, P + s.max_new_tokens)
    traced = batch._stretch.trace(state=state, by_column=False, **model)
    rounds = batch.ROUNDS
    yield Step("respond: tokens", traced, ("tokens", B * rounds), held | {"cache": state}, rounds)


def _with_slots(state: Any, slots: int) -> Any:
    """The state's shape with longer caches, laid out as before."""
    longer = jax.eval_shape(lambda s: loop.grow(s, slots), state)
    return jax.tree.map(
        lambda new, old: jax.ShapeDtypeStruct(new.shape, new.dtype, sharding=old.sharding), longer, state
    )


def _train(plan: Plan, name: str) -> Steps:
    """The halves of a training run's step, `training.step.make_signal` and `make_update`."""
    run = plan.settings.train[name]
    objective, B = run.method, run.batch_size
    optimizer = make_optimizer(run.optimizer, max(1, run.steps) * objective.updates)
    models, remat = (plan.target, plan.drafter), plan.settings.drafter.remat
    recipe = Recipe(objective, *models, optimizer, run.accumulate, remat, _STOPS, _GAMMA, plan.mesh)
    learner = {"params": plan.drafter_params, "opt_state": plan.opt_state(optimizer)}
    memory, texts = plan.memory(objective), plan.batch(B)
    held = {"target": plan.params, "learner": learner, "batch": texts}
    held |= {"memory": memory} if memory else {}
    frozen, number = (plan.vocab, plan.params, texts), jax.ShapeDtypeStruct((), np.int32)
    traced = make_signal(recipe).trace(learner["params"], *frozen, memory, number, plan.key)
    many = ("windows", windows_of(traced.out_info[0]))
    signal, _, _ = yield Step(f"{name}: signal", traced, many, held, objective.rounds(B))
    traced = make_update(recipe).trace(learner, *frozen, signal)
    yield Step(f"{name}: update", traced, many, held | {"signal": signal})


def windows_of(signal: Signal) -> int:
    """B A G: how many windows a signal counts. Those of a group may share what they read on."""
    return max(math.prod(x.shape[:3]) for x in (signal.tokens, *signal.weights.values()))


def _decode(plan: Plan) -> Steps:
    """A round of the decoding loop, with its prefill; a row for each part of the batch's axes."""
    e, B = plan.settings.evaluate, partition.batch_ways(plan.mesh)
    shape = plan.settings.decode.shape.replace("auto", "chain:3")
    drafting = Eagle(plan.drafter, shapes.parse(shape, "config.decode.shape"))
    P = max(8, plan.settings.data.length - e.max_new_tokens)
    weights = weights_of(plan.drafter_params, plan.params, plan.vocab)
    prompts = (plan.rows((B, P), np.int32), plan.rows((B,), np.int32), plan.keys(B))
    config = DecodeConfig(e.max_new_tokens, _STOPS)
    traced = loop._decode.trace(plan.target, plan.params, *prompts, config, drafting, weights, None, False)
    held = {"target": plan.params, "drafter": plan.drafter_params, "batch": prompts}
    yield Step("decode: prompt and a round", traced, ("tokens", B * (P + drafting.tokens)), held)


def groups(settings: Settings) -> list[tuple[str, Callable[[Plan], Steps]]]:
    """Steps by the stage or the training run that they belong to, in the order of a run.

    The shapes of a step's results are sent back to its group, for the next step.
    """
    runs = [(name, functools.partial(_train, name=name)) for name in settings.chosen()]
    return [("respond", _respond), *runs, ("decode", _decode)]


def with_rows(settings: Settings, rows: int) -> Settings:
    """The settings with batches of so many rows, of `respond` and of every training run.

    Raises:
      ConfigError: a run's `accumulate` does not divide them.
    """
    values = to_dict(settings)
    for section in (values["respond"], *values["train"].values()):
        section["batch_size"] = rows
    return from_config(values)
