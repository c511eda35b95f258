"""Acceptance and rewards: by hand, and the distribution of sampled acceptance over every window."""

import itertools

import numpy as np
import pytest

from ppow_jax.errors import ConfigError
from ppow_jax.objectives import rewards


def test_greedy_acceptance_is_the_leading_run_of_agreement_inside_the_text():
    drafted = np.array([[3, 4, 5], [3, 4, 9], [9, 4, 5], [3, 9, 5], [3, 4, 5], [3, 4, 5]])
    preferred = np.array([3, 4, 5])
    valid = np.ones((6, 3), bool)
    valid[4, 1:] = False
    valid[5, 0] = False
    k = rewards.accepted_greedy(drafted, preferred, valid)
    assert k.tolist() == [3, 2, 0, 1, 1, 0]
    assert k.dtype == np.int32


P = np.array([[0.6, 0.3, 0.1], [0.05, 0.15, 0.8]])  # two steps, three tokens
Q = np.array([[0.2, 0.3, 0.5], [0.5, 0.25, 0.25]])


def test_sampled_acceptance_of_every_window_has_the_distribution_of_speculative_sampling():
    """k of each window over a grid of uniforms (exact to the grid), then over all windows."""
    side = 400
    grid = (np.arange(side) + 0.5) / side
    uniform = np.stack(np.meshgrid(grid, grid, indexing="ij"), -1)
    probs = np.zeros(3)
    for window in itertools.product(range(3), repeat=2):
        p, q = P[[0, 1], window], Q[[0, 1], window]
        k = np.asarray(rewards.accepted_sampled(np.log(p), np.log(q), uniform, np.ones(2, bool)))
        share = np.bincount(k.ravel(), minlength=3) / side**2
        keep = np.minimum(1, p / q)
        want = [1 - keep[0], keep[0] * (1 - keep[1]), keep[0] * keep[1]]
        np.testing.assert_allclose(share, want, atol=2 / side)
        probs += q.prod() * share
    first, second = np.minimum(P, Q).sum(-1)  # 0.2 + 0.3 + 0.1 and 0.05 + 0.15 + 0.25
    assert (first, second) == pytest.approx((0.6, 0.45))
    want = [1 - first, first * (1 - second), first * second]
    np.testing.assert_allclose(probs, want, atol=2 / side)


def test_sampled_acceptance_stops_at_the_end_of_the_text_and_never_keeps_the_impossible():
    even = np.zeros((3, 2))
    uniform = np.array([[0.0, 0.0], [0.999, 0.999], [0.5, 0.5]], np.float32)
    valid = np.array([[True, True], [True, False], [False, True]])
    assert rewards.accepted_sampled(even, even, uniform, valid).tolist() == [2, 1, 0]
    impossible = np.full((1, 2), -np.inf)
    one = np.full((1, 2), 1e-6, np.float32)
    assert rewards.accepted_sampled(impossible, even[:1], one, valid[:1]).tolist() == [0]


def test_speedup_by_hand():
    got = rewards.speedup(np.array([0, 1, 5, 10]), rewards.RewardContext(0.12, 10))
    np.testing.assert_allclose(got, [0, 1 / 1.12, 5 / 1.6, 10 / 2.2], rtol=1e-6)
    assert rewards.speedup(np.array([7]), rewards.RewardContext(0.0, 10)).tolist() == [7.0]
    assert rewards.length(np.array([0, 3]), rewards.RewardContext(0.12, 10)).tolist() == [0.0, 3.0]


def test_a_reward_is_found_by_name_or_where_it_stands():
    assert rewards.reward_function("length") is rewards.length
    assert rewards.reward_function("ppow_jax.objectives.rewards:speedup") is rewards.speedup
    for wrong in ("speed", "ppow_jax.objectives.rewards:nothing", "no.module:x"):
        with pytest.raises(ConfigError, match="expected speedup, length, or module:function"):
            rewards.reward_function(wrong)


def test_proximity_is_for_refused_windows_within_epsilon_nats():
    accepted = np.array([0, 0, 0, 1, 0])
    preferred = np.array([-1.0, -1.0, -1.0, -1.0, -5.0])
    drafted = np.array([-2.9, -3.0, -3.1, -1.5, -1.0])  # the last is likelier than the text
    got = rewards.proximity(accepted, preferred, drafted, 2.0)
    assert got.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]
    assert got.dtype == np.float32
