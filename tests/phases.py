"""The phases of one PPOW step, jitted once for all tests that run them."""

import functools

import jax
import numpy as np
import optax

from ppow_jax import teacher, verification
from ppow_jax.models.target import draft_head
from ppow_jax.rollout import make_rollout
from ppow_jax.stages import ppow

KEY = jax.random.key(0)
GAMMA = 0.12
NEVER = (-1,)


def batch_of(tokens: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    inside = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    assistant = inside & (np.arange(tokens.shape[1]) >= 2)
    index = np.arange(len(tokens), dtype=np.int32)
    return {"index": index, "tokens": np.where(inside, tokens, 0).astype(np.int32), "assistant": assistant}


@functools.cache
def phases(target, drafter, settings, stops=NEVER):
    """The jitted pick, roll and verify."""
    return (
        ppow.make_pick(target, drafter, settings),
        make_rollout(target, drafter, settings),
        verification.make_verify(target, settings, GAMMA, stops),
    )


def run(pair, drafter, params, vocab, settings, batch, key=KEY, stops=NEVER):
    """(rollout, verdict) of a step."""
    pick, roll, verify = phases(pair.target, drafter, settings, stops)
    keys = jax.random.split(key, 3)
    _, *picked = pick({"params": params, "vocab": vocab}, pair.params, batch, 1, keys[0])
    rollout = roll(params, vocab, pair.params, batch, *picked, keys[1])
    return rollout, verify(pair.params, batch, rollout, keys[2])


@functools.partial(jax.jit, static_argnames=("target", "drafter", "settings"))
def differentiate(target, drafter, settings, target_params, weights, batch, rollout, verdict):
    lesson = teacher.lesson_of(target, target_params, batch)
    head = draft_head(target.config, target_params, weights.vocab)
    counts = tuple(mask.sum() for mask in ppow.credit(settings, verdict))
    args = (drafter, settings, target_params, weights.vocab, head, counts, "none")
    loss = functools.partial(ppow.ppow_loss, *args)
    return jax.value_and_grad(loss, has_aux=True)(weights.params, lesson, batch, rollout, verdict)


def gradient(pair, drafter, weights, settings, batch, rollout, verdict):
    """((loss, metrics), gradient) of the update's objective."""
    return differentiate(pair.target, drafter, settings, pair.params, weights, batch, rollout, verdict)


def norm(tree) -> float:
    return float(optax.global_norm(tree))
