"""The supervised objective in NumPy, window by window: losses, weights, and what the target is taken as."""

import jax
import numpy as np
import pytest
import reference
import small
from phases import KEY, batch_of, differentiate

from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.base import models_of
from ppow_jax.objectives.supervised import Supervised

T, K = 14, 3
LENGTHS = [T, 9]  # of the second text only a few windows are whole


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    """Text that the drafter can propose, but for some tokens."""
    rng = np.random.default_rng(8)
    tokens = small.DRAFT_VOCAB[rng.integers(len(small.DRAFT_VOCAB), size=(2, T))]
    tokens[0, 7] = np.setdiff1d(np.arange(small.TINY.vocab_size), small.DRAFT_VOCAB)[0]
    return batch_of(tokens, LENGTHS)


@pytest.fixture(scope="module")
def signal_and_value(tiny, batch):
    """(signal, (loss, metrics)) of an objective."""

    def of(objective):
        @jax.jit
        def signal(params, vocab, target_params, batch):
            models = models_of(tiny.target, tiny.drafter, target_params, params, vocab)
            outputs = outputs_of(tiny.target, target_params, batch)
            return objective.signal(models, batch, outputs, {}, 1, KEY)[0]

        found = signal(tiny.weights.params, tiny.weights.vocab, tiny.params, batch)
        args = (tiny.target, tiny.drafter, objective, tiny.params, tiny.weights, batch, found)
        return found, differentiate(*args)[0]

    return of


@pytest.fixture(scope="module")
def everything(tiny, batch) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """By text and anchor: the drafter's logits `[K, N]`, and the target's `[K, V]`, along the text."""
    found = {}
    for b in range(2):
        tokens = batch["tokens"][b].tolist()
        target, inputs = reference.target_text(tiny.params, small.TINY, tokens)
        taps = np.concatenate([inputs[i] for i in small.TINY.taps], -1)
        about = (tiny.weights.params, tiny.drafter.config, tiny.weights.embedding, taps, tokens)
        for t in range(T - 2):
            ahead = tokens[t + 2 :] + [0] * K
            logits = reference.drafter_window(*about, t, K, lambda j, _, ahead=ahead: ahead[j])
            found[b, t] = logits, target[np.minimum(t + 1 + np.arange(K), T - 1)]
    return found


def softmax(logits):
    return np.exp(reference.log_softmax(logits))


def expected(signal, batch, everything, loss_of, weight_of, importance=1.0) -> float:
    """Sum over the steps of the mean over valid anchors of weight x loss."""
    sums, counts = np.zeros(K), np.zeros(K)
    real = np.asarray(signal.weights["valid"])[:, :, 0] > 0
    for b, a in np.ndindex(signal.anchors.shape):
        t = int(signal.anchors[b, a])
        if not real[b, a].any():
            continue
        logits, target = everything[b, t]
        tokens = batch["tokens"][b, np.minimum(t + 2 + np.arange(K), T - 1)]
        valid = real[b, a]
        weights = weight_of(logits, tokens, valid, np.asarray(signal.extra.uniform)[b, a, 0])
        for j in np.flatnonzero(valid):
            sums[j] += weights[j] * loss_of(target[j], logits[j], j)
            counts[j] += 1
    return float((sums / np.maximum(counts, 1)).sum())


def decay(logits, tokens, valid, uniform):
    return 0.8 ** np.arange(K)


def cross_entropy_at(temperature):
    def loss(target, logits, j):
        p = softmax(target[small.DRAFT_VOCAB] / temperature)
        return -(p * reference.log_softmax(logits)).sum()

    return loss


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_cross_entropy_with_decay(signal_and_value, batch, everything, temperature):
    """The default; T is restricted to the draft vocabulary and renormalised, at a temperature."""
    signal, (loss, metrics) = signal_and_value(Supervised(12, K, target_temperature=temperature))
    want = expected(signal, batch, everything, cross_entropy_at(temperature), decay)
    assert float(loss) == pytest.approx(want, rel=1e-4)
    hits, count = 0, 0
    for b, a in np.argwhere(np.asarray(signal.weights["valid"])[:, :, 0, 1] > 0):
        t = int(signal.anchors[b, a])
        hits += small.DRAFT_VOCAB[everything[b, t][0][1].argmax()] == batch["tokens"][b, t + 3]
        count += 1
    assert float(metrics["accuracy_1"]) == pytest.approx(hits / count, abs=1e-6)


def test_every_valid_position_and_no_other_counts(signal_and_value, batch):
    """12 anchors are all that the first text has: token t + 2 + j was written, and lies inside."""
    signal, _ = signal_and_value(Supervised(12, K))
    found = {
        (b, int(signal.anchors[b, a]), j)
        for b, a, _, j in np.argwhere(np.asarray(signal.weights["valid"]) > 0).tolist()
    }
    want = {
        (b, t, j)
        for b in range(2)
        for t in range(T - 2)
        for j in range(K)
        if batch["assistant"][b, t + 2] and t + 2 + j < LENGTHS[b]
    }
    assert found == want
    np.testing.assert_allclose(np.asarray(signal.weights["valid"]).sum((0, 1, 2)), 1.0, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_target_that_is_not_renormalised_gives_mass_to_what_the_drafter_cannot_say(
    signal_and_value, batch, everything, temperature
):
    objective = Supervised(12, K, losses="total_variation", renormalise=False, target_temperature=temperature)
    signal, (loss, _) = signal_and_value(objective)

    def loss_of(target, logits, j):
        p = softmax(target) if temperature else np.eye(len(target))[target.argmax()]
        return 1 - np.minimum(p[small.DRAFT_VOCAB], softmax(logits)).sum()

    assert float(loss) == pytest.approx(expected(signal, batch, everything, loss_of, decay), rel=1e-4)


def test_a_sum_of_losses_has_its_weights(signal_and_value, batch, everything):
    signal, (loss, _) = signal_and_value(Supervised(12, K, losses="kl+0.5*hard_cross_entropy"))

    def loss_of(target, logits, j):
        log_p, log_q = reference.log_softmax(target[small.DRAFT_VOCAB]), reference.log_softmax(logits)
        return (np.exp(log_p) * (log_p - log_q)).sum() - 0.5 * log_q[log_p.argmax()]

    assert float(loss) == pytest.approx(expected(signal, batch, everything, loss_of, decay), rel=1e-4)


def test_lambda_by_the_batch_is_of_each_steps_mean_acceptance(signal_and_value, batch, everything):
    objective = Supervised(12, K, losses="lk_batch", lk_scale=0.9, lk_decay=2.0)
    signal, (loss, _) = signal_and_value(objective)

    def accepted(target, logits, j):
        return np.minimum(softmax(target[small.DRAFT_VOCAB]), softmax(logits)).sum()

    def at_step(step):
        return lambda *_: (np.arange(K) == step).astype(float)

    means = [expected(signal, batch, everything, accepted, at_step(j)) for j in range(K)]
    assert np.ptp(means) > 1e-3

    def loss_of(target, logits, j):
        log_p, log_q = reference.log_softmax(target[small.DRAFT_VOCAB]), reference.log_softmax(logits)
        mix = 0.9 * np.exp(-2.0 * means[j])
        kl = (np.exp(log_p) * (log_p - log_q)).sum()
        return mix * kl + (1 - mix) * (1 - accepted(target, logits, j))

    assert float(loss) == pytest.approx(expected(signal, batch, everything, loss_of, decay), rel=1e-4)


def reach(logits, tokens, valid, uniform):
    hits = small.DRAFT_VOCAB[logits.argmax(-1)] == tokens
    return np.concatenate([[1], hits[:-1].cumprod()])


def probs(logits, tokens):
    q = softmax(logits)
    inside = np.isin(tokens, small.DRAFT_VOCAB)
    ids = np.minimum(np.searchsorted(small.DRAFT_VOCAB, tokens), len(small.DRAFT_VOCAB) - 1)
    return q[np.arange(K), ids] * inside


def reach_sampled(logits, tokens, valid, uniform):
    return np.concatenate([[1], (uniform < probs(logits, tokens))[:-1].cumprod()])


def dpace(logits, tokens, valid, uniform):
    smooth = np.where(valid, 0.5 * probs(logits, tokens) + 0.5, 1.0)
    prefix = smooth.cumprod() * valid
    return prefix[::-1].cumsum()[::-1] * valid


WEIGHTS = {"reach": reach, "reach_sampled": reach_sampled, "dpace": dpace}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_follow_from_what_the_drafter_says(signal_and_value, batch, everything, name):
    signal, (loss, _) = signal_and_value(Supervised(12, K, step_weights=f"decay*{name}"))

    def weight_of(*about):
        return decay(*about) * WEIGHTS[name](*about)

    want = expected(signal, batch, everything, cross_entropy_at(1.0), weight_of)
    plain = expected(signal, batch, everything, cross_entropy_at(1.0), decay)
    assert abs(want - plain) > 1e-2 * plain
    assert float(loss) == pytest.approx(want, rel=1e-4)


def test_the_mass_is_that_at_the_targets_temperature(tiny, batch):
    """Of the whole vocabulary at temperature 0.7: what lies outside of the draft vocabulary is missing."""
    objective = Supervised(4, K, losses="total_variation", renormalise=False, target_temperature=0.7)
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
    outputs = outputs_of(tiny.target, tiny.params, batch)
    signal = objective.signal(models, batch, outputs, {}, 1, KEY)[0]
    prepared = objective.prepare(models, signal, batch, outputs)
    found = prepared.look_up(prepared.where[..., 0])
    for b, a in np.ndindex(signal.anchors.shape):
        target, _ = reference.target_text(tiny.params, small.TINY, batch["tokens"][b].tolist())
        probs = softmax(target[min(int(signal.anchors[b, a]) + 1, T - 1)] / 0.7)[small.DRAFT_VOCAB]
        assert float(found.mass[b, a, 0]) == pytest.approx(probs.sum(), rel=1e-4)


def test_dpace_has_its_smoothing(signal_and_value):
    values = []
    for alpha in (0.1, 0.9):
        _, (loss, _) = signal_and_value(Supervised(8, K, step_weights="dpace", dpace_alpha=alpha))
        values.append(float(loss))
    assert abs(values[0] - values[1]) > 1e-3
