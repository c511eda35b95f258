"""Weights of the steps of windows: by hand, and against the definitions written as loops in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.errors import ConfigError
from ppow_jax.objectives import weights
from ppow_jax.objectives.weights import Outcomes

SHAPE = (2, 3, 2, 5)  # B, A, G, K


def ref_reach(hits):
    """prod over i < j of hits[i]."""
    return np.array([float(all(hits[:j])) for j in range(len(hits))])


def ref_dpace(confidence, alpha, valid):
    """arXiv 2605.18810, eq. 7 and 8, over the valid steps alone: w_j = sum_{m >= j} prod_{i <= m} c'_i."""
    steps = np.flatnonzero(valid)
    smooth = [(1 - alpha) * confidence[i] + alpha for i in steps]
    result = np.zeros(len(confidence))
    for at, j in enumerate(steps):
        result[j] = sum(np.prod(smooth[: m + 1]) for m in range(at, len(steps)))
    return result


def over_windows(f, *arrays):
    """A reference of one window, over all windows."""
    flat = [a.reshape(-1, a.shape[-1]) for a in arrays]
    return np.array([f(*rows) for rows in zip(*flat, strict=True)]).reshape(arrays[0].shape)


def test_decay_by_hand():
    got = weights.decay(4, 0.5)
    np.testing.assert_array_equal(got, np.float32([1.0, 0.5, 0.25, 0.125]))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(weights.decay(3, 0.0), [1.0, 0.0, 0.0])


def test_reach_of_every_window_of_four_steps():
    hits = np.array(list(itertools.product([False, True], repeat=4)))
    got = weights.reach(jnp.asarray(hits))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, over_windows(ref_reach, hits))


def test_reach_by_hand_keeps_the_first_miss():
    hits = jnp.array([[True, True, False, True], [False, True, True, True], [True] * 4])
    np.testing.assert_array_equal(weights.reach(hits), [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])


def test_dpace_by_hand():
    """alpha = 1/2: c = (0, 1, 1/2) gives c' = (1/2, 1, 3/4), products (1/2, 1/2, 3/8)."""
    confidence = jnp.array([0.0, 1.0, 0.5])
    np.testing.assert_allclose(weights.dpace(confidence), [1.375, 0.875, 0.375], rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_dpace_is_the_reference(alpha):
    rng = np.random.default_rng(int(10 * alpha))
    confidence = rng.random(SHAPE).astype(np.float32)
    for valid in (np.ones(SHAPE, bool), rng.random(SHAPE) < 0.6, np.zeros(SHAPE, bool)):
        got = jax.jit(weights.dpace, static_argnums=1)(confidence, alpha, valid)
        expected = over_windows(lambda c, v: ref_dpace(c, alpha, v), np.float64(confidence), valid)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    got = weights.dpace(jnp.asarray(confidence), alpha)
    expected = over_windows(lambda c: ref_dpace(c, alpha, np.ones(5)), np.float64(confidence))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_dpace_is_the_gradient_of_the_expected_accepted_length():
    """d/d log c_j of sum_m prod_{i <= m} c_i, without smoothing."""
    rng = np.random.default_rng(1)
    log_c = np.log(rng.random(6))

    def length(log_c):
        return np.exp(np.cumsum(log_c)).sum()

    step = 1e-6
    slope = [(length(log_c + step * e) - length(log_c - step * e)) / (2 * step) for e in np.eye(6)]
    np.testing.assert_allclose(weights.dpace(jnp.float32(np.exp(log_c)), 0.0), slope, rtol=1e-4)


def test_limits_of_dpace():
    np.testing.assert_allclose(weights.dpace(jnp.zeros(4), 1.0), [4.0, 3.0, 2.0, 1.0])
    np.testing.assert_allclose(weights.dpace(jnp.ones(4), 0.5), [4.0, 3.0, 2.0, 1.0])
    np.testing.assert_array_equal(weights.dpace(jnp.zeros(4), 0.0), np.zeros(4))


def test_dpace_falls_along_the_window_and_rises_with_confidence():
    rng = np.random.default_rng(3)
    confidence = rng.random((200, 7)).astype(np.float32)
    got = weights.dpace(jnp.asarray(confidence), 0.4)
    assert (np.diff(got, axis=-1) < 0).all()
    surer = weights.dpace(jnp.asarray(confidence + 0.5 * (1 - confidence)), 0.4)
    assert (surer > got).all()


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_dpace_refuses_what_is_out_of_range(alpha):
    with pytest.raises(ValueError, match="expected"):
        weights.dpace(jnp.ones(3), alpha)


def test_no_weight_has_a_gradient():
    def of(confidence):
        outcomes = Outcomes(confidence=confidence)
        return jnp.sum(weights.product(("dpace", "decay"), 3, outcomes)) + jnp.sum(weights.reach(confidence))

    np.testing.assert_array_equal(jax.grad(of)(jnp.array([0.2, 0.5, 0.7])), np.zeros(3))


def test_products_of_weights():
    rng = np.random.default_rng(4)
    greedy, sampled, valid = (rng.random(SHAPE) < share for share in (0.7, 0.5, 0.8))
    confidence = rng.random(SHAPE).astype(np.float32)
    outcomes = Outcomes(*map(jnp.asarray, (greedy, sampled, confidence, valid)))
    reach_greedy, reach_sampled = (over_windows(ref_reach, hits) for hits in (greedy, sampled))
    pace = over_windows(lambda c, v: ref_dpace(c, 0.3, v), np.float64(confidence), valid)
    falling = 0.9 ** np.arange(5.0)

    def product(text):
        names = weights.parse_weights(text, "supervise.weights")
        got = weights.product(names, 5, outcomes, rate=0.9, alpha=0.3)
        assert got.dtype == jnp.float32
        return got

    np.testing.assert_allclose(product("decay*reach"), falling * reach_greedy, rtol=1e-5)
    np.testing.assert_allclose(product("reach_sampled"), reach_sampled)
    np.testing.assert_allclose(product("dpace*reach"), pace * reach_greedy, rtol=1e-5)
    np.testing.assert_allclose(product("reach*decay*reach_sampled"), falling * reach_greedy * reach_sampled)
    np.testing.assert_allclose(product("uniform"), np.ones(5))
    np.testing.assert_allclose(product("decay*uniform"), falling, rtol=1e-6)
    assert (reach_greedy != reach_sampled).any()


def test_decay_alone_is_the_array_of_earlier_runs():
    """Its bits are those of the expression that runs recorded before this module used."""
    for rate in (0.8, 0.9, 1.0):
        np.testing.assert_array_equal(weights.product(("decay",), 10, rate=rate), rate ** jnp.arange(10))


def test_product_names_the_outcomes_that_it_needs():
    assert weights.needed_outcomes(("decay", "uniform")) == frozenset()
    names = ("reach", "dpace", "reach_sampled", "decay")
    assert weights.needed_outcomes(names) == {"greedy_hits", "sampled_hits", "confidence"}
    with pytest.raises(ValueError, match="found no greedy_hits, expected it for decay\\*reach"):
        weights.product(("decay", "reach"), 5)
    with pytest.raises(ValueError, match="found no confidence"):
        weights.product(("dpace", "reach"), 2, Outcomes(greedy_hits=jnp.ones(2, bool)))
    with pytest.raises(ValueError, match="no names"):
        weights.product((), 5)


def test_parse_weights():
    assert weights.parse_weights("decay * reach", "supervise.weights") == ("decay", "reach")
    for name in weights.WEIGHTS:
        assert weights.parse_weights(name, "key") == (name,)


@pytest.mark.parametrize(
    ("text", "found"), [("reech", "reech"), ("", ""), ("decay*", ""), ("0.5*decay", "0.5")]
)
def test_parse_weights_says_what_is_wrong_in_one_line(text, found):
    with pytest.raises(ConfigError) as caught:
        weights.parse_weights(text, "config.weights")
    message = str(caught.value)
    expected = f"expected one of {', '.join(weights.WEIGHTS)}"
    assert message == f"config.weights: found the weight {found!r} in {text!r}, {expected}"
