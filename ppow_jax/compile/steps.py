"""The stages' own jitted steps, asked for with shapes in place of arrays.

Shape letters: B rows, T tokens of a text, P of a prompt, S cache slots, N draft vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ppow_jax import partition
from ppow_jax.decode import batch, loop, shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.sampling import Sampling
from ppow_jax.models import drafter as drafters
from ppow_jax.models.drafter import Drafter, weights_of
from ppow_jax.models.target import Target, TargetConfig
from ppow_jax.models.target import abstract_params as target_shapes
from ppow_jax.rollout import make_rollout
from ppow_jax.settings import Settings
from ppow_jax.stages import ppow, supervise, training
from ppow_jax.verification import make_verify, windows_at_once

_TEXTS = 2**16  # of ADAW's table
_STOPS = (0,)


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
    """All that the steps are made of: settings, models, and shapes of what they hold on the mesh."""

    settings: Settings
    mesh: Mesh
    target: Target
    drafter: Drafter
    params: dict
    learner: dict
    vocab: jax.ShapeDtypeStruct

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

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """A random key."""
        return self.whole((), jax.eval_shape(lambda: jax.random.key(0)).dtype)

    def keys(self, B: int) -> jax.ShapeDtypeStruct:
        """A random key a row."""
        layout = partition.batch_sharding(self.mesh, B)
        return jax.ShapeDtypeStruct((B,), self.key.dtype, sharding=layout)


def plan(settings: Settings, shape: TargetConfig, mesh: Mesh) -> Plan:
    """What a run of these settings on the mesh would hold."""
    drafter = Drafter(training.shape_by(settings.drafter, shape))
    params = drafters.abstract_params(drafter.config)
    optimizer = training.make_optimizer(settings.supervise.optimizer, settings.supervise.steps)
    learner = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    place = functools.partial(partition.laid_out, mesh=mesh)
    vocab = jax.ShapeDtypeStruct((drafter.config.vocab_size,), np.int32, sharding=partition.replicated(mesh))
    return Plan(settings, mesh, Target(shape), drafter, place(target_shapes(shape)), place(learner), vocab)


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


def _supervise(plan: Plan) -> Steps:
    s = plan.settings.supervise
    optimizer = training.make_optimizer(s.optimizer, s.steps)
    shape = (s.anchors, s.window, s.decay, plan.mesh, s.accumulate, plan.settings.drafter.remat)
    step = supervise.make_update(plan.target, plan.drafter, optimizer, *shape)
    texts = plan.batch(s.batch_size)
    traced = step.trace(plan.learner, plan.vocab, plan.params, texts, plan.key)
    held = {"target": plan.params, "learner": plan.learner, "batch": texts}
    yield Step("supervise", traced, ("windows", s.batch_size * s.anchors), held)


def _ppow(plan: Plan) -> Steps:
    s = plan.settings.ppow
    texts, many = plan.batch(s.batch_size), ("windows", s.batch_size * s.anchors * s.group)
    table = {
        "scores": plan.whole((_TEXTS, plan.settings.data.length), np.float32),
        "scored_at": plan.whole((_TEXTS,), np.int32),
    }
    held = {"target": plan.params, "learner": plan.learner, "adaw": table, "batch": texts}
    state = plan.learner | {"vocab": plan.vocab} | table
    pick = ppow.make_pick(plan.target, plan.drafter, s).trace(
        state, plan.params, texts, jax.ShapeDtypeStruct((), np.int32), plan.key
    )
    _, anchors, real = yield Step("ppow: anchors", pick, many, held)
    roll = make_rollout(plan.target, plan.drafter, s).trace(
        plan.learner["params"], plan.vocab, plan.params, texts, anchors, real, plan.key
    )
    rollout = yield Step("ppow: rollout", roll, many, held)
    verify = make_verify(plan.target, s, 0.12, _STOPS).trace(plan.params, texts, rollout, plan.key)
    rounds = s.anchors * s.group // windows_at_once(s.batch_size, s.anchors, s.group, s.window)
    verdict = yield Step("ppow: verification", verify, many, held | {"rollout": rollout}, rounds)
    optimizer = training.make_optimizer(s.optimizer, s.steps * s.updates)
    remat = plan.settings.drafter.remat
    update = ppow.make_update(plan.target, plan.drafter, optimizer, s, plan.mesh, remat).trace(
        plan.learner, plan.vocab, plan.params, texts, rollout, verdict
    )
    yield Step("ppow: update", update, many, held | {"rollout": (rollout, verdict)})


def _decode(plan: Plan) -> Steps:
    """A round of the decoding loop, with its prefill; a row for each part of the batch's axes."""
    e, B = plan.settings.evaluate, partition.batch_ways(plan.mesh)
    shape = plan.settings.decode.shape.replace("auto", "chain:3")
    drafting = Eagle(plan.drafter, shapes.parse(shape, "config.decode.shape"))
    P = max(8, plan.settings.data.length - e.max_new_tokens)
    weights = weights_of(plan.learner["params"], plan.params, plan.vocab)
    prompts = (plan.rows((B, P), np.int32), plan.rows((B,), np.int32), plan.keys(B))
    config = DecodeConfig(e.max_new_tokens, _STOPS)
    traced = loop._decode.trace(plan.target, plan.params, *prompts, config, drafting, weights, None)
    held = {"target": plan.params, "drafter": plan.learner["params"], "batch": prompts}
    yield Step("decode: prompt and a round", traced, ("tokens", B * (P + drafting.tokens)), held)


# By stage; the shapes of a step's results are sent back to its group, for the next one.
GROUPS: dict[str, Callable[[Plan], Steps]] = {
    "respond": _respond,
    "supervise": _supervise,
    "ppow": _ppow,
    "decode": _decode,
}
