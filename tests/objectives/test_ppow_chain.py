"""One PPOW step on the Markov chain, whose distributions are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from phases import KEY, NEVER, batch_of, gradient_of, judge, norm, run, small_ppow

from ppow_jax.objectives.rollout import draw
from ppow_jax.training.step import Recipe, make_update

T = 20  # positions


def few_letters(chain) -> np.ndarray:
    """Five letters, each the likeliest after the one before."""
    found = [9]
    while len(found) < 5:
        found.append(int(chain.probs[found[-1]].argmax()))
    return np.sort(found).astype(np.int32)


def greedy_text(chain, rows: int) -> dict[str, np.ndarray]:
    tokens = np.zeros((rows, T), np.int32)
    tokens[:, 0] = 4 + np.arange(rows)
    for at in range(1, T):
        tokens[:, at] = chain.probs.argmax(-1)[tokens[:, at - 1]]
    return batch_of(tokens, [T] * (rows - 1) + [T - 5])


LETTERS = np.arange(4, small.markov.SIZE, dtype=np.int32)


def test_greedy_acceptance_is_that_of_a_loop_over_texts(chain):
    batch = greedy_text(chain, 3)
    drafter, weights = chain.drafter(chain.probs[:, LETTERS], LETTERS)
    settings = small_ppow(group=16, anchors=14, window=4, proximity_weight=0.0)
    rollout, verified = run(chain, drafter, weights.params, weights.vocab, settings, batch)
    assert (~np.asarray(rollout.real)).any()
    want = np.zeros(verified.accepted.shape, int)
    for b, a, g in np.ndindex(want.shape):
        t = int(rollout.anchors[b, a]) + 2
        for j, token in enumerate(np.asarray(rollout.tokens[b, a, g])):
            end = T - (5 if b == 2 else 0)
            if not rollout.real[b, a] or t + j >= end or batch["tokens"][b, t + j] != token:
                break
            want[b, a, g] += 1
    assert set(want.ravel()) == {0, 1, 2, 3, 4}
    assert (np.asarray(verified.accepted) == want).all()


@pytest.mark.parametrize(
    ("temperature", "rollout_temperature", "stop"), [(1.0, 1.0, False), (0.6, 1.4, True)]
)
def test_sampled_acceptance_is_that_of_enumerating_every_window(
    chain, temperature, rollout_temperature, stop
):
    """Five letters, three steps: 125 windows, each with its probability and its chances."""
    vocab, K, group = few_letters(chain), 3, 256
    rng = np.random.default_rng(1)
    near = chain.probs[:, vocab] / chain.probs[:, vocab].sum(-1, keepdims=True)
    probs = 0.5 * near + 0.5 * rng.dirichlet(np.ones(5), size=small.markov.SIZE)
    drafter, weights = chain.drafter(probs, vocab)
    stops = (int(vocab[2]),) if stop else NEVER
    settings = small_ppow(group=group, temperature=temperature, rollout_temperature=rollout_temperature)
    batch = greedy_text(chain, 4)
    rollout, verified = run(chain, drafter, weights.params, weights.vocab, settings, batch, stops=stops)
    q = probs ** (1 / rollout_temperature)
    q /= q.sum(-1, keepdims=True)
    p = chain.probs ** (1 / temperature)
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
        seen = np.bincount(np.asarray(verified.accepted[b, a]), minlength=K + 1) / group
        assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / group) + 1e-6).all(), (b, a)


def test_a_group_without_spread_gives_no_policy_gradient(chain):
    """A drafter that is sure draws the same window every time; one that is not learns."""
    settings = small_ppow(group=8, kl_weight=0.0)
    batch = greedy_text(chain, 3)
    sure = np.full((small.markov.SIZE, len(LETTERS)), 1e-9)
    sure[:, 3] = 1.0
    norms, shares = [], []
    for probs in (sure, chain.probs[:, LETTERS]):
        drafter, weights = chain.drafter(probs, LETTERS)
        rollout, verified = run(chain, drafter, weights.params, weights.vocab, settings, batch)
        signal, metrics = judge(settings, batch, rollout, verified)
        _, grads = gradient_of(chain, drafter, weights, settings, batch, signal)
        norms.append(norm(grads))
        shares.append(float(metrics["share_without_spread"]))
    assert norms[0] == 0
    assert norms[1] > 0.01
    assert shares[0] == 1
    assert shares[1] < 1


def test_the_kl_of_a_drafter_that_is_the_target_is_zero_and_flat(chain):
    settings = small_ppow(kl_weight=1.0, temperature=1.0)
    batch = greedy_text(chain, 3)
    flat = np.full((small.markov.SIZE, len(LETTERS)), 1 / len(LETTERS))
    found = []
    for probs in (chain.probs[:, LETTERS], flat):
        drafter, weights = chain.drafter(probs, LETTERS)
        rollout, verified = run(chain, drafter, weights.params, weights.vocab, settings, batch)
        signal, _ = judge(settings, batch, rollout, verified)
        quiet = signal.extra._replace(advantage=jnp.zeros_like(signal.extra.advantage))
        quiet = signal._replace(extra=quiet)
        (_, metrics), grads = gradient_of(chain, drafter, weights, settings, batch, quiet)
        found.append((float(metrics["kl"]), norm(grads["head"])))
    assert found[0][0] < 1e-4
    assert found[0][1] < 1e-3
    assert found[1][0] > 0.5
    assert found[1][1] > 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reinforcement_alone_finds_what_the_target_accepts(chain, temperature):
    """A bandit: the drafter knows nothing, each window is one pull, the reward the only guide."""
    settings = small_ppow(
        temperature=temperature, window=1, group=8, anchors=8, kl_weight=0.0, proximity_weight=0.0, updates=2
    )
    vocab = few_letters(chain)
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, 5), 0.2), vocab)
    batch = greedy_text(chain, 8)
    batch["assistant"] &= np.isin(batch["tokens"], vocab)  # only where it can be right
    others = {name: name != "head" for name in weights.params}
    optimizer = optax.chain(
        optax.adam(0.05), optax.masked(optax.set_to_zero(), others)
    )  # a table of distributions
    learner = {"params": jax.tree.map(jnp.copy, weights.params), "opt_state": optimizer.init(weights.params)}
    update = make_update(Recipe(settings, chain.target, drafter, optimizer))
    accepted = []
    for number in range(25):
        key = jax.random.fold_in(KEY, number)
        rollout, verified = run(chain, drafter, learner["params"], weights.vocab, settings, batch, key)
        signal, metrics = judge(settings, batch, rollout, verified)
        learner, _ = update(learner, weights.vocab, chain.params, batch, signal)
        accepted.append(float(metrics["accepted"]))
    assert accepted[0] < 0.35
    best = (
        1.0 if temperature == 0 else 0.75
    )  # about what the target's distribution gives the likeliest letter
    assert np.mean(accepted[-5:]) > best - 0.1, accepted


def test_a_group_drafted_as_one_accepts_by_the_same_distribution(chain):
    """k of each anchor against the drafter's own distribution along the text; 512 windows."""
    group, K = 512, 3
    vocab = few_letters(chain)
    rng = np.random.default_rng(1)
    probs = rng.dirichlet(np.ones(5), size=small.markov.SIZE)
    drafter, weights = chain.drafter(probs, vocab)
    settings = small_ppow(group=group, window=K, proximity_weight=0.0)
    assert settings.along_text
    batch = greedy_text(chain, 4)
    rollout, verified = run(chain, drafter, weights.params, weights.vocab, settings, batch)
    some = 0
    for b, a in np.argwhere(np.asarray(rollout.real)):
        t = int(rollout.anchors[b, a])
        end = T - (5 if b == 3 else 0)
        reach = [1.0]
        for j in range(K):
            before, token = batch["tokens"][b, [t + 1 + j, min(t + 2 + j, T - 1)]]
            chance = probs[before, vocab == token].sum() if t + 2 + j < end else 0.0
            reach.append(reach[-1] * chance)
        want = np.array(reach) - np.append(reach[1:], 0.0)
        seen = np.bincount(np.asarray(verified.accepted[b, a]), minlength=K + 1) / group
        assert (np.abs(seen - want) <= 5 * np.sqrt(want * (1 - want) / group) + 1e-6).all(), (b, a)
        some += want[1:].sum() > 0
    assert some > 2


@pytest.mark.parametrize("shared", [True, False])
def test_drawn_tokens_follow_their_distributions(shared):
    """Impossible tokens at either end and in between; each count within 5 sigma."""
    probs = np.array([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    logp = jnp.asarray(np.log(np.maximum(probs, 1e-38)), jnp.float32).at[probs == 0].set(-jnp.inf)
    group = 4000
    rows = jnp.broadcast_to(logp, (2, 3, 1 if shared else group, 6))
    ids = np.asarray(draw(jax.random.uniform(KEY, (2, 3, group)), rows))
    assert ids.shape == (2, 3, group)
    for drawn in ids.reshape(-1, group):
        seen = np.bincount(drawn, minlength=6)
        assert (np.abs(seen - group * probs) <= 5 * np.sqrt(group * probs * (1 - probs))).all()
    assert len(np.unique(ids.reshape(-1, group), axis=0)) == 6
