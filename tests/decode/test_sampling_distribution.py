"""Sampled drafts change nothing: every random outcome is summed over, and the sum is the target's
distribution.

A vocabulary of 4, of which the drafter knows 3 or all; distributions that depend on all tokens before, some
of them 0.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.decode import shapes, verify
from ppow_jax.decode.sampling import Sampling, log_probs, pick
from ppow_jax.decode.verify import Draft, Drawn

V = 4
SHAPES = {
    "chain of 1": shapes.chain(1),
    "chain of 3": shapes.chain(3),
    "group of 2 windows of 2": shapes.group(2, 2),
    "three siblings": shapes.group(3, 1),
    "more siblings than tokens": shapes.group(5, 1),
    "tree": shapes.tree_of([(0, 0), (0, 1), (1,)]),
    "deep tree": shapes.tree_of([(0, 0, 0), (1, 0)]),
}


class Laws:
    """Target's and drafter's distribution after every prefix of at most three tokens."""

    def __init__(self, seed: int, vocab: list[int]) -> None:
        rng = np.random.default_rng(seed)
        self.vocab = np.array(vocab)
        self.target, self.drafter = {}, {}
        for prefix in itertools.chain(*(itertools.product(range(V), repeat=n) for n in range(4))):
            p, q = rng.dirichlet(np.ones(V) * 0.7), rng.dirichlet(np.ones(len(vocab)) * 0.7)
            if rng.random() < 0.4:
                p[rng.integers(V)] = 0
            if rng.random() < 0.4:
                q[rng.integers(len(vocab))] = 0
            if rng.random() < 0.2:  # the drafter is right
                p = np.zeros(V)
                p[self.vocab] = q
            self.target[prefix], self.drafter[prefix] = p / p.sum(), q / q.sum()


def orders(probs_N: np.ndarray, count: int, again: bool) -> dict[tuple[int, ...], float]:
    """Ordered draws with their probabilities, without replacement (or with, `again`); when nothing is left
    that can be drawn, the lowest of the others follow, as in a sort of -inf."""
    found = {(): 1.0}
    for _ in range(count):
        longer = {}
        for drawn, chance in found.items():
            left = probs_N if again else np.where(np.isin(np.arange(len(probs_N)), drawn), 0, probs_N)
            if left.sum() == 0:
                rest = [n for n in range(len(probs_N)) if n not in drawn] or [0]
                longer[(*drawn, rest[0])] = longer.get((*drawn, rest[0]), 0) + chance
                continue
            for n in np.flatnonzero(left):
                longer[(*drawn, int(n))] = chance * left[n] / left.sum()
        found = longer
    return found


def drafts(shape: shapes.Fixed, all_probs: Laws, again: bool) -> list[tuple[float, list[int], np.ndarray]]:
    """Every filling of a tree: its probability, draft ids of the nodes, the drafter's distributions."""
    found = [(1.0, [0], np.zeros((shape.tokens, len(all_probs.vocab))))]
    paths = ((), *shape.paths)
    for node in range(shape.tokens):
        below = [n for n in shape.children[node] if n >= 0]
        if not below:
            continue
        longer = []
        for chance, ids, probs in found:
            chain = [paths.index(paths[node][:n]) for n in range(1, len(paths[node]) + 1)]
            q = all_probs.drafter[tuple(int(all_probs.vocab[ids[n]]) for n in chain)]
            here = probs.copy()
            here[node] = q
            for drawn, p in orders(q, len(below), again).items():
                longer.append((chance * p, [*ids, *drawn], here))
        found = longer
    return found


def emitted_distribution(shape: shapes.Fixed, all_probs: Laws, again: bool) -> dict[tuple[int, ...], float]:
    """Probability of every text of depth + 1 tokens: a round's, then the target's own.

    All fillings of the tree times all choices along the walk, in one call of the code under test.
    """
    E = shape.depth + 1
    fillings = drafts(shape, all_probs, again)
    scripts = np.array(list(itertools.product(range(V), repeat=E)))
    which, script = (x.ravel() for x in np.mgrid[: len(fillings), : len(scripts)])
    tokens = all_probs.vocab[np.array([ids for _, ids, _ in fillings])][which]
    parents = np.broadcast_to(np.array(shape.parents), tokens.shape)
    with np.errstate(divide="ignore"):
        log_q = np.log(np.array([q for _, _, q in fillings]))[which]
    drawn = Drawn(log_q, jnp.arange(shape.tokens), jnp.array(shape.children), jnp.array(all_probs.vocab))
    draft = Draft(jnp.array(tokens), jnp.array(parents), drawn)
    choices = jnp.array(scripts[script])
    choose = lambda step, node: jnp.take(choices, step, axis=1)  # noqa: E731
    way = jax.tree.map(np.asarray, verify.walk(draft, shape.depth, jnp.ones(len(which), bool), choose))
    # each choice is made once: what comes after the walk's end is held at 0
    used = np.arange(E) <= way.accepted[:, None]
    real = (np.asarray(choices) * ~used == 0).all(1)
    chance = np.array([p for p, _, _ in fillings])[which]
    for step in range(E):
        before = np.array([all_probs.target[tuple(t)] for t in way.tokens[:, :step].tolist()])
        probs = after(draft, way.nodes[:, step], before)
        chance = chance * np.where(used[:, step], probs[np.arange(len(probs)), way.tokens[:, step]], 1)
    out: dict[tuple[int, ...], float] = dict.fromkeys(itertools.product(range(V), repeat=E), 0.0)
    for row in np.flatnonzero(real & (chance > 0)):
        text = tuple(way.tokens[row, : way.accepted[row] + 1].tolist())
        for rest in itertools.product(range(V), repeat=E - len(text)):
            whole = text + rest
            own = [all_probs.target[whole[:n]][whole[n]] for n in range(len(text), E)]
            out[whole] += chance[row] * np.prod(own)
    return out


@jax.jit
def after(draft: Draft, node_B: jax.Array, target_BxV: jax.Array) -> jax.Array:
    """The code's distribution of the token after a node."""
    offered = verify.offered_after(draft.drawn, draft.tokens, node_B, V)
    return jax.vmap(verify.emission_probs)(jnp.asarray(target_BxV, jnp.float32), *offered)


@pytest.mark.parametrize("again", [False, True], ids=["without replacement", "with replacement: duplicates"])
@pytest.mark.parametrize("vocab", [[0, 1, 2, 3], [0, 2, 3]], ids=["all tokens", "one it cannot draft"])
@pytest.mark.parametrize("name", SHAPES)
def test_summed_over_every_random_outcome_the_emitted_distribution_is_the_targets(name, vocab, again):
    shape, all_probs = SHAPES[name], Laws(3, vocab)
    found = emitted_distribution(shape, all_probs, again)
    for text, chance in found.items():
        own = np.prod([all_probs.target[text[:n]][text[n]] for n in range(len(text))])
        assert abs(chance - own) < 1e-6, text


def test_a_candidate_is_accepted_as_often_as_the_distributions_overlap():
    p, q = jnp.array([0.5, 0.2, 0.3, 0.0]), jnp.array([0.1, 0.6, 0.1, 0.2])
    probs = verify.emission_probs(p, q, jnp.array([1]))
    # kept with 0.2 / 0.6; else one of what P has more than Q: 0.4 and 0.2
    np.testing.assert_allclose(probs, [2 / 3 * 2 / 3, 1 / 3, 2 / 3 / 3, 0], atol=1e-6)
    probs = verify.emission_probs(p, q, jnp.array([1, 0]))
    # the second was drawn from (0.1, 0, 0.1, 0.2) / 0.4 and 2/3 is more than 1/4
    np.testing.assert_allclose(probs, [2 / 3, 1 / 3, 0, 0], atol=1e-6)


def test_a_drafter_that_is_exactly_right_is_never_refused():
    p = jnp.array([0.5, 0.2, 0.3, 0.0])
    for token in range(3):
        np.testing.assert_allclose(verify.emission_probs(p, p, jnp.array([token, 3])), np.eye(4)[token])


@pytest.mark.parametrize("top_k", [0, 1, 3, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [1.0, 0.4, 2.0])
def test_the_distribution_is_that_of_a_sorted_vocabulary(temperature, top_k, top_p):
    logits = np.random.default_rng(5).normal(size=(3, 40)).astype(np.float32) * 2
    found = np.exp(np.asarray(log_probs(logits, Sampling(temperature, top_k, top_p))))
    for row, z in zip(found, logits / np.float32(temperature), strict=True):
        order = np.argsort(-z)
        kept = order[: top_k or len(z)]
        p = np.exp(z[kept] - z.max())
        before = np.cumsum(p / p.sum()) - p / p.sum()
        kept = kept[before < top_p]
        want = np.zeros(len(z))
        want[kept] = np.exp(z[kept] - z.max())
        np.testing.assert_allclose(row, want / want.sum(), atol=1e-6)


def test_tokens_as_likely_as_the_last_that_remains_remain():
    probs = np.exp(log_probs(jnp.array([0.0, 1.0, 0.0, 0.0, -jnp.inf]), Sampling(1.0, top_k=2)))
    assert (probs > 0).tolist() == [True, True, True, True, False]
    probs = np.exp(log_probs(jnp.log(jnp.array([0.25, 0.5, 0.25])), Sampling(1.0, top_p=0.6)))
    np.testing.assert_allclose(probs, [0.25, 0.5, 0.25], rtol=1e-6)


def test_samples_follow_the_distribution_and_temperature_0_takes_the_first_of_the_likeliest():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.4, 0.1]))
    keys = jax.random.split(jax.random.key(0), 20_000)
    rows = jnp.broadcast_to(logits, (len(keys), 4))
    counts = np.bincount(pick(keys, rows, Sampling(0.5)), minlength=4)
    probs = np.array([1, 16, 16, 1]) / 34
    chi2 = ((counts - probs * len(keys)) ** 2 / (probs * len(keys))).sum()
    assert chi2 < 16.3  # three degrees of freedom: once in a thousand
    assert pick(keys[:2], rows[:2], Sampling()).tolist() == [1, 1]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match="expected temperature"):
        Sampling(**wrong)
