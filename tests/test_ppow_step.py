"""One PPOW step, phase by phase, against laws that are known and sums done another way."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import small

from ppow_jax import teacher, verification
from ppow_jax.models.target import head_matrix
from ppow_jax.rollout import make_rollout
from ppow_jax.stages import ppow

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEY = jax.random.key(0)
GAMMA = 0.12
NEVER = (-1,)
T, SHORT = 20, 6  # positions; the length of the last row


@pytest.fixture(scope="module")
def text(tiny) -> dict[str, np.ndarray]:
    """Greedy texts of the random target; the last is too short for six anchors."""
    prompts = np.array([[3, 9], [4, 1], [7, 7]])
    decoding = small.DecodeConfig(T - 2, 0, 0.0, NEVER)
    out = small.generate(tiny, prompts.tolist(), decoding, padded=2)
    return batch_of(np.concatenate([prompts, out.tokens], 1), [T, T - 4, SHORT])


def batch_of(tokens: np.ndarray, lengths: list[int]) -> dict[str, np.ndarray]:
    inside = np.arange(tokens.shape[1]) < np.array(lengths)[:, None]
    assistant = inside & (np.arange(tokens.shape[1]) >= 2)
    index = np.arange(len(tokens), dtype=np.int32)
    return {"index": index, "tokens": np.where(inside, tokens, 0).astype(np.int32), "assistant": assistant}


@functools.cache
def phases(target, drafter, settings, stops=NEVER):
    """The jitted pick, roll and verify."""
    return (
        ppow.make_pick(target, drafter, settings),
        make_rollout(target, drafter, settings),
        verification.make_verify(target, settings, GAMMA, stops),
    )


def run(pair, drafter, params, vocab, settings, batch, key=KEY, stops=NEVER):
    """(rollout, verdict) of a step."""
    pick, roll, verify = phases(pair.target, drafter, settings, stops)
    keys = jax.random.split(key, 3)
    _, *picked = pick({"params": params, "vocab": vocab}, pair.params, batch, 1, keys[0])
    rollout = roll(params, vocab, pair.params, batch, *picked, keys[1])
    return rollout, verify(pair.params, batch, rollout, keys[2])


@functools.partial(jax.jit, static_argnames=("target", "drafter", "settings"))
def differentiate(target, drafter, settings, target_params, weights, batch, rollout, verdict):
    lesson = teacher.lesson_of(target, target_params, batch)
    head = head_matrix(target.config, target_params)[:, weights.vocab]
    args = (drafter, settings, target_params, weights.vocab, head, lesson, batch)
    loss = functools.partial(ppow.ppow_loss, *args)
    return jax.value_and_grad(loss, has_aux=True)(weights.params, rollout, verdict)


def gradient(pair, drafter, weights, settings, batch, rollout, verdict):
    """((loss, metrics), gradient) of the update's objective."""
    return differentiate(pair.target, drafter, settings, pair.params, weights, batch, rollout, verdict)


def norm(tree) -> float:
    return float(optax.global_norm(tree))


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


# The Markov chain from here on: laws are known.


def few_letters(chain) -> np.ndarray:
    """Five letters, each the likeliest after the one before."""
    found = [9]
    while len(found) < 5:
        found.append(int(chain.law[found[-1]].argmax()))
    return np.sort(found).astype(np.int32)


def greedy_text(chain, rows: int) -> dict[str, np.ndarray]:
    tokens = np.zeros((rows, T), np.int32)
    tokens[:, 0] = 4 + np.arange(rows)
    for at in range(1, T):
        tokens[:, at] = chain.law.argmax(-1)[tokens[:, at - 1]]
    return batch_of(tokens, [T] * (rows - 1) + [T - 5])


LETTERS = np.arange(4, small.markov.SIZE, dtype=np.int32)


def test_greedy_acceptance_is_that_of_a_loop_over_texts(chain):
    batch = greedy_text(chain, 3)
    drafter, weights = chain.drafter(chain.law[:, LETTERS], LETTERS)
    settings = small.ppow_settings(group=16, anchors=14, window=4, proximity_weight=0.0)
    rollout, verdict = run(chain, drafter, weights.params, weights.vocab, settings, batch)
    assert (~np.asarray(rollout.real)).any()
    want = np.zeros(verdict.accepted.shape, int)
    for b, a, g in np.ndindex(want.shape):
        t = int(rollout.anchors[b, a]) + 2
        for j, token in enumerate(np.asarray(rollout.tokens[b, a, g])):
            end = T - (5 if b == 2 else 0)
            if not rollout.real[b, a] or t + j >= end or batch["tokens"][b, t + j] != token:
                break
            want[b, a, g] += 1
    assert set(want.ravel()) == {0, 1, 2, 3, 4}
    assert (np.asarray(verdict.accepted) == want).all()


@pytest.mark.parametrize(
    ("temperature", "rollout_temperature", "stop"), [(1.0, 1.0, False), (0.6, 1.4, True)]
)
def test_sampled_acceptance_is_that_of_enumerating_every_window(
    chain, temperature, rollout_temperature, stop
):
    """Five letters, three steps: 125 windows, each with its probability and its chances."""
    vocab, K, group = few_letters(chain), 3, 256
    rng = np.random.default_rng(1)
    near = chain.law[:, vocab] / chain.law[:, vocab].sum(-1, keepdims=True)
    law = 0.5 * near + 0.5 * rng.dirichlet(np.ones(5), size=small.markov.SIZE)
    drafter, weights = chain.drafter(law, vocab)
    stops = (int(vocab[2]),) if stop else NEVER
    settings = small.ppow_settings(
        group=group, temperature=temperature, rollout_temperature=rollout_temperature
    )
    batch = greedy_text(chain, 4)
    rollout, verdict = run(chain, drafter, weights.params, weights.vocab, settings, batch, stops=stops)
    q = law ** (1 / rollout_temperature)
    q /= q.sum(-1, keepdims=True)
    p = chain.law ** (1 / temperature)
    p = (p / p.sum(-1, keepdims=True))[:, vocab]
    for b, a in np.ndindex(rollout.anchors.shape):
        want = np.zeros(K + 1)
        for window in itertools.product(range(5), repeat=K):
            chance, alive, token = 1.0, True, int(batch["tokens"][b, rollout.anchors[b, a] + 1])
            going = np.zeros(K)  # P(token j kept | those before kept)
            for j, i in enumerate(window):
                chance *= q[token, i]
                going[j] = min(1, p[token, i] / q[token, i]) if alive else 0.0
                token = int(vocab[i])
                alive = alive and token not in stops
            reach = np.cumprod(np.concatenate([[1.0], going]))
            want += chance * (reach - np.append(reach[1:], 0.0))
        assert want.sum() == pytest.approx(1)
        seen = np.bincount(np.asarray(verdict.accepted[b, a]), minlength=K + 1) / group
        assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / group) + 1e-6).all(), (b, a)


def test_a_group_without_spread_gives_no_policy_gradient(chain):
    """A drafter that is sure draws the same window every time; one that is not learns."""
    settings = small.ppow_settings(group=8, kl_weight=0.0)
    batch = greedy_text(chain, 3)
    sure = np.full((small.markov.SIZE, len(LETTERS)), 1e-9)
    sure[:, 3] = 1.0
    norms, shares = [], []
    for law in (sure, chain.law[:, LETTERS]):
        drafter, weights = chain.drafter(law, LETTERS)
        rollout, verdict = run(chain, drafter, weights.params, weights.vocab, settings, batch)
        _, grads = gradient(chain, drafter, weights, settings, batch, rollout, verdict)
        norms.append(norm(grads))
        shares.append(float(ppow.reward_metrics(rollout, verdict)["share_without_spread"]))
    assert norms[0] == 0
    assert norms[1] > 0.01
    assert shares[0] == 1
    assert shares[1] < 1


def test_the_kl_of_a_drafter_that_is_the_target_is_zero_and_flat(chain):
    settings = small.ppow_settings(kl_weight=1.0, temperature=1.0)
    batch = greedy_text(chain, 3)
    flat = np.full((small.markov.SIZE, len(LETTERS)), 1 / len(LETTERS))
    found = []
    for law in (chain.law[:, LETTERS], flat):
        drafter, weights = chain.drafter(law, LETTERS)
        rollout, verdict = run(chain, drafter, weights.params, weights.vocab, settings, batch)
        quiet = verdict._replace(advantage=jnp.zeros_like(verdict.advantage))
        (_, metrics), grads = gradient(chain, drafter, weights, settings, batch, rollout, quiet)
        found.append((float(metrics["kl"]), norm(grads["head"])))
    assert found[0][0] < 1e-4
    assert found[0][1] < 1e-3
    assert found[1][0] > 0.5
    assert found[1][1] > 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reinforcement_alone_finds_what_the_target_accepts(chain, temperature):
    """A bandit: the drafter knows nothing, each window is one pull, the reward the only guide."""
    settings = small.ppow_settings(
        temperature=temperature, window=1, group=8, anchors=8, kl_weight=0.0, proximity_weight=0.0, updates=2
    )
    vocab = few_letters(chain)
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, 5), 0.2), vocab)
    batch = greedy_text(chain, 8)
    batch["assistant"] &= np.isin(batch["tokens"], vocab)  # only where it can be right
    others = {name: name != "head" for name in weights.params}
    optimizer = optax.chain(optax.adam(0.05), optax.masked(optax.set_to_zero(), others))  # a table of laws
    learner = {"params": jax.tree.map(jnp.copy, weights.params), "opt_state": optimizer.init(weights.params)}
    update = ppow.make_update(chain.target, drafter, optimizer, settings)
    accepted = []
    for number in range(25):
        key = jax.random.fold_in(KEY, number)
        rollout, verdict = run(chain, drafter, learner["params"], weights.vocab, settings, batch, key)
        learner, metrics = update(learner, weights.vocab, chain.params, batch, rollout, verdict)
        accepted.append(float(metrics["accepted"]))
    assert accepted[0] < 0.35
    best = 1.0 if temperature == 0 else 0.75  # about what the target's law gives the likeliest letter
    assert np.mean(accepted[-5:]) > best - 0.1, accepted
