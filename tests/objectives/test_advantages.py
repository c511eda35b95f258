"""Group-relative advantages by hand."""

import numpy as np
import pytest

from ppow_jax.objectives import advantages


def test_hand_numbers():
    got = advantages.standardised(np.array([[1.0, 3.0, 5.0, 7.0], [0.0, 0.0, 0.0, 2.0]]))
    want = [
        np.array([-3, -1, 1, 3]) / np.sqrt(5),
        np.array([-0.5, -0.5, -0.5, 1.5]) / np.sqrt(0.75),
    ]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, 10 / 2.2])
@pytest.mark.parametrize("group", [2, 7, 8])
def test_a_group_without_spread_gets_exactly_zero(value, group):
    rewards = np.full((3, group), value, np.float32)
    assert not advantages.standardised(rewards).any()
    assert advantages.without_spread(rewards).tolist() == [True] * 3


def test_centred_rewards_by_hand():
    got = advantages.centred(np.array([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]]))
    np.testing.assert_allclose(got, [[-3, -1, 1, 3], [0, 0, 0, 0]])


def test_groups_are_judged_by_themselves_and_not_by_scale_or_level():
    rewards = np.array([[[0.0, 1.0], [5.0, 5.0]], [[100.0, 300.0], [-2.0, -3.0]]])
    got = advantages.standardised(rewards)
    np.testing.assert_allclose(got, [[[-1, 1], [0, 0]], [[-1, 1], [1, -1]]], atol=1e-5)
    assert advantages.without_spread(rewards).tolist() == [[False, True], [False, False]]
