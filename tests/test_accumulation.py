"""A batch in parts, and activations computed again: the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from phases import batch_of, run

from ppow_jax.stages import ppow, supervise, training

pytestmark = pytest.mark.usefixtures("quick_compilation")
T = 24
LENGTHS = [24, 7, 15, 24]  # so that parts count differently


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(4)
    return batch_of(rng.integers(small.TINY.vocab_size, size=(4, T)).astype(np.int32), LENGTHS)


def close(one, other, atol=1e-5):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def learner_of(tiny, optimizer):
    params = jax.tree.map(jnp.copy, tiny.weights.params)  # the step donates them
    return {"params": params, "opt_state": optimizer.init(params)}


def test_a_supervised_step(tiny, batch):
    optimizer = optax.sgd(0.1)  # what it changes is the gradient

    def step(*how):
        update = supervise.make_update(tiny.target, tiny.drafter, optimizer, 6, 3, 0.8, None, *how)
        inputs = (tiny.weights.vocab, tiny.params, batch, jax.random.key(3))
        return update(learner_of(tiny, optimizer), *inputs)

    whole, parts = step(1, "none"), step(2, "dots")
    assert 0 < whole[1]["grad_norm"] < 1e3
    close(whole, parts)


def test_a_ppow_step(tiny, batch):
    optimizer = optax.sgd(0.1)
    settings = small.ppow_settings(anchors=4, group=4, window=3, proximity_weight=0.5, proximity_epsilon=4.0)
    of = (tiny, tiny.drafter, tiny.weights.params, tiny.weights.vocab)
    rollout, verdict = run(*of, settings, batch)
    rollout = rollout._replace(log_prob=rollout.log_prob.at[3, 1, 0, 0].add(0.25))  # a gap in one part

    def step(accumulate, remat):
        changed = dataclasses.replace(settings, accumulate=accumulate)
        update = ppow.make_update(tiny.target, tiny.drafter, optimizer, changed, None, remat)
        inputs = (tiny.weights.vocab, tiny.params, batch, rollout, verdict)
        return update(learner_of(tiny, optimizer), *inputs)

    whole, parts = step(1, "none"), step(4, "all")
    assert float(whole[1]["log_prob_gap"]) == pytest.approx(0.25, abs=1e-3)
    close(whole, parts)


def test_parts_take_every_so_manieth_row():
    """So that each lies on all devices that the batch lies on."""
    seen = []

    def loss(w, x_B):
        seen.append(x_B.shape)
        return jnp.sum(w * x_B**2), {"sum": x_B.sum(), "firsts": x_B[0], "a_gap": x_B.max()}

    x = jnp.arange(6.0)
    (value, metrics), grad = training.gradient(loss, jnp.float32(2), 3, x)
    assert set(seen) == {(6,), (2,)}  # the whole: for the shapes of the sums
    assert (float(value), float(grad)) == (110, 55)
    assert (float(metrics["sum"]), float(metrics["a_gap"])) == (15, 5)
    assert float(metrics["firsts"]) == 0 + 1 + 2


def test_a_step_counts_the_anchors_whose_token_is_the_targets_own():
    """At step 1, token t + 3 of anchors 1, 2, 3, and of padding; of six, the first ones are not written."""
    batch = {"tokens": np.zeros((2, 6), np.int32), "assistant": np.arange(6) >= np.array([[2], [5]])}
    anchors, real = np.tile([1, 2, 3, 0], (2, 1)), np.tile([True, True, True, False], (2, 1))
    valid = supervise._valid(batch, anchors, real, 1)
    assert valid.tolist() == [[True, True, False, False], [False, True, False, False]]
