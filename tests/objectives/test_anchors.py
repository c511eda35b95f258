"""Anchors: confidence by hand, scores by a loop, how often each is drawn, and what it then counts."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.objectives import anchors as anchor_rules
from ppow_jax.objectives import expected, supervised
from ppow_jax.objectives.base import models_of
from ppow_jax.objectives.expected import Expected
from ppow_jax.objectives.supervised import Supervised


def test_confidence_by_hand():
    sure, unsure = 0.0, np.log(8)
    got = anchor_rules.confidence(np.array([sure, unsure, unsure / 2]), 8)
    np.testing.assert_allclose(got, [1.0, 0.0, 0.5], atol=1e-6)


@pytest.mark.parametrize("window", [1, 3, 20])
def test_anchor_scores_are_means_over_the_anchors_of_each_window(window):
    """Windows cut by the text's end or by a gap are means over what is left of them."""
    rng = np.random.default_rng(0)
    values = rng.exponential(size=(3, 12)).astype(np.float32)
    anchors = np.array([[0] * 3 + [1] * 6 + [0] * 3, [1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 0, 0], [0] * 12])
    want = np.zeros(values.shape)
    for b, t in np.ndindex(values.shape):
        inside = [values[b, s] for s in range(t, min(t + window, 12)) if anchors[b, s]]
        if anchors[b, t]:
            want[b, t] = sum(inside) / len(inside)
    got = anchor_rules.anchor_scores(values, anchors.astype(bool), window)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert (np.asarray(got)[anchors == 0] == 0).all()


def test_anchor_scores_are_never_negative():
    got = anchor_rules.anchor_scores(np.array([[-1.0, 0.5, 2.0]]), np.ones((1, 3), bool), 2)
    np.testing.assert_allclose(got, [[0.0, 1.25, 2.0]], atol=1e-6)


def test_one_anchor_is_drawn_in_proportion_to_its_weight():
    weights = np.array([4.0, 0.0, 1.0, 2.5, 0.5, 2.0])
    rows = 20_000
    many = np.broadcast_to(weights, (rows, 6)).astype(np.float32)
    positions, real, _ = anchor_rules.sample_anchors(jax.random.key(0), many, 1)
    assert positions.dtype == np.int32
    assert real.all()
    seen = np.bincount(np.asarray(positions)[:, 0], minlength=6)
    expected = rows * weights / weights.sum()
    assert seen[1] == 0
    some = expected > 0
    assert ((seen - expected)[some] ** 2 / expected[some]).sum() < 25  # 4 degrees: p ~ 5e-5


def test_pairs_of_anchors_are_drawn_in_proportion_without_replacement():
    """P(a, then b) = w_a / W * w_b / (W - w_a), for all ordered pairs."""
    weights = np.array([3.0, 1.0, 2.0, 0.0, 4.0])
    rows = 20_000
    many = np.broadcast_to(weights, (rows, 5)).astype(np.float32)
    positions, real, _ = map(np.asarray, anchor_rules.sample_anchors(jax.random.key(1), many, 2))
    assert real.all()
    assert (positions[:, 0] != positions[:, 1]).all()
    total = weights.sum()
    chi = 0.0
    for a, b in itertools.permutations([0, 1, 2, 4], 2):
        expected = rows * weights[a] / total * weights[b] / (total - weights[a])
        chi += ((positions == [a, b]).all(1).sum() - expected) ** 2 / expected
    assert chi < 40  # 11 degrees: p ~ 4e-5


def test_rows_with_too_few_anchors_say_so():
    weights = np.array([[0.0, 2.0, 0.0, 1e-20, 0.0], [1.0] * 5, [0.0] * 5], np.float32)
    positions, real, _ = map(np.asarray, anchor_rules.sample_anchors(jax.random.key(2), weights, 4))
    assert real.tolist() == [[True, True, False, False], [True] * 4, [False] * 4]
    assert set(positions[0, :2]) == {1, 3}
    assert positions[0, 2:].tolist() == [0, 0]
    assert len(set(positions[1])) == 4
    assert positions[2].tolist() == [0] * 4


def test_rows_draw_independently():
    positions, _, _ = anchor_rules.sample_anchors(jax.random.key(3), np.ones((64, 50), np.float32), 3)
    assert len(np.unique(np.sort(positions, 1), axis=0)) > 60


@pytest.mark.parametrize("count", [2, 3])
def test_importance_makes_means_over_drawn_anchors_means_over_all(count):
    """Of values that grow with the weights: drawn anchors alone lie far above the mean of all."""
    weights = np.array([8.0, 4.0, 0.0, 2.0, 1.0, 1.0])
    values, rows = np.array([5.0, 3.0, 100.0, 1.0, 0.0, -2.0]), 40_000
    many = np.broadcast_to(weights, (rows, 6)).astype(np.float32)
    positions, real, importance = map(np.asarray, anchor_rules.sample_anchors(jax.random.key(4), many, count))
    assert real.all()
    drawn, all_of_them = values[positions], values[weights > 0].mean()
    estimates = (drawn * importance).mean(1)
    error = 5 * estimates.std() / np.sqrt(rows)
    assert abs(drawn.mean() - all_of_them) > 10 * error
    assert abs(estimates.mean() - all_of_them) < error
    assert abs(importance.mean() - 1) < 5 * importance.mean(1).std() / np.sqrt(rows)


def test_all_anchors_of_a_row_count_alike_where_none_is_left_out():
    weights = np.array([[1.0, 9.0, 0.0, 3.0]], np.float32)
    _, real, importance = anchor_rules.sample_anchors(jax.random.key(5), weights, 4)
    assert real.tolist() == [[True, True, True, False]]
    np.testing.assert_allclose(importance, [[1.0, 1.0, 1.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("corrected", [False, True])
def test_importance_is_that_of_corrected_rules_alone(corrected, monkeypatch):
    """Two of six anchors by a uniform rule: each would count 3."""
    rule = anchor_rules.AnchorRule("uniform", corrected=corrected)
    batch = {"assistant": np.ones((1, 8), bool)}
    about = (rule, None, batch, None, {}, 1, jax.random.key(0), 2, 3)
    picked, _ = anchor_rules.pick_anchors(*about)
    assert picked.real.all()
    assert (np.asarray(picked.importance) == 1).all() == (not corrected)


@pytest.mark.parametrize(("objective", "names"), [
    (Supervised(2, 3), ("valid",)), (Expected(2, 3), ("inside", "kl")),
])  # fmt: skip
def test_what_an_anchor_counts_is_in_the_weights(objective, names, monkeypatch, tiny):
    """The first anchor three times what the second counts, at every step."""
    picked = anchor_rules.Picked(jnp.array([[3, 1]]), jnp.ones((1, 2), bool), jnp.array([[3.0, 1.0]]))
    for module in (supervised, expected):
        monkeypatch.setattr(module, "pick_anchors", lambda *_: (picked, {}))
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
    batch = {"tokens": jnp.zeros((1, 9), int), "assistant": jnp.ones((1, 9), bool)}
    outputs = types.SimpleNamespace(hidden=None)
    signal, _, _ = objective.signal(models, batch, outputs, {}, 1, jax.random.key(0))
    for name in names:
        weights = np.asarray(signal.weights[name])[0, :, 0]
        np.testing.assert_allclose(weights[0], 3 * weights[1], rtol=1e-6)
        assert (weights > 0).all()
