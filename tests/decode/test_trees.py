"""Draft trees: what they hold, the way through them, and the text, which they never change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.decode import profile, shapes, tree, verify
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.decode.sampling import GREEDY, Sampling
from ppow_jax.decode.simulate import simulate
from ppow_jax.decode.verify import Draft
from ppow_jax.drafters.windows import text_prefix, text_starts
from ppow_jax.errors import ConfigError

PROMPTS, L, NEVER, LETTERS = small.PROMPTS, small.L, small.NEVER, small.LETTERS
SHAPES = {
    "chain": shapes.chain(3),
    "group": shapes.group(3, 2),
    "fixed": shapes.tree_of([(0, 0, 1), (0, 1, 0), (1, 0), (2,)]),
    "dynamic": shapes.Dynamic(tokens=9, depth=3, top_k=3),
    "dynamic, all nodes": shapes.Dynamic(tokens=22, depth=3, top_k=3),
    "dynamic, width 1": shapes.Dynamic(tokens=4, depth=3, top_k=1),
    "dynamic, as many tokens as a chain": shapes.Dynamic(tokens=4, depth=3, top_k=3),
    "dynamic, fewer tokens than levels": shapes.Dynamic(tokens=3, depth=4, top_k=1),
}


def profile_texts(pair, texts) -> profile.Texts:
    tokens = np.zeros((len(texts), 8 + L), np.int32)
    for row, prompt, text in zip(tokens, PROMPTS, texts, strict=True):
        row[: len(prompt + text)] = prompt + text
    start = np.array([len(p) for p in PROMPTS], np.int32)
    end = start + np.array([len(t) for t in texts], np.int32)
    return profile.Texts(small.forward(pair.target, pair.params, tokens)[0].taps[:, 0], tokens, start, end)


def simulated(pair, drafter, weights, texts, shape) -> list[list[int]]:
    rounds = simulate(drafter, weights, *profile_texts(pair, texts), shape)
    return [row[row > 0].tolist() for row in np.asarray(rounds.emitted)]


@pytest.mark.parametrize("name", SHAPES)
def test_drafted_text_is_the_targets_own_and_simulation_counts_the_same_rounds(tiny, texts, pupil, name):
    shape = SHAPES[name]
    out = small.generate(tiny, PROMPTS, DecodeConfig(L, NEVER), Eagle(tiny.drafter, shape), pupil)
    assert out.tokens.tolist() == texts
    decoded = [small.rounds_of(out, row) for row in range(len(PROMPTS))]
    assert simulated(tiny, tiny.drafter, pupil, texts, shape) == decoded
    assert max(map(max, decoded)) > 2


def test_a_dynamic_tree_of_width_1_is_the_chain(tiny, texts, pupil):
    counts = [
        simulated(tiny, tiny.drafter, pupil, texts, shape)
        for shape in (shapes.chain(3), shapes.Dynamic(4, 3, 1))
    ]
    assert counts[0] == counts[1]


def test_wider_trees_accept_more(tiny, texts, pupil):
    rounds = [
        sum(map(len, simulated(tiny, tiny.drafter, pupil, texts, shape)))
        for shape in (shapes.chain(3), shapes.group(3, 3), shapes.Dynamic(22, 3, 3))
    ]
    assert rounds[0] > rounds[1] > rounds[2]


def test_what_lies_beyond_a_text_is_not_accepted(tiny, texts, pupil):
    """The target would have gone on so, but the text was cut."""
    whole = profile_texts(tiny, texts)
    rounds = simulate(tiny.drafter, pupil, *whole._replace(end=whole.end - 3), SHAPES["dynamic, all nodes"])
    emitted, accepted = np.asarray(rounds.emitted), np.asarray(rounds.accepted)
    live = emitted > 0
    assert emitted.sum(1).tolist() == [L - 4] * len(PROMPTS)
    assert (accepted <= rounds.offered)[live].all() and (accepted[~live] == -1).all()
    left = (whole.end - 3 - whole.start - 1)[:, None] - np.cumsum(emitted, 1) + emitted
    assert (np.asarray(rounds.offered) == np.where(live, np.minimum(3, left), 0)).all()


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_profile_tells_the_rounds_of_every_smaller_tree(tiny, texts, pupil, top_k):
    texts_, levels = profile_texts(tiny, texts), 3
    found = profile.measure(tiny.drafter, pupil, texts_, levels, top_k)
    nodes = lambda depth: 1 + top_k + (depth - 1) * top_k**2  # noqa: E731
    seen = set()
    for depth in range(1, levels + 1):
        for tokens in sorted({depth + 1, min(7, nodes(depth)), nodes(depth)}):
            shape = shapes.Dynamic(tokens, depth, top_k)
            emitted = np.asarray(simulate(tiny.drafter, pupil, *texts_, shape).emitted)
            assert found.tau(tokens, depth) == emitted.sum() / (emitted > 0).sum()
            seen.add(found.tau(tokens, depth))
    assert len(seen) > 1
    if top_k == 1:
        emitted = np.asarray(simulate(tiny.drafter, pupil, *texts_, shapes.chain(3)).emitted)
        assert found.tau(4, 3) == emitted.sum() / (emitted > 0).sum()


@pytest.fixture(scope="module")
def guesses(chain):
    """A drafter of the chain with a known distribution, and what it drafts after each letter."""
    probs = np.random.default_rng(8).dirichlet(np.ones(len(LETTERS)) * 0.3, small.markov.SIZE) + 1e-9
    probs /= probs.sum(-1, keepdims=True)
    drafter, weights = chain.drafter(probs, LETTERS)
    return probs, drafter, weights


def drafted(chain, drafter, weights, letters, shape, how=GREEDY, seed=0) -> Draft:
    """A tree after each of some letters."""
    texts = np.stack([np.full(len(letters), 7), np.array(letters), np.zeros(len(letters), int)], 1)
    taps = small.forward(chain.target, chain.params, texts)[0].taps[:, 0]
    keys = jax.random.split(jax.random.key(seed), len(letters))

    @jax.jit
    def run(taps, texts):
        prefix = text_prefix(drafter, weights, taps, texts)
        start = text_starts(prefix, texts, jnp.zeros((len(letters), 1), jnp.int32))
        return tree.draft(drafter, weights, prefix.keys_values, start, shape, how, keys)

    return jax.tree.map(np.asarray, run(taps, jnp.asarray(texts)))


def branches(tokens: np.ndarray, parents: np.ndarray) -> set[tuple[int, ...]]:
    """Every node as the tokens that lead to it from the root."""
    found = []
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        found.append((*(found[parent - 1] if parent else ()), int(token)))
    assert len(set(found)) == len(found)
    return set(found)


@pytest.mark.parametrize(
    ("tokens", "depth", "k"), [(2, 1, 1), (9, 3, 3), (22, 3, 3), (60, 8, 10), (30, 2, 27)]
)
def test_a_dynamic_tree_holds_the_best_of_what_a_beam_finds(chain, guesses, tokens, depth, k):
    probs, drafter, weights = guesses
    draft = drafted(chain, drafter, weights, [5, 9, 30], shapes.Dynamic(tokens, depth, k))
    for row, letter in enumerate([5, 9, 30]):
        beam, nodes = [(0.0, ())], {}
        for _ in range(depth):
            level = {}
            for score, path in beam:
                log_q = np.log(probs[path[-1] if path else letter])
                for n in np.argsort(-log_q)[:k]:
                    level[(*path, int(LETTERS[n]))] = score + log_q[n]
            nodes |= level
            beam = [(s, path) for path, s in sorted(level.items(), key=lambda kv: -kv[1])[:k]]
        best = sorted(nodes, key=lambda path: -nodes[path])[: tokens - 1]
        assert draft.tokens[row, 0] == letter
        assert branches(draft.tokens[row], draft.parents[row]) == set(best)
        assert (draft.parents[row, 1:] < np.arange(1, tokens)).all()


def test_a_fixed_tree_holds_the_tokens_of_its_ranks(chain, guesses):
    probs, drafter, weights = guesses
    paths = [(0, 0, 1), (0, 1, 0), (1, 0), (2,), (4,)]
    draft = drafted(chain, drafter, weights, [5, 9], shapes.tree_of(paths))
    for row, letter in enumerate([5, 9]):
        want = set()
        for path in paths:
            tokens = ()
            for rank in path:
                q = probs[tokens[-1] if tokens else letter]
                tokens += (int(LETTERS[np.argsort(-q)[rank]]),)
                want.add(tokens)
        assert branches(draft.tokens[row], draft.parents[row]) == want


def test_drawn_trees_follow_the_drafters_distribution_without_replacement(chain, guesses):
    """Of 20,000 trees: pairs of siblings, and what follows the second of them."""
    probs, drafter, weights = guesses
    rows, how = 20_000, Sampling(0.7)
    draft = drafted(chain, drafter, weights, [5] * rows, shapes.tree_of([(0,), (1, 0)]), how)
    tempered = probs ** (1 / 0.7)
    tempered /= tempered.sum(-1, keepdims=True)
    first, second, below = (np.searchsorted(LETTERS, draft.tokens[:, n]) for n in (1, 2, 3))
    assert draft.parents[0].tolist() == [0, 0, 0, 2]
    np.testing.assert_allclose(np.exp(draft.drawn.log_probs[0, draft.drawn.row[0]]), tempered[5], atol=1e-5)
    q, N = tempered[5], len(LETTERS)
    pairs = q[:, None] * q / (1 - q)[:, None] * (1 - np.eye(N))
    small.check_counts(np.bincount(first * N + second, minlength=N * N), pairs.ravel())
    small.check_counts(
        np.bincount(second * N + below, minlength=N * N), (pairs.sum(0)[:, None] * tempered[LETTERS]).ravel()
    )
    assert (
        draft.drawn.log_probs[:, draft.drawn.row[2]].argmax(-1) == tempered[LETTERS[second]].argmax(-1)
    ).all()


FLAT, TOP_K, TOP_P = Sampling(1.0), Sampling(0.8, top_k=3), Sampling(1.0, top_p=0.85)
SAMPLED = [("chain", FLAT), ("group", TOP_K), ("fixed", TOP_P)]
SAMPLED += [("dynamic", FLAT), ("dynamic", TOP_K), ("dynamic", TOP_P)]


@pytest.mark.parametrize(("name", "how"), SAMPLED, ids=str)
def test_sampled_text_follows_the_targets_distribution_whatever_is_drafted(chain, name, how):
    """Transitions counted over 256 texts, and those of the first and second token alone."""
    rows, count = 256, 12
    prompts = [[4 + i % 8] for i in range(rows)]
    drafter, weights = small.flawed(chain, (8, 19), np.delete(LETTERS, [2, 11]))
    out = small.generate(
        chain, prompts, DecodeConfig(count, NEVER, how), Eagle(drafter, SHAPES[name]), weights, padded=1
    )
    text = np.concatenate([np.array(prompts), np.asarray(out.tokens)], 1)
    probs = chain.probs ** (1 / how.temperature)
    if how.top_k:
        probs = np.where(probs >= np.sort(probs)[:, -how.top_k, None], probs, 0)
    probs /= probs.sum(-1, keepdims=True)
    if how.top_p < 1:
        ordered = np.sort(probs)[:, ::-1]
        last = (np.cumsum(ordered, -1) < how.top_p).sum(-1)
        probs = np.where(probs >= np.take_along_axis(ordered, last[:, None], 1), probs, 0)
        probs /= probs.sum(-1, keepdims=True)
    for columns in (slice(None), slice(0, 2), slice(1, 3)):
        counts = np.zeros_like(probs)
        some = text[:, columns]
        np.add.at(counts, (some[:, :-1].ravel(), some[:, 1:].ravel()), 1)
        assert counts[probs == 0].sum() == 0
        small.check_counts(counts.ravel(), (counts.sum(-1, keepdims=True) * probs).ravel())
    assert max(out.emitted_by_round.max(1)) > 2


@pytest.mark.parametrize("how", [Sampling(0.5, top_k=5), Sampling(1.0, top_p=0.8)], ids=str)
def test_with_trees_that_follow_from_the_text_a_sample_is_the_autoregressive_one(tiny, pupil, how):
    keys = jax.random.split(jax.random.key(4), len(PROMPTS))
    config = DecodeConfig(L, NEVER, how)
    plain = small.generate(tiny, PROMPTS, config, keys=keys)
    eagle = Eagle(tiny.drafter, SHAPES["dynamic, all nodes"])
    out = small.generate(tiny, PROMPTS, config, eagle, pupil, keys)
    assert out.tokens.tolist() == plain.tokens.tolist()
    assert out.emitted_by_round.max() > 2


def test_a_walk_goes_as_deep_as_the_text_repeats_a_branch_even_if_nodes_are_there_twice():
    """0
    7   8   7      nodes 1, 2, 3
    |   |   |
    9   9   5      nodes 4, 5, 6
    """
    tokens = jnp.array([[1, 7, 8, 7, 9, 9, 5]] * 5)
    parents = jnp.array([[0, 0, 0, 0, 1, 2, 3]] * 5)
    says = jnp.array([[7, 5, 6], [7, 9, 6], [8, 9, 3], [4, 9, 9], [7, 9, 6]])
    live = jnp.array([True, True, True, True, False])
    way = verify.walk(Draft(tokens, parents), 2, live, lambda step, node: jnp.take(says, step, axis=1))
    assert way.accepted.tolist() == [2, 2, 2, 0, 0]
    assert way.nodes.tolist() == [[0, 1, 6], [0, 1, 4], [0, 2, 5], [0, 0, 0], [0, 0, 0]]
    assert way.tokens.tolist() == [[7, 5, 6], [7, 9, 6], [8, 9, 3], [4, 0, 0], [0, 0, 0]]


def test_ancestors_are_the_nodes_on_the_way_from_the_root():
    found = verify.ancestors(jnp.array([[0, 0, 0, 1, 3, 2]]), 3)[0]
    above = [{0}, {0, 1}, {0, 2}, {0, 1, 3}, {0, 1, 3, 4}, {0, 2, 5}]
    assert [set(np.flatnonzero(row)) for row in found] == above


def test_shapes_count_their_nodes():
    assert shapes.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert (shapes.chain(3).tokens, shapes.chain(3).depth) == (4, 3)
    assert shapes.group(2, 2).paths == ((0,), (1,), (0, 0), (1, 0))
    tall = shapes.tree_of([(1, 0), (0,), (0,)])
    assert tall.paths == ((0,), (1,), (1, 0))
    assert (tall.parents, tall.children) == ((0, 0, 0, 2), ((1, 2), (-1, -1), (3, -1), (-1, -1)))


@pytest.mark.parametrize("paths", [[], [()], [(0, -1)]])
def test_trees_without_nodes_or_with_ranks_below_0_are_refused(paths):
    with pytest.raises(ConfigError, match="expected lists of ranks from 0 on"):
        shapes.tree_of(paths)


@pytest.mark.parametrize("wrong", [(1, 3, 3), (5, 3, 1), (23, 3, 3), (4, 0, 2), (4, 2, 0)])
def test_dynamic_trees_have_no_more_nodes_than_their_levels(wrong):
    with pytest.raises(ConfigError, match="found a tree of"):
        shapes.Dynamic(*wrong)


@pytest.mark.parametrize("text", ["chain:3", "group:4x2", "tree:60x8x10", "paths:0,1,0-0,1-2"])
def test_shapes_have_names(text):
    assert shapes.name(shapes.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "chain",
        "chain:",
        "chain:0",
        "chain:-1",
        "chain:2x2",
        "group:3",
        "tree:60",
        "paths:",
        "paths:0-",
        "auto",
    ],
)
def test_names_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="shape of drafts: found"):
        shapes.parse(text)
