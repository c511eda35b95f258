"""configs/tiny.py: PPOW reaches the known optimum from a drafter far below it."""

import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax import experiment, run
from ppow_jax.config import from_config
from ppow_jax.data import texts
from ppow_jax.drafters import windows
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.base import models_of
from ppow_jax.objectives.rollout import roll
from ppow_jax.targets import markov
from ppow_jax.training import drafters

TINY = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"


def tiny_config():
    spec = importlib.util.spec_from_file_location("tiny_config", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def optimum(probs: np.ndarray, vocab: np.ndarray, window: int, gamma: float) -> np.ndarray:
    """Best expected reward `[V]` from every last token.

    A drafted token x is kept with probability min(P(x), Q(x)) in all, so no window survives more often than
    when Q >= P wherever the draft vocabulary reaches, and Q = P renormalised does that. So P, cut to the
    vocabulary, says how many windows survive j tokens.
    """
    cut = np.zeros_like(probs)
    cut[:, vocab] = probs[:, vocab]
    survive = [np.ones(len(probs))]
    for _ in range(window):
        survive.append(cut @ survive[-1])
    k = np.arange(1, window + 1)
    reward = np.concatenate([[0], k / (k * gamma + 1)])
    return sum((reward[j] - reward[j - 1]) * survive[j] for j in range(1, window + 1))


def test_the_optimum_by_hand():
    """Two tokens, one of them in the vocabulary, kept with probability 0.6 each time."""
    probs = np.array([[0.6, 0.4], [0.6, 0.4]])
    expected = 0.6 * 0.4 * (1 / 1.5) + 0.36 * (2 / 2)
    np.testing.assert_allclose(optimum(probs, np.array([0]), 2, 0.5), [expected] * 2, rtol=1e-12)


class Scored(NamedTuple):
    """Mean reward of a drafter over uniform anchors, and the best there is at the same anchors."""

    reward: float
    best: float


def score(built: experiment.Experiment, name: str) -> Scored:
    """Expected reward of a run's drafter, windows sampled, acceptance integrated out."""
    ppow, data = built.settings.train["ppow"].method, built.settings.data
    train, _ = texts.split(built.responses, data.length, data.holdout)
    rows = texts.Texts(built.responses, None, train[:64], data.length)
    batch = jax.tree.map(jnp.asarray, texts.stack([rows[i] for i in range(len(rows))]))
    trained = drafters.load(built, name)
    mask = np.asarray(windows.anchor_mask(batch["assistant"]))
    anchors = np.stack([np.random.default_rng(i).choice(np.flatnonzero(m), 24) for i, m in enumerate(mask)])
    real, key = jnp.ones(anchors.shape, bool), jax.random.key(5)
    shape = (ppow.group, ppow.window, ppow.rollout_temperature, ppow.along_text)
    parts = (built.target, trained.drafter, built.target_params, trained.params, trained.vocab)
    models, outputs = models_of(*parts), outputs_of(built.target, built.target_params, batch)
    found = roll(models, batch, outputs, jnp.asarray(anchors), real, key, *shape)
    probs = markov.transition(0)
    drafted, log_q = np.asarray(found.tokens), np.asarray(found.log_prob)
    first = np.take_along_axis(np.asarray(batch["tokens"]), anchors + 1, 1)
    before = np.concatenate([np.broadcast_to(first[..., None, None], (*drafted.shape[:3], 1)), drafted], -1)
    keep = np.minimum(1.0, probs[before[..., :-1], drafted] / np.exp(log_q))
    survive = np.cumprod(keep, -1)
    k, gamma = np.arange(1, ppow.window + 1), float(ppow.gamma)
    gain = np.diff(np.concatenate([[0], k / (k * gamma + 1)]))
    best = optimum(probs, np.asarray(trained.vocab), ppow.window, gamma)
    return Scored(float((survive * gain).sum(-1).mean()), float(best[first].mean()))


@pytest.mark.slow
@pytest.mark.real
def test_ppow_reaches_98_percent_of_the_known_optimum(tmp_path):
    config = tiny_config()
    config.stages, config.runs = ("respond", "train"), ("supervise", "ppow")
    chosen = from_config(config)
    run.run(chosen, tmp_path)
    built = experiment.build(chosen, tmp_path)
    before, after = score(built, "supervise"), score(built, "ppow")
    print(f"supervise {before}, ppow {after}")
    assert before.reward < 0.6 * before.best
    assert after.reward >= 0.98 * after.best
    assert after.reward <= 1.01 * after.best  # sampling error aside nothing beats the optimum
