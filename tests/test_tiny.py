"""configs/tiny.py: PPOW reaches the known optimum from a drafter far below it."""

import importlib.util
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax import experiment, rollout, settings, windows
from ppow_jax.data import texts
from ppow_jax.models import markov
from ppow_jax.stages import training

TINY = pathlib.Path(__file__).parents[1] / "configs" / "tiny.py"


def tiny_config():
    spec = importlib.util.spec_from_file_location("tiny_config", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def optimum(law: np.ndarray, vocab: np.ndarray, window: int, gamma: float) -> np.ndarray:
    """Best expected reward `[V]` from every last token.

    A drafted token x is kept with probability min(P(x), Q(x)) in all, so no window survives more often than
    when Q >= P wherever the draft vocabulary reaches, and Q = P renormalised does that. So P, cut to the
    vocabulary, says how many windows survive j tokens.
    """
    cut = np.zeros_like(law)
    cut[:, vocab] = law[:, vocab]
    survive = [np.ones(len(law))]
    for _ in range(window):
        survive.append(cut @ survive[-1])
    k = np.arange(1, window + 1)
    reward = np.concatenate([[0], k / (k * gamma + 1)])
    return sum((reward[j] - reward[j - 1]) * survive[j] for j in range(1, window + 1))


def test_the_optimum_by_hand():
    """Two tokens, one of them in the vocabulary, kept with probability 0.6 each time."""
    law = np.array([[0.6, 0.4], [0.6, 0.4]])
    expected = 0.6 * 0.4 * (1 / 1.5) + 0.36 * (2 / 2)
    np.testing.assert_allclose(optimum(law, np.array([0]), 2, 0.5), [expected] * 2, rtol=1e-12)


class Scored(NamedTuple):
    """Mean reward of a drafter over uniform anchors, and the best there is at the same anchors."""

    reward: float
    best: float


def score(run: experiment.Experiment, stage: str) -> Scored:
    """Expected reward of a stage's drafter, windows sampled, acceptance integrated out."""
    s = run.settings.ppow
    train, _ = texts.split(run.responses, run.settings.data.length, run.settings.data.holdout)
    rows = texts.Texts(run.responses, None, train[:64], run.settings.data.length)
    items = [rows[i] for i in range(len(rows))]
    batch = {key: jnp.asarray(np.stack([item[key] for item in items])) for key in items[0]}
    state, _ = training.load_drafter(run, stage)
    mask = np.asarray(windows.anchor_mask(batch["assistant"]))
    anchors = np.stack([np.random.default_rng(i).choice(np.flatnonzero(m), 24) for i, m in enumerate(mask)])
    roll = rollout.make_rollout(run.target, training.drafter_of(run), s)
    real = jnp.ones(anchors.shape, bool)
    key = jax.random.key(5)
    found = roll(state["params"], state["vocab"], run.target_params, batch, jnp.asarray(anchors), real, key)
    law = markov.transition(0)
    drafted, log_q = np.asarray(found.tokens), np.asarray(found.log_prob)
    first = np.take_along_axis(np.asarray(batch["tokens"]), anchors + 1, 1)
    before = np.concatenate([np.broadcast_to(first[..., None, None], (*drafted.shape[:3], 1)), drafted], -1)
    keep = np.minimum(1.0, law[before[..., :-1], drafted] / np.exp(log_q))
    survive = np.cumprod(keep, -1)
    k, gamma = np.arange(1, s.window + 1), float(s.gamma)
    gain = np.diff(np.concatenate([[0], k / (k * gamma + 1)]))
    best = optimum(law, np.asarray(state["vocab"]), s.window, gamma)
    return Scored(float((survive * gain).sum(-1).mean()), float(best[first].mean()))


@pytest.mark.slow
def test_ppow_reaches_98_percent_of_the_known_optimum(tmp_path):
    config = tiny_config()
    config.stages = ("respond", "supervise", "ppow")
    chosen = settings.from_config(config)
    experiment.run(chosen, tmp_path)
    run = experiment.build(chosen, tmp_path)
    before, after = score(run, "supervise"), score(run, "ppow")
    print(f"supervise {before}, ppow {after}")
    assert before.reward < 0.6 * before.best
    assert after.reward >= 0.98 * after.best
    assert after.reward <= 1.01 * after.best  # sampling error aside nothing beats the optimum
