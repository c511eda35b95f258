"""One PPOW step, phase by phase, on the random target: against sums done another way."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small
from phases import GAMMA, KEY, NEVER, batch_of, gradient_of, judge, norm, run, small_ppow

from ppow_jax.models import target_outputs
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives import rewards, verification
from ppow_jax.objectives.base import models_of, per_token

T, SHORT = 20, 6  # positions; the length of the last row


@pytest.fixture(scope="module")
def text(tiny) -> dict[str, np.ndarray]:
    """Greedy texts of the random target; the last is too short for six anchors."""
    prompts = np.array([[3, 9], [4, 1], [7, 7]])
    decoding = small.DecodeConfig(T - 2, NEVER)
    out = small.generate(tiny, prompts.tolist(), decoding, padded=2)
    return batch_of(np.concatenate([prompts, out.tokens], 1), [T, T - 4, SHORT])


SETTINGS = small_ppow(
    anchors=6, group=8, rollout_temperature=1.7, proximity_weight=0.5, kl_weight=0.3, clip=50.0
)


def gradient(tiny, objective, text, rollout, verified):
    """((loss, metrics), gradient) of what a verified rollout teaches."""
    signal, _ = judge(objective, text, rollout, verified)
    return gradient_of(tiny, tiny.drafter, tiny.weights, objective, text, signal)


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
    rollout, verified = step
    (_, metrics), _ = gradient(tiny, SETTINGS, text, rollout, verified)
    assert metrics["log_prob_gap"] < 1e-4
    off = rollout._replace(log_prob=rollout.log_prob.at[0, 0, 0, 0].add(0.25))
    (_, metrics), _ = gradient(tiny, SETTINGS, text, off, verified)
    assert float(metrics["log_prob_gap"]) == pytest.approx(0.25, abs=1e-4)


def test_both_log_likelihoods_of_proximity_are_those_of_plain_forward_passes(tiny, text, step, plain):
    rollout, _ = step
    outputs, cache = jax.jit(target_outputs.read, static_argnums=0)(tiny.target, tiny.params, text["tokens"])
    ahead = verification.continuation(text, outputs, rollout)
    assert (np.asarray(ahead.valid[:, :, 0]) == plain["inside"]).all()
    where = np.broadcast_to(plain["inside"][:, :, None], plain["drafted"].shape)
    np.testing.assert_allclose(
        ahead.log_prob[where[:, :, :1]], plain["preferred"][where[:, :, :1]], atol=1e-4
    )
    needed = np.ones(rollout.tokens.shape[:3], bool)
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
    scores = verification.score_groups(models, cache, outputs, rollout, needed, 0.0)
    np.testing.assert_allclose(scores.log_prob[where], plain["drafted"][where], atol=1e-4)


def test_proximity_rewards_refused_windows_near_the_text(tiny, text, step, plain):
    """The threshold is put amid the gaps, so that it decides."""
    rollout, verified = step
    both = plain["inside"][:, :, None]
    gap = ((plain["preferred"] - plain["drafted"]) * both).sum(-1)
    refused = (np.asarray(verified.accepted) == 0) & np.asarray(rollout.real)[..., None]
    ordered = np.sort(gap[refused])
    low, high = ordered[len(ordered) // 2 - 1], ordered[len(ordered) // 2]
    middle = dataclasses.replace(SETTINGS, proximity_epsilon=float(low + high) / 2)
    _, metrics = judge(middle, text, rollout, verified)
    want = 0.5 * (refused & (gap < (low + high) / 2))
    assert 0 < (want > 0).sum() < refused.sum()
    got = rewards.proximity(verified.accepted, verified.preferred, verified.drafted, (low + high) / 2)
    np.testing.assert_allclose(0.5 * np.asarray(got) * np.asarray(rollout.real)[..., None], want, atol=1e-6)
    mean = want[np.asarray(rollout.real)].mean()
    assert float(metrics["reward_proximity"]) == pytest.approx(mean, rel=1e-5)


def test_a_weight_of_zero_switches_a_reward_off(tiny, text, step):
    rollout, verified = step
    k, real = np.asarray(verified.accepted), np.asarray(rollout.real)
    epsilon = SETTINGS.proximity_epsilon
    near = np.asarray(rewards.proximity(k, verified.preferred, verified.drafted, epsilon)) * real[..., None]
    assert near.any() and k.any()
    for name in ("", "speedup_weight", "proximity_weight"):
        changed = dataclasses.replace(SETTINGS, **({name: 0.0} if name else {}))
        signal, metrics = judge(changed, text, rollout, verified)
        reward = changed.speedup_weight * k / (k * GAMMA + 1) + changed.proximity_weight * near
        spread = reward.std(-1, keepdims=True)
        want = np.where(spread > 1e-6, (reward - reward.mean(-1, keepdims=True)) / (spread + 1e-6), 0)
        np.testing.assert_allclose(signal.extra.advantage, want, atol=1e-4)
        assert float(metrics["reward"]) == pytest.approx(reward[real].mean(), rel=1e-5)
        assert (float(metrics["reward_speedup"]) == 0) == (name == "speedup_weight")
        assert (float(metrics["reward_proximity"]) == 0) == (name == "proximity_weight")


def test_centred_advantages_keep_the_scale_of_the_rewards(tiny, text, step):
    rollout, verified = step
    changed = dataclasses.replace(SETTINGS, advantage="centred", proximity_weight=0.0)
    signal, _ = judge(changed, text, rollout, verified)
    reward = np.asarray(verified.accepted) / (np.asarray(verified.accepted) * GAMMA + 1)
    want = reward - reward.mean(-1, keepdims=True)
    np.testing.assert_allclose(signal.extra.advantage, want, atol=1e-5)


def test_a_reward_of_ones_own_takes_the_place_of_the_speedup(tiny, text, step):
    rollout, verified = step
    changed = dataclasses.replace(SETTINGS, reward="phases:squared", proximity_weight=0.0)
    _, metrics = judge(changed, text, rollout, verified)
    k = np.asarray(verified.accepted)[np.asarray(rollout.real)]
    assert float(metrics["reward"]) == pytest.approx((k.astype(float) ** 2).mean(), rel=1e-5)


def test_a_group_drafted_as_one_teaches_what_its_windows_teach_one_by_one(tiny, text):
    """The same windows, their log-probabilities recomputed along themselves instead of along the text."""
    as_one = dataclasses.replace(SETTINGS, proximity_weight=0.0)
    assert as_one.along_text and not SETTINGS.along_text
    of = (tiny, tiny.drafter, tiny.weights.params, tiny.weights.vocab)
    rollout, verified = run(*of, as_one, text)
    k = np.asarray(verified.accepted)
    assert (k > 0).any() and (np.ptp(k, axis=-1) > 0).any()
    known = np.arange(3) <= k[..., None]
    beyond = jnp.asarray(np.where(known, rollout.log_prob, 0.0))  # of what nobody looks at
    found = [
        gradient(tiny, s, text, rollout._replace(log_prob=beyond), verified)
        for s in (as_one, dataclasses.replace(SETTINGS, proximity_epsilon=-1e9))  # so that no window is near
    ]
    ((loss, metrics), grads), ((loss_, metrics_), grads_) = found
    assert norm(grads) > 1e-2
    assert norm(jax.tree.map(jnp.subtract, grads, grads_)) < 1e-4 * norm(grads)
    assert float(loss) == pytest.approx(float(loss_), abs=1e-5)
    for name in ("policy_loss", "kl", "clip_fraction", "entropy"):
        assert float(metrics[name]) == pytest.approx(float(metrics_[name]), abs=1e-5), name


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_kl_term_has_its_weight_and_vanishes_without(tiny, text, step, kl_weight):
    rollout, verified = step
    changed = dataclasses.replace(SETTINGS, kl_weight=kl_weight)
    args = (tiny, changed, text, rollout)
    (loss, metrics), grads = gradient(*args, verified)
    assert metrics["kl"] > 0.1
    want = float(metrics["policy_loss"]) + kl_weight * float(metrics["kl"])
    assert float(loss) == pytest.approx(want, abs=1e-5)
    head = {"weight": -tiny.params["head"]["weight"]}
    _, other = gradient(tiny._replace(params=tiny.params | {"head": head}), *args[1:], verified)
    change = norm(jax.tree.map(jnp.subtract, grads, other))
    assert change > 0.1 if kl_weight else change == 0


@pytest.mark.parametrize("credit", ["accepted", "window"])
def test_credit_goes_to_the_tokens_that_could_change_the_reward(tiny, text, step, credit):
    """Ratios differ by token, so the loss tells which tokens were counted."""
    rollout, verified = step
    changed = dataclasses.replace(SETTINGS, credit=credit)
    rng = np.random.default_rng(3)
    K = rollout.tokens.shape[-1]
    accepted = rng.integers(K + 1, size=verified.accepted.shape)
    advantage = rng.normal(size=accepted.shape).astype(np.float32)
    shift = rng.normal(size=rollout.tokens.shape).astype(np.float32)
    proximity = np.zeros(accepted.shape, np.float32)
    proximity[..., 0] = rng.integers(2, size=accepted.shape[:2])  # one window of some groups was near
    assert set(proximity[..., 0].ravel()) == {0, 1}
    made_up = verified._replace(accepted=jnp.asarray(accepted))
    shifted = rollout._replace(log_prob=rollout.log_prob - shift)
    signal, _ = judge(changed, text, shifted, made_up)
    credited, reached = changed.credits(made_up, jnp.asarray(proximity))
    weights = {"policy": per_token(credited), "kl": per_token(reached)}
    signal = signal._replace(weights=weights, extra=signal.extra._replace(advantage=jnp.asarray(advantage)))
    (_, metrics), _ = gradient_of(tiny, tiny.drafter, tiny.weights, changed, text, signal)
    total, count = 0.0, 0
    for b, a, g, j in np.ndindex(shift.shape):
        whole = credit == "window" or (accepted[b, a, g] == 0 and proximity[b, a, 0] > 0)
        if verified.valid[b, a, g, j] and (whole or j <= accepted[b, a, g]):
            total -= np.exp(shift[b, a, g, j]) * advantage[b, a, g]
            count += 1
    assert float(metrics["policy_loss"]) == pytest.approx(total / count, rel=1e-3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_anchors_have_no_say(tiny, text, step, temperature):
    """Whatever is drafted where a text had no anchor left, the gradient and the metrics are the same."""
    changed = dataclasses.replace(SETTINGS, temperature=temperature)
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab, NEVER)
    outputs = jax.jit(outputs_of, static_argnums=0)(tiny.target, tiny.params, text)
    verify = jax.jit(verification.verify, static_argnums=(5, 6))
    rollout = step[0]
    padding = ~np.asarray(rollout.real)
    assert padding.sum(1).tolist() == [0, 0, 6 - (SHORT - 2)]
    rng = np.random.default_rng(4)
    ids = np.where(padding[..., None, None], rng.integers(24, size=rollout.ids.shape), rollout.ids)
    odd = np.where(padding[..., None, None], rollout.log_prob - 1.0, rollout.log_prob)
    junk = rollout._replace(ids=ids, tokens=small.DRAFT_VOCAB[ids], log_prob=odd)
    assert (np.asarray(junk.tokens) != np.asarray(rollout.tokens)).any()
    verified, again = (verify(models, text, outputs, r, KEY, temperature, True) for r in (rollout, junk))
    for found in (verified, again):
        assert not np.asarray(found.valid)[padding].any()
        assert not np.asarray(found.accepted)[padding].any()
    args = (tiny, changed, text)
    (loss, metrics), grads = gradient(*args, rollout, verified)
    (loss_, metrics_), grads_ = gradient(*args, junk, again)
    assert norm(grads) > 1e-2
    assert norm(jax.tree.map(jnp.subtract, grads, grads_)) < 1e-6 * norm(grads)
    assert float(loss) == pytest.approx(float(loss_), abs=1e-6)
    first = metrics | judge(changed, text, rollout, verified)[1]
    second = metrics_ | judge(changed, text, junk, again)[1]
    for name in first:
        np.testing.assert_allclose(first[name], second[name], atol=1e-6, err_msg=name)
