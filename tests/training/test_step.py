"""A batch in parts, and activations computed again: the same step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from phases import batch_of, judge, run, small_ppow

from ppow_jax.errors import ConfigError
from ppow_jax.objectives.base import written
from ppow_jax.objectives.expected import Expected
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.training.step import Recipe, added, make_step, make_update

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

    def step(losses, *how):
        objective = Supervised(6, 3, losses=losses)
        recipe = Recipe(objective, tiny.target, tiny.drafter, optimizer, *how)
        state = learner_of(tiny, optimizer) | {"vocab": tiny.weights.vocab, "memory": {}}
        return make_step(recipe, tiny.params, jax.random.key(3))(1, state, batch)

    for losses in ("cross_entropy", "lk_batch"):  # the second asks for a mean over the whole batch
        whole, parts = step(losses, 1, "none"), step(losses, 2, "dots")
        assert 0 < whole[1]["grad_norm"] < 1e3
        close(whole, parts)


@dataclasses.dataclass(frozen=True)
class Longer(Supervised):
    """Gives a token more than it says."""

    def signal(self, models, batch, *rest):
        signal, memory, metrics = super().signal(models, batch, *rest)
        more = jnp.concatenate([signal.tokens, signal.tokens[..., :1]], -1)
        return signal._replace(tokens=more), memory, metrics


def test_windows_of_another_length_than_the_objective_says_are_refused(tiny, batch):
    recipe = Recipe(Longer(6, 3), tiny.target, tiny.drafter, optax.sgd(0.1))
    state = learner_of(tiny, recipe.optimizer) | {"vocab": tiny.weights.vocab, "memory": {}}
    with pytest.raises(ConfigError, match="Longer: found a signal with windows of 4 tokens, expected 3"):
        make_step(recipe, tiny.params, jax.random.key(3))(1, state, batch)


def test_a_step_of_expected_reward_by_reached_positions(tiny, batch):
    optimizer = optax.sgd(0.1)

    def step(accumulate):
        objective = Expected(6, 3, kl_positions="reached")
        recipe = Recipe(objective, tiny.target, tiny.drafter, optimizer, accumulate, gamma=0.12)
        state = learner_of(tiny, optimizer) | {"vocab": tiny.weights.vocab, "memory": {}}
        return make_step(recipe, tiny.params, jax.random.key(3))(1, state, batch)

    whole, parts = step(1), step(4)
    assert 0 < whole[1]["grad_norm"] < 1e3 and whole[1]["reward"] > 1e-4
    close(whole, parts)


def test_a_ppow_step(tiny, batch):
    optimizer = optax.sgd(0.1)
    objective = small_ppow(proximity_weight=0.5, proximity_epsilon=4.0)
    rollout, verified = run(tiny, tiny.drafter, tiny.weights.params, tiny.weights.vocab, objective, batch)
    rollout = rollout._replace(log_prob=rollout.log_prob.at[3, 1, 0, 0].add(0.25))  # a gap in one part
    signal, _ = judge(objective, batch, rollout, verified)

    def step(accumulate, remat):
        recipe = Recipe(objective, tiny.target, tiny.drafter, optimizer, accumulate, remat)
        return make_update(recipe)(
            learner_of(tiny, optimizer), tiny.weights.vocab, tiny.params, batch, signal
        )

    whole, parts = step(1, "none"), step(4, "all")
    assert float(whole[1]["log_prob_gap"]) == pytest.approx(0.25, abs=1e-3)
    close(whole, parts)


def test_parts_take_every_so_manieth_row():
    """So that each lies on all devices that the batch lies on."""
    shapes = []

    def loss(w, x_B):
        shapes.append(x_B.shape)
        return jnp.sum(w * x_B**2), {"sum": x_B.sum(), "firsts": x_B[0], "a_gap": x_B.max()}

    x = jnp.arange(6.0)
    (value, metrics), grad = added(jax.value_and_grad(loss, has_aux=True), 3, jnp.float32(2), x)
    assert set(shapes) == {(6,), (2,)}  # the whole: for the shapes of the sums
    assert (float(value), float(grad)) == (110, 55)
    assert (float(metrics["sum"]), float(metrics["a_gap"])) == (15, 5)
    assert float(metrics["firsts"]) == 0 + 1 + 2


def test_a_step_counts_the_anchors_whose_token_is_the_targets_own():
    """At step 1, token t + 3 of anchors 1, 2, 3, and of padding; of six, the first ones are not written."""
    batch = {"tokens": np.zeros((2, 6), np.int32), "assistant": np.arange(6) >= np.array([[2], [5]])}
    anchors, real = np.tile([1, 2, 3, 0], (2, 1)), np.tile([True, True, True, False], (2, 1))
    valid = np.asarray(written(batch, anchors, real, 2))[:, :, 0, 1]
    assert valid.tolist() == [[True, True, False, False], [False, True, False, False]]
