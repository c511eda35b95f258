"""The closed form of the expected reward: against enumeration, and as what sampled windows converge to."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from phases import GAMMA, KEY, batch_of, differentiate, judge, norm, run, small_ppow

from ppow_jax.errors import ConfigError
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.base import Signal, models_of
from ppow_jax.objectives.expected import Expected, chance_by_rank

T, K = 16, 3


@pytest.fixture(scope="module")
def letters(chain) -> np.ndarray:
    """Five letters, each the likeliest after the one before."""
    found = [9]
    while len(found) < 5:
        found.append(int(chain.probs[found[-1]].argmax()))
    return np.sort(found).astype(np.int32)


@pytest.fixture(scope="module")
def batch(chain) -> dict[str, np.ndarray]:
    """Greedy texts; the last response is short."""
    tokens = np.zeros((3, T), np.int32)
    tokens[:, 0] = 9, 4, 11
    for at in range(1, T):
        tokens[:, at] = chain.probs.argmax(-1)[tokens[:, at - 1]]
    return batch_of(tokens, [T, T, T - 8])


@pytest.fixture(scope="module")
def drafter(chain, letters):
    """Knows nothing in particular; its distribution after each token, `[V, 5]`."""
    probs = np.random.default_rng(3).dirichlet(np.ones(5), size=small.markov.SIZE)
    return *chain.drafter(probs, letters), probs


def signal_of(chain, drafter, objective, batch, key=KEY):
    @jax.jit
    def signal(params, vocab, target_params, batch):
        models = models_of(chain.target, drafter[0], target_params, params, vocab, (), GAMMA)
        outputs = outputs_of(chain.target, target_params, batch)
        return objective.signal(models, batch, outputs, {}, 1, key)

    return signal(drafter[1].params, drafter[1].vocab, chain.params, batch)[0]


def value(chain, drafter, objective, batch):
    """((loss, metrics), gradient), and the signal."""
    signal = signal_of(chain, drafter, objective, batch)
    return differentiate(chain.target, drafter[0], objective, chain.params, drafter[1], batch, signal), signal


@pytest.mark.parametrize("reward", ["speedup", "length"])
def test_the_reward_is_that_of_enumerating_every_window(chain, drafter, letters, batch, reward):
    """All 125 windows of each anchor, with their chances, their accepted lengths and what these earn."""
    objective = Expected(4, K, kl_weight=0.0, reward=reward)
    ((loss, metrics), _), signal = value(chain, drafter, objective, batch)
    rewards, lengths = [], []
    for b, a in np.argwhere(np.asarray(signal.weights["inside"])[:, :, 0, 0] > 0):
        t, total, length = int(signal.anchors[b, a]), 0.0, 0.0
        for window in itertools.product(range(5), repeat=K):
            chance, k, before = 1.0, 0, batch["tokens"][b, t + 1]
            for j, i in enumerate(window):
                chance *= drafter[2][before, i]
                before = letters[i]
                inside = t + 2 + j < T and batch["assistant"][b, t + 2 + j]
                k += inside and k == j and letters[i] == batch["tokens"][b, t + 2 + j]
            total += chance * (k if reward == "length" else k / (k * GAMMA + 1))
            length += chance * k
        rewards.append(total)
        lengths.append(length)
    assert np.ptp(lengths) > 0.1
    assert float(metrics["reward"]) == pytest.approx(np.mean(rewards), rel=1e-4)
    assert float(metrics["accepted"]) == pytest.approx(np.mean(lengths), rel=1e-4)
    assert float(loss) == pytest.approx(-np.mean(rewards), rel=1e-4)


@pytest.mark.parametrize("renormalise", [False, True])
def test_above_temperature_0_the_chance_is_that_of_speculative_sampling(
    chain, drafter, letters, batch, renormalise
):
    """By hand: the sum over tokens of min(P, q), both at the temperature; P over all tokens, or over the
    draft vocabulary."""
    about = dict(temperature=0.7, kl_weight=0.0, reward="length", renormalise=renormalise)
    ((_, metrics), _), signal = value(chain, drafter, Expected(4, K, **about), batch)
    p, q = chain.probs ** (1 / 0.7), drafter[2] ** (1 / 0.7)
    p, q = (p / p.sum(-1, keepdims=True))[:, letters], q / q.sum(-1, keepdims=True)
    if renormalise:
        p = p / p.sum(-1, keepdims=True)
    found = []
    for b, a in np.argwhere(np.asarray(signal.weights["inside"])[:, :, 0, 0] > 0):
        at, reached, length = int(signal.anchors[b, a]) + 1, 1.0, 0.0
        for j in range(at, min(at + K, T - 1)):
            if not batch["assistant"][b, j + 1]:
                break
            before = batch["tokens"][b, j]
            reached *= np.minimum(p[before], q[before]).sum()
            length += reached
        found.append(length)
    assert np.ptp(found) > 0.1
    assert float(metrics["reward"]) == pytest.approx(np.mean(found), rel=1e-4)
    assert float(metrics["accepted"]) == pytest.approx(np.mean(found), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_chance_by_rank_is_that_of_the_gap_to_the_border(rank):
    """Against sorting in NumPy; the gradient is on the token and on the border alone."""
    rng = np.random.default_rng(rank)
    logits, vocab = rng.normal(size=(2, 5, 1, 7)).astype(np.float32), np.arange(7) * 2
    ids = rng.integers(7, size=(2, 5, 1))

    def total(logits):
        return chance_by_rank(logits, jnp.asarray(vocab), jnp.asarray(vocab[ids]), rank, 0.5)

    found, slope = total(logits), jax.grad(lambda x: total(x).sum())(jnp.asarray(logits))
    for at in np.ndindex(ids.shape):
        others = [i for i in np.argsort(-logits[at]) if i != ids[at]]
        gap = logits[at][ids[at]] - logits[at][others[rank - 1]]
        want = 1 / (1 + np.exp(-gap / 0.5))
        assert float(found[at]) == pytest.approx(want, rel=1e-5)
        assert (float(found[at]) > 0.5) == (ids[at] in np.argsort(-logits[at])[:rank])
        slopes = np.zeros(7)
        slopes[ids[at]], slopes[others[rank - 1]] = 1, -1
        np.testing.assert_allclose(slope[at], slopes * want * (1 - want) / 0.5, atol=1e-6)
    outside = jnp.ones_like(jnp.asarray(ids))  # an id that the draft vocabulary has not
    assert not chance_by_rank(jnp.asarray(logits), jnp.asarray(vocab), outside, rank, 0.5).any()


def test_windows_are_rewarded_by_rank(chain, drafter, letters, batch):
    """With a hard border the accepted length counts tokens among the three likeliest, by hand."""
    objective = Expected(4, K, kl_weight=0.0, reward="length", rank=3, softness=1e-3)
    ((loss, metrics), _), signal = value(chain, drafter, objective, batch)
    lengths = []
    for b, a in np.argwhere(np.asarray(signal.weights["inside"])[:, :, 0, 0] > 0):
        t, k = int(signal.anchors[b, a]), 0
        while k < K and t + 2 + k < T and batch["assistant"][b, t + 2 + k]:
            drafted = letters[np.argsort(-drafter[2][batch["tokens"][b, t + 1 + k]])[:3]]
            if batch["tokens"][b, t + 2 + k] not in drafted:
                break
            k += 1
        lengths.append(k)
    assert 0 < np.mean(lengths) < K
    assert float(metrics["accepted"]) == pytest.approx(np.mean(lengths), rel=1e-4)
    assert float(loss) == pytest.approx(-np.mean(lengths), rel=1e-4)


def test_a_rank_that_cannot_be():
    with pytest.raises(ConfigError, match="rank: found 2, expected 0 above temperature 0"):
        Expected(rank=2, temperature=1.0)
    with pytest.raises(ConfigError, match="rank: found 8, expected less than the draft vocabulary of 8"):
        Expected(rank=8).check(8)


def test_smoothing_lets_tokens_behind_a_refusal_teach():
    """Where the first token is surely refused: d E[R] / d chance of the second, by hand."""
    ones = jnp.ones((1, 1, 1, 2))
    weights = {"inside": ones, "gain": ones * jnp.array([1.0, 2.0]), "least": ones[..., :1] / 4, "kl": ones}
    signal = Signal(None, None, weights)

    def reward(chance, smoothing):
        stats = {"chance": chance, "kl": jnp.zeros((1, 1, 1, 2))}
        loss, _ = Expected(1, 2, smoothing=smoothing).loss(stats, signal, {})
        return -loss

    refused = jnp.array([0.0, 0.3]).reshape(1, 1, 1, 2)
    for smoothing, slope in ((0.0, 0.0), (0.5, 2.0 * 0.5 * 0.5)):
        found = jax.grad(reward)(refused, smoothing)[0, 0, 0, 1]
        assert float(found) == pytest.approx(slope)
    smooth = 0.25 + 0.5 + 2.0 * 0.5 * (0.5 * 0.3 + 0.5)  # with R(0), 1/4
    assert float(reward(refused, 0.5)) == pytest.approx(smooth)


@pytest.mark.parametrize("positions", ["all", "reached"])
def test_the_kl_is_taken_where_the_key_says(chain, drafter, letters, batch, positions):
    objective = Expected(4, K, kl_weight=0.5, reward_weight=0.0, kl_positions=positions, kl_decay=0.8)
    ((loss, metrics), _), signal = value(chain, drafter, objective, batch)
    p = chain.probs[:, letters] / chain.probs[:, letters].sum(-1, keepdims=True)
    kl = (p * np.log(p / drafter[2])).sum(-1)
    totals, counts = np.zeros(K), np.zeros(K)
    for b, a in np.ndindex(signal.anchors.shape):
        t, reach = int(signal.anchors[b, a]), 1.0
        for j in range(K):
            if np.asarray(signal.weights["inside"])[b, a, 0, j] > 0:
                before, token = batch["tokens"][b, t + 1 + j], batch["tokens"][b, t + 2 + j]
                weight = reach if positions == "reached" else 1.0
                totals[j] += weight * kl[before]
                counts[j] += weight
                reach *= drafter[2][before, letters == token].sum()
    want = (
        (totals / counts * 0.8 ** np.arange(K)).sum() if positions == "all" else totals.sum() / counts.sum()
    )
    assert float(metrics["kl"]) == pytest.approx(want, rel=1e-4)
    assert float(loss) == pytest.approx(0.5 * want, rel=1e-4)


@pytest.mark.slow
def test_the_gradient_of_sampled_windows_converges_to_that_of_the_closed_form(chain, drafter, batch):
    """No clip, first step, centred advantages. The error falls as one over the root of the samples: 16 times
    as many windows, a quarter of it; the estimates of several keys are averaged, so that the ratio is
    steady."""
    about = (chain, drafter[0], drafter[1].params, drafter[1].vocab)
    exact = Expected(14, K, kl_weight=0.0)
    (_, want), signal = value(chain, drafter, exact, batch)
    real = int((np.asarray(signal.weights["inside"])[:, :, 0, 0] > 0).sum())
    errors = {}
    for group in (16, 256):
        sampled = small_ppow(
            anchors=14,
            group=group,
            window=K,
            advantage="centred",
            kl_weight=0.0,
            proximity_weight=0.0,
            clip=1e9,
        )
        found = []
        for number in range(12):
            rollout, verified = run(*about, sampled, batch, jax.random.key(number))
            taught, _ = judge(sampled, batch, rollout, verified)
            args = (chain.target, drafter[0], sampled, chain.params, drafter[1], batch, taught)
            _, grads = differentiate(*args)
            tokens = 1 / float(taught.weights["policy"].max())  # that the mean is taken over
            scale = tokens / (real * (group - 1))  # a centred group of G is worth G - 1 windows
            off = jax.tree.map(lambda g, w, scale=scale: g * scale - w, grads, want)
            found.append(norm(off) / norm(want))
        errors[group] = np.sqrt(np.mean(np.square(found)))
    assert errors[256] < 0.2
    assert 3 < errors[16] / errors[256] < 5.5, errors


def test_it_learns_what_the_target_accepts(chain, letters, batch):
    """From a drafter that knows nothing, by the reward alone: the head becomes a table of the greedy text."""
    made = (*chain.drafter(np.full((small.markov.SIZE, 5), 0.2), letters), None)
    only = {k: v & np.isin(batch["tokens"], letters) if k == "assistant" else v for k, v in batch.items()}
    objective = Expected(14, 1, kl_weight=0.0)
    params, rewards = made[1].params, []
    for _ in range(30):
        weights = made[1]._replace(params=params)
        ((_, metrics), grads), _ = value(chain, (made[0], weights), objective, only)
        rewards.append(float(metrics["accepted"]))
        step = jax.tree.map(lambda p, g: p - 30.0 * g, params["head"], grads["head"])
        params = params | {"head": step}
    assert rewards[0] == pytest.approx(0.2, abs=1e-3)
    assert rewards[-1] > 0.9 and all(np.diff(rewards) > -1e-3)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_window_ends_where_the_target_stops_writing(chain, drafter, batch):
    """Behind a gap that somebody else wrote nothing is accepted, though the target writes there again."""
    batch = batch | {"assistant": batch["assistant"].copy()}
    batch["assistant"][0, 8] = False
    signal = signal_of(chain, drafter, Expected(T - 2, K), batch)
    inside = np.asarray(signal.weights["inside"])[0, :, 0] > 0
    for anchor, found in zip(np.asarray(signal.anchors)[0].tolist(), inside, strict=True):
        steps = anchor + 2 + np.arange(K)
        assert found.tolist() == ((steps < 8) | (anchor + 2 > 8) & (steps < T)).tolist() or not found.any()
    assert inside.sum(1).min() < K


def test_where_the_kl_is_taken_is_not_learnt(chain, drafter, batch):
    """The chance that a context is accepted weighs the KL, and no gradient goes through it."""
    objective = Expected(4, K, kl_positions="reached", kl_weight=1.0, reward_weight=0.0)
    signal = signal_of(chain, drafter, objective, batch)
    stats = {"chance": jnp.full(signal.weights["kl"].shape, 0.5), "kl": jnp.ones(signal.weights["kl"].shape)}
    loss = lambda stats: objective.loss(stats, signal, {"reached": jnp.float32(1.0)})[0]  # noqa: E731
    gradient = jax.grad(loss)(stats)
    assert not np.asarray(gradient["chance"]).any()
    assert np.asarray(gradient["kl"]).any()
