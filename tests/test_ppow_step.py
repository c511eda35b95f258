"""One PPOW step, phase by phase, on the random target: against sums done another way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
from phases import GAMMA, KEY, NEVER, batch_of, gradient, norm, run

from ppow_jax import teacher, verification
from ppow_jax.rollout import drafted_as_one
from ppow_jax.stages import ppow

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, SHORT = 20, 6  # positions; the length of the last row


@pytest.fixture(scope="module")
def text(tiny) -> dict[str, np.ndarray]:
    """Greedy texts of the random target; the last is too short for six anchors."""
    prompts = np.array([[3, 9], [4, 1], [7, 7]])
    decoding = small.DecodeConfig(T - 2, NEVER)
    out = small.generate(tiny, prompts.tolist(), decoding, padded=2)
    return batch_of(np.concatenate([prompts, out.tokens], 1), [T, T - 4, SHORT])


SETTINGS = small.ppow_settings(
    anchors=6, group=8, rollout_temperature=1.7, proximity_weight=0.5, kl_weight=0.3, clip=50.0
)


@pytest.fixture(scope="module")
def step(tiny, text):
    return run(tiny, tiny.drafter, tiny.weights.params, tiny.weights.vocab, SETTINGS, text)


@pytest.fixture(scope="module")
def plain(tiny, text, step) -> dict[str, np.ndarray]:
    """Of every window as the end of an ordinary text: log-likelihood, and whether it is inside the text."""
    rollout = jax.tree.map(np.asarray, step[0])
    B, A, G, K = rollout.tokens.shape
    whole = np.zeros((B, A, G + 1, T + K), np.int32)
    lasts = text["assistant"].shape[1] - text["assistant"][:, ::-1].argmax(1)  # ends of the responses
    inside = np.zeros((B, A, K), bool)
    for b, a in np.ndindex(B, A):
        t = rollout.anchors[b, a] + 2
        inside[b, a] = (t + np.arange(K) < lasts[b]) & rollout.real[b, a]
        whole[b, a, :, :t] = text["tokens"][b, :t]
        whole[b, a, :G, t : t + K] = rollout.tokens[b, a]
        rest = text["tokens"][b, t : t + K]
        whole[b, a, G, t : t + len(rest)] = rest
    logits = small.forward(tiny.target, tiny.params, whole.reshape(-1, T + K))[1]
    logp = reference.log_softmax(np.asarray(logits, np.float64)).reshape(*whole.shape, -1)
    found = np.zeros((B, A, G + 1, K))
    for b, a, g, j in np.ndindex(found.shape):
        t = rollout.anchors[b, a] + 2 + j
        found[b, a, g, j] = logp[b, a, g, t - 1, whole[b, a, g, t]]
    return {"drafted": found[:, :, :G], "preferred": found[:, :, G:], "inside": inside}


def test_log_probs_of_a_rollout_are_the_drafters_at_the_rollout_temperature(tiny, text, step):
    rollout, _ = step
    taps = np.asarray(small.forward(tiny.target, tiny.params, text["tokens"])[0].taps[:, 0])
    for b, a, g in ((0, 0, 0), (0, 3, 5), (1, 2, 7), (2, 0, 1)):
        tokens = np.asarray(rollout.tokens[b, a, g])
        assert (tokens == small.DRAFT_VOCAB[rollout.ids[b, a, g]]).all()
        about = tiny.weights.params, tiny.drafter.config, tiny.weights.embedding, taps[b]
        where = text["tokens"][b].tolist(), int(rollout.anchors[b, a]), 3
        logits = reference.drafter_window(*about, *where, lambda j, _, tokens=tokens: tokens[j])
        want = reference.log_softmax(logits / 1.7)[np.arange(3), rollout.ids[b, a, g]]
        np.testing.assert_allclose(rollout.log_prob[b, a, g], want, atol=2e-4)


def test_the_update_recomputes_the_rollouts_log_probs(tiny, text, step):
    rollout, verdict = step
    (_, metrics), _ = gradient(tiny, tiny.drafter, tiny.weights, SETTINGS, text, rollout, verdict)
    assert metrics["log_prob_gap"] < 1e-4
    off = rollout._replace(log_prob=rollout.log_prob.at[0, 0, 0, 0].add(0.25))
    (_, metrics), _ = gradient(tiny, tiny.drafter, tiny.weights, SETTINGS, text, off, verdict)
    assert float(metrics["log_prob_gap"]) == pytest.approx(0.25, abs=1e-4)


def test_both_log_likelihoods_of_proximity_are_those_of_plain_forward_passes(tiny, text, step, plain):
    rollout, _ = step
    lesson, cache = jax.jit(teacher.read, static_argnums=0)(tiny.target, tiny.params, text["tokens"])
    spans = verification.spans_of(text, lesson, rollout)
    assert (np.asarray(spans.valid[:, :, 0]) == plain["inside"]).all()
    where = np.broadcast_to(plain["inside"][:, :, None], plain["drafted"].shape)
    np.testing.assert_allclose(
        spans.log_prob[where[:, :, :1]], plain["preferred"][where[:, :, :1]], atol=1e-4
    )
    needed = np.ones(rollout.tokens.shape[:3], bool)
    scores = verification.score_groups(tiny.target, tiny.params, cache, lesson, rollout, needed, 0.0)
    np.testing.assert_allclose(scores.log_prob[where], plain["drafted"][where], atol=1e-4)


def test_proximity_rewards_refused_windows_near_the_text(tiny, text, step, plain):
    """The threshold is put amid the gaps, so that it decides."""
    rollout, verdict = step
    both = plain["inside"][:, :, None]
    gap = ((plain["preferred"] - plain["drafted"]) * both).sum(-1)
    refused = (np.asarray(verdict.accepted) == 0) & np.asarray(rollout.real)[..., None]
    ordered = np.sort(gap[refused])
    low, high = ordered[len(ordered) // 2 - 1], ordered[len(ordered) // 2]
    middle = dataclasses.replace(SETTINGS, proximity_epsilon=float(low + high) / 2)
    verify = verification.make_verify(tiny.target, middle, GAMMA, NEVER)
    got = np.asarray(verify(tiny.params, text, rollout, KEY).proximity)
    want = 0.5 * (refused & (gap < (low + high) / 2))
    assert 0 < (want > 0).sum() < refused.sum()
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_weight_of_zero_switches_a_reward_off(tiny, text, step):
    rollout, both = step
    alone = {}
    for name in ("speedup_weight", "proximity_weight"):
        changed = dataclasses.replace(SETTINGS, **{name: 0.0})
        alone[name] = verification.make_verify(tiny.target, changed, GAMMA, NEVER)(
            tiny.params, text, rollout, KEY
        )
    k = np.asarray(both.accepted)
    np.testing.assert_allclose(both.speedup, k / (k * GAMMA + 1), rtol=1e-6)
    assert np.asarray(both.proximity).any()
    assert np.asarray(both.speedup).any()
    without_speedup, without_proximity = alone["speedup_weight"], alone["proximity_weight"]
    assert not np.asarray(without_speedup.speedup).any()
    assert not np.asarray(without_proximity.proximity).any()
    np.testing.assert_allclose(without_speedup.proximity, both.proximity)
    np.testing.assert_allclose(without_proximity.speedup, both.speedup)
    for verdict in (both, without_speedup, without_proximity):
        reward = np.asarray(verdict.speedup + verdict.proximity, np.float64)
        spread = reward.std(-1, keepdims=True)
        want = np.where(spread > 1e-6, (reward - reward.mean(-1, keepdims=True)) / (spread + 1e-6), 0)
        np.testing.assert_allclose(verdict.advantage, want, atol=1e-4)
        metrics = ppow.reward_metrics(rollout, verdict)
        assert float(metrics["reward"]) == pytest.approx(reward[np.asarray(rollout.real)].mean(), rel=1e-5)


def test_a_group_drafted_as_one_teaches_what_its_windows_teach_one_by_one(tiny, text):
    """The same windows, their log-probabilities recomputed along themselves instead of along the text."""
    as_one = dataclasses.replace(SETTINGS, proximity_weight=0.0)
    assert drafted_as_one(as_one) and not drafted_as_one(SETTINGS)
    of = (tiny, tiny.drafter, tiny.weights.params, tiny.weights.vocab)
    rollout, verdict = run(*of, as_one, text)
    k = np.asarray(verdict.accepted)
    assert (k > 0).any() and (np.ptp(k, axis=-1) > 0).any()
    known = np.arange(3) <= k[..., None]
    beyond = jnp.asarray(np.where(known, rollout.log_prob, 0.0))  # of what nobody looks at
    found = [
        gradient(tiny, tiny.drafter, tiny.weights, s, text, rollout._replace(log_prob=beyond), verdict)
        for s in (as_one, SETTINGS)  # weights of the rewards have no say in the loss
    ]
    ((loss, metrics), grads), ((loss_, metrics_), grads_) = found
    assert norm(grads) > 1e-2
    assert norm(jax.tree.map(jnp.subtract, grads, grads_)) < 1e-4 * norm(grads)
    assert float(loss) == pytest.approx(float(loss_), abs=1e-5)
    for name in ("policy_loss", "kl", "clip_fraction", "entropy"):
        assert float(metrics[name]) == pytest.approx(float(metrics_[name]), abs=1e-5), name


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_kl_term_has_its_weight_and_vanishes_without(tiny, text, step, kl_weight):
    rollout, verdict = step
    changed = dataclasses.replace(SETTINGS, kl_weight=kl_weight)
    args = (tiny, tiny.drafter, tiny.weights, changed, text, rollout)
    (loss, metrics), grads = gradient(*args, verdict)
    assert metrics["kl"] > 0.1
    want = float(metrics["policy_loss"]) + kl_weight * float(metrics["kl"])
    assert float(loss) == pytest.approx(want, abs=1e-5)
    _, other = gradient(*args, verdict._replace(context=-verdict.context))
    change = norm(jax.tree.map(jnp.subtract, grads, other))
    assert change > 0.1 if kl_weight else change == 0


@pytest.mark.parametrize("credit", ["accepted", "window"])
def test_credit_goes_to_the_tokens_that_could_change_the_reward(tiny, text, step, credit):
    """Ratios differ by token, so the loss tells which tokens were counted."""
    rollout, verdict = step
    changed = dataclasses.replace(SETTINGS, credit=credit)
    rng = np.random.default_rng(3)
    K = rollout.tokens.shape[-1]
    accepted = rng.integers(K + 1, size=verdict.accepted.shape)
    advantage = rng.normal(size=accepted.shape).astype(np.float32)
    shift = rng.normal(size=rollout.tokens.shape).astype(np.float32)
    proximity = np.zeros(accepted.shape, np.float32)
    proximity[..., 0] = rng.integers(2, size=accepted.shape[:2])  # one window of some groups was near
    assert set(proximity[..., 0].ravel()) == {0, 1}
    made_up = verdict._replace(
        accepted=jnp.asarray(accepted), advantage=jnp.asarray(advantage), proximity=jnp.asarray(proximity)
    )
    shifted = rollout._replace(log_prob=rollout.log_prob - shift)
    (_, metrics), _ = gradient(tiny, tiny.drafter, tiny.weights, changed, text, shifted, made_up)
    total, count = 0.0, 0
    for b, a, g, j in np.ndindex(shift.shape):
        whole = credit == "window" or (accepted[b, a, g] == 0 and proximity[b, a, 0] > 0)
        if verdict.valid[b, a, g, j] and (whole or j <= accepted[b, a, g]):
            total -= np.exp(shift[b, a, g, j]) * advantage[b, a, g]
            count += 1
    assert float(metrics["policy_loss"]) == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_anchors_have_no_say(tiny, text, step, temperature):
    """Whatever is drafted where a text had no anchor left, the gradient and the metrics are the same."""
    changed = dataclasses.replace(SETTINGS, temperature=temperature)
    verify = verification.make_verify(tiny.target, changed, GAMMA, NEVER)
    rollout = step[0]
    padding = ~np.asarray(rollout.real)
    assert padding.sum(1).tolist() == [0, 0, 6 - (SHORT - 2)]
    rng = np.random.default_rng(4)
    ids = np.where(padding[..., None, None], rng.integers(24, size=rollout.ids.shape), rollout.ids)
    odd = np.where(padding[..., None, None], rollout.log_prob - 1.0, rollout.log_prob)
    junk = rollout._replace(ids=ids, tokens=small.DRAFT_VOCAB[ids], log_prob=odd)
    assert (np.asarray(junk.tokens) != np.asarray(rollout.tokens)).any()
    verdict, again = (verify(tiny.params, text, r, KEY) for r in (rollout, junk))
    for found in (verdict, again):
        assert not np.asarray(found.valid)[padding].any()
        assert not np.asarray(found.speedup + found.proximity)[padding].any()
    args = (tiny, tiny.drafter, tiny.weights, changed, text)
    (loss, metrics), grads = gradient(*args, rollout, verdict)
    (loss_, metrics_), grads_ = gradient(*args, junk, again)
    assert norm(grads) > 1e-2
    assert norm(jax.tree.map(jnp.subtract, grads, grads_)) < 1e-6 * norm(grads)
    assert float(loss) == pytest.approx(float(loss_), abs=1e-6)
    first, second = (
        metrics | ppow.reward_metrics(rollout, verdict),
        metrics_ | ppow.reward_metrics(junk, again),
    )
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-6, err_msg=name)
