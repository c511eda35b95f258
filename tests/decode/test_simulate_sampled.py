"""Simulation along texts that the target sampled has the law of speculative sampling: enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.decode.sampling import Sampling
from ppow_jax.decode.shapes import chain as chain_of
from ppow_jax.decode.shapes import parse
from ppow_jax.decode.simulate import Sampled, expected_accepted, sampled_texts, simulate

PROMPT, K, LEVELS = [9, 4], 2, 14
SAMPLING = Sampling(0.8, top_k=5)


@pytest.fixture(scope="module")
def law(chain):
    """P and q as sampled: `[V, V]` each, q over all ids."""
    letters = np.sort(chain.probs.mean(0).argsort()[-8:]).astype(np.int32)
    letters = np.union1d(letters, chain.probs[4].argsort()[-4:]).astype(np.int32)
    drafted = np.random.default_rng(5).dirichlet(np.ones(len(letters)), size=small.markov.SIZE)
    drafted = 0.5 * drafted + 0.5 * chain.probs[:, letters] / chain.probs[:, letters].sum(1, keepdims=True)
    drafter, weights = chain.drafter(drafted, letters)
    q = np.zeros_like(chain.probs)
    q[:, letters] = drafted
    p, q = (np.where(x >= np.sort(x)[:, -5:-4], x, 0) ** (1 / 0.8) for x in (chain.probs, q))
    return drafter, weights, p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def every(chain, law):
    """Every text of three tokens behind the prompt that the target may sample, and its probability."""
    p, V = law[2], range(small.markov.SIZE)
    answers = [(4, *pair) for pair in itertools.product(V, V) if p[4, pair[0]] * p[pair] > 0]
    tokens = np.array([[*PROMPT, *answer] for answer in answers], np.int32)
    weight = p[4, tokens[:, 3]] * p[tokens[:, 3], tokens[:, 4]]
    assert weight.sum() == pytest.approx(1.0, abs=1e-5)
    out, _ = small.forward(chain.target, chain.params, tokens)
    return tokens, weight, out.taps[:, 0], out.hidden[:, 0]


def overlap(law, before: int) -> np.ndarray:
    return np.minimum(law[2][before], law[3][before])


def accepted_at_least(law) -> tuple[float, float]:
    """Probability that one token, and that two, of a window after the token 4 are accepted."""
    first = overlap(law, 4)
    return first.sum(), sum(first[x] * overlap(law, x).sum() for x in range(small.markov.SIZE))


def test_the_mean_over_texts_is_the_chance_that_drafts_are_accepted(chain, law, every):
    drafter, weights, *_ = law
    tokens, weight, taps, hidden = every
    sampled = sampled_texts(chain.target, chain.params, hidden, tokens, SAMPLING, jax.random.key(0))
    np.testing.assert_allclose(np.exp(sampled.log_prob[:, 3:]).prod(-1), weight, rtol=1e-4)
    end, anchors = np.full(len(tokens), 5), np.ones((len(tokens), 1), np.int32)
    about = (drafter, weights, taps, tokens, end, anchors, K, sampled.log_prob, SAMPLING)
    found = float((weight * expected_accepted(*about)[:, 0]).sum())
    assert found == pytest.approx(sum(accepted_at_least(law)), rel=1e-4)
    assert 0.1 < found < 1.5


def test_rounds_have_the_law_of_speculative_sampling(chain, law, every):
    """Every text with a grid of draws: the share of windows that are accepted so far."""
    drafter, weights, *_ = law
    tokens, weight, taps, hidden = every
    sampled = sampled_texts(chain.target, chain.params, hidden, tokens, SAMPLING, jax.random.key(0))
    grid = np.repeat((np.arange(LEVELS) + 0.5) / LEVELS, LEVELS).reshape(LEVELS, LEVELS)
    draws = np.stack([grid, grid.T], -1).reshape(-1, 2)
    rows = np.repeat(np.arange(len(tokens)), len(draws))
    uniform = np.zeros((len(rows), 5), np.float32)
    uniform[:, 3:] = np.tile(draws, (len(tokens), 1))
    start, end = np.full((2, len(rows)), [[2], [5]])
    about = (chain_of(K), Sampled(sampled.log_prob[rows], uniform), SAMPLING)
    rounds = simulate(drafter, weights, taps[rows], tokens[rows], start, end, *about)
    first = np.asarray(rounds.accepted[:, 0])
    shares = np.array([weight[rows[first == k]].sum() for k in range(K + 1)]) / len(draws)
    one, two = accepted_at_least(law)
    assert shares == pytest.approx([1 - one, one - two, two], abs=0.5 / LEVELS)
    assert shares.min() > 0.1


def test_a_refused_window_begins_again_behind_the_targets_token(chain, law, every):
    drafter, weights, *_ = law
    tokens, _, taps, hidden = every
    sampled = sampled_texts(chain.target, chain.params, hidden, tokens, SAMPLING, jax.random.key(0))
    never = Sampled(sampled.log_prob, jnp.full(tokens.shape, jnp.inf))
    start, end = np.full((2, len(tokens)), [[2], [5]])
    rounds = simulate(drafter, weights, taps, tokens, start, end, chain_of(K), never, SAMPLING)
    assert (np.asarray(rounds.emitted)[:, :3] == [1, 1, 0]).all()
    assert (np.asarray(rounds.accepted)[:, :3] == [0, 0, -1]).all()


def test_trees_are_refused(law, every):
    drafter, weights, *_ = law
    tokens, _, taps, _ = every
    sampled, end = Sampled(jnp.zeros(tokens.shape), jnp.zeros(tokens.shape)), np.full(len(tokens), 5)
    with pytest.raises(ValueError, match="for sampled texts, expected a chain"):
        simulate(drafter, weights, taps, tokens, end - 3, end, parse("tree:4x2x2"), sampled, SAMPLING)
