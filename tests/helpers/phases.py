"""The phases of one PPOW step, jitted once for all tests that run them."""

import dataclasses
import functools

import jax
import numpy as np
import optax

from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.anchors import AnchorRule, pick_anchors
from ppow_jax.objectives.base import models_of
from ppow_jax.objectives.ppow import PPOW
from ppow_jax.objectives.rollout import roll
from ppow_jax.objectives.verification import verify
from ppow_jax.training.step import Recipe, gradient

KEY = jax.random.key(0)
GAMMA = 0.12
NEVER = (-1,)


def small_ppow(**changes) -> PPOW:
    """The objective with its defaults, made small."""
    default = dict(anchors=4, group=4, window=3, updates=1, anchor_rule=AnchorRule())
    return dataclasses.replace(PPOW(), **default | changes)


def squared(accepted, context):
    """A reward of one's own: k ** 2."""
    return accepted.astype(np.float32) ** 2


def batch_of(tokens: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    inside = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    assistant = inside & (np.arange(tokens.shape[1]) >= 2)
    index = np.arange(len(tokens), dtype=np.int32)
    return {"index": index, "tokens": np.where(inside, tokens, 0).astype(np.int32), "assistant": assistant}


@functools.partial(jax.jit, static_argnames=("target", "drafter", "objective", "stops"))
def _run(target, drafter, objective, stops, target_params, params, vocab, batch, key):
    models = models_of(target, drafter, target_params, params, vocab, stops, GAMMA)
    about = (models, batch, outputs_of(target, target_params, batch))
    keys = jax.random.split(key, 3)
    many = (objective.anchors, objective.window)
    picked, _ = pick_anchors(objective.anchor_rule, *about, {}, 1, keys[0], *many)
    shape = (objective.group, objective.window, objective.rollout_temperature, objective.along_text)
    rollout = roll(*about, picked.anchors, picked.real, keys[1], *shape)
    return rollout, verify(*about, rollout, keys[2], objective.temperature, objective.scores_windows)


def run(pair, drafter, params, vocab, objective, batch, key=KEY, stops=NEVER):
    """(rollout, what the target says of it) of a step."""
    return _run(pair.target, drafter, objective, stops, pair.params, params, vocab, batch, key)


def judge(objective, batch, rollout, verified):
    """(signal, metrics) of a rollout."""
    importance = np.ones(rollout.anchors.shape, np.float32)
    return objective.judge(GAMMA, batch, importance, rollout, verified)


@functools.partial(jax.jit, static_argnames=("target", "drafter", "objective"))
def differentiate(target, drafter, objective, target_params, weights, batch, signal):
    recipe = Recipe(objective, target, drafter, optax.identity())
    models = recipe.models(target_params, weights.params, weights.vocab)
    outputs = outputs_of(target, target_params, batch)
    return gradient(recipe, models, weights.params, signal, batch, outputs)


def gradient_of(pair, drafter, weights, objective, batch, signal):
    """((loss, metrics), gradient) of the update's loss."""
    return differentiate(pair.target, drafter, objective, pair.params, weights, batch, signal)


def norm(tree) -> float:
    return float(optax.global_norm(tree))
