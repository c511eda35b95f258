"""Group tree optimisation: trees and what they earn, advantages of groups, and the step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from phases import KEY, NEVER, batch_of, gradient_of, norm
from reference import log_softmax

from ppow_jax.decode import tree, verify
from ppow_jax.decode.sampling import GREEDY
from ppow_jax.decode.shapes import parse
from ppow_jax.drafters.windows import text_prefix, text_starts
from ppow_jax.errors import ConfigError
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives import gto
from ppow_jax.objectives.anchors import AnchorRule
from ppow_jax.objectives.base import Sizes, models_of
from ppow_jax.objectives.gto import GTO, Trees
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.training.step import Recipe, make_signal, make_step

T, SHORT, K, M, SIZE = 24, 6, 3, 2, 4
LETTERS = np.arange(4, small.markov.SIZE, dtype=np.int32)
TREE = "tree:8x3x3"
# One for all tests that need no other, so that it is compiled once.
OBJECTIVE = GTO(5, K, groups=M, group_size=SIZE, tree=TREE, clip=0.3, spread_floor=0.05)


@functools.cache
def signaller(target, drafter, objective):
    return make_signal(Recipe(objective, target, drafter, optax.identity(), stops=NEVER))


def taught(chain, drafter, weights, start, objective, batch):
    """(signal, memory, metrics) of a drafter that was another at the start."""
    memory = objective.init(Sizes(len(batch["tokens"]), T), start.params)
    make = signaller(chain.target, drafter, objective)
    return make(weights.params, weights.vocab, chain.params, batch, memory, 1, KEY)


@pytest.fixture(scope="module")
def batch(chain):
    """Texts that the chain samples, which go on where responses end; the last response has no group."""
    rng, tokens = np.random.default_rng(5), np.zeros((3, T), np.int32)
    tokens[:, 0] = 9, 4, 11
    for b, at in np.ndindex(3, T - 1):
        probs = chain.probs[tokens[b, at], LETTERS]
        tokens[b, at + 1] = rng.choice(LETTERS, p=probs / probs.sum())
    return batch_of(tokens, [T, T - 4, SHORT]) | {"tokens": tokens}


def near(chain, seed, share=0.5):
    """A distribution that is the chain's in part."""
    probs = np.random.default_rng(seed).dirichlet(np.ones(len(LETTERS)), size=small.markov.SIZE)
    own = chain.probs[:, LETTERS] / chain.probs[:, LETTERS].sum(-1, keepdims=True)
    return share * probs + (1 - share) * own


@pytest.fixture(scope="module")
def drafters(chain):
    """(module, as it is, as it was at the start), and the distributions of both."""
    all_probs = near(chain, 1, 0.2), near(chain, 2, 0.9)
    (drafter, now), (_, start) = (chain.drafter(probs, LETTERS) for probs in all_probs)
    return drafter, now, start, all_probs


def way(parents, node):
    """The nodes from the root, itself left out, to a node."""
    return [*way(parents, parents[node]), node] if node else []


def worth(parents, chance, eta):
    """(eq. 5 of the lengths by eq. 3 and 4, expected accepted length) of a tree, from its nodes' chances."""
    J = len(parents)
    reach = [np.prod([chance[n] for n in way(parents, node)]) for node in range(J)]
    ends = [node for node in range(1, J) if node not in parents[1:]]
    lengths = [sum(reach[n] for n in way(parents, node)) for node in ends]

    def beyond(node):  # expected tokens below a node that was come to
        below = [n for n in range(1, J) if parents[n] == node]
        return sum(chance[n] * (1 + beyond(n)) for n in below)

    return np.log(np.sum(np.exp(eta * np.array(lengths)))) / eta, beyond(0)


@pytest.mark.parametrize("eta", [0.5, 1.0, 20.0])
def test_what_a_tree_earns_is_that_of_the_formulas(eta):
    rng, J = np.random.default_rng(0), 9
    parents, chance = np.zeros((6, J), int), rng.uniform(size=(6, J))
    for row in range(6):
        parents[row, 1:] = [rng.integers(node) for node in range(1, J)]
    chance[0, 2:] = 0.0  # greedy chances of 0 and 1
    chance[0, 1] = 1.0
    chance[:, 0] = 1.0
    with np.errstate(divide="ignore"):
        log_prob = jnp.asarray(np.log(chance), jnp.float32)
    above = verify.ancestors(jnp.asarray(parents), J)
    reach, lengths = gto.path_lengths(above, log_prob)
    found = gto.smooth_max(lengths, gto.leaves(jnp.asarray(parents)), eta)
    for row in range(6):
        want, expected = worth(parents[row].tolist(), chance[row], eta)
        assert float(found[row]) == pytest.approx(want, rel=1e-5)
        assert float(reach[row].sum()) == pytest.approx(expected, rel=1e-5)
        if eta == 20:
            assert float(found[row]) == pytest.approx(float(lengths[row].max()), abs=np.log(J) / 20)


@functools.partial(jax.jit, static_argnames=("target", "drafter"))
def drafted(target, drafter, target_params, weights, batch, anchors):
    """Trees of every anchor as the objective drafts them, and as decoding drafts them, one by one."""
    models = models_of(target, drafter, target_params, weights.params, weights.vocab, NEVER)
    outputs, shape = outputs_of(target, target_params, batch), parse(TREE)
    prefix = text_prefix(drafter, weights, outputs.taps, batch["tokens"])
    keys_B, one_by_one = jax.random.split(KEY, len(anchors)), []
    for a in range(anchors.shape[1]):
        start = text_starts(prefix, batch["tokens"], anchors[:, a : a + 1])
        about = (drafter, weights, prefix.keys_values, start, shape, GREEDY, keys_B)
        one_by_one.append(tree.draft(*about)[:2])
    tokens, parents = (jnp.stack(x, 1) for x in zip(*one_by_one, strict=True))
    return gto.draft_trees(models, batch, outputs, anchors, shape, GREEDY), (tokens, parents)


@functools.partial(jax.jit, static_argnames=("target", "drafter", "temperature"))
def scored(target, drafter, target_params, weights, batch, trees, anchors, temperature):
    models = models_of(target, drafter, target_params, weights.params, weights.vocab, NEVER)
    return gto.score_trees(models, batch, trees, anchors, temperature)


def test_trees_are_those_of_decoding_and_the_target_reads_every_way(tiny, monkeypatch):
    """Log-probabilities of nodes are those of plain texts that end like the way to them."""
    rng, temperature = np.random.default_rng(3), 0.7
    batch = batch_of(rng.integers(small.TINY.vocab_size, size=(2, T)).astype(np.int32), [T, T])
    anchors = np.array([[1, 8, 9], [4, 2, 15]])
    about = (tiny.target, tiny.drafter, tiny.params, tiny.weights, batch)
    found, want = drafted(*about, anchors)
    for a, b in zip(found, want, strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()
    tokens, parents = (np.asarray(x)[:, :, None].repeat(2, 2) for x in found)
    tokens[:, :, 1] = tokens[::-1, :, 0]  # another tree beside it
    tokens[:, :, 1, 0] = tokens[:, :, 0, 0]
    parents[:, :, 1] = parents[::-1, :, 0]
    above = verify.ancestors(jnp.asarray(parents.reshape(-1, 8)), 3).reshape(2, 3, 2, 8, 8)
    trees = Trees(jnp.asarray(tokens), jnp.asarray(parents), above)
    whole = np.asarray(scored(*about, trees, anchors, temperature))
    monkeypatch.setattr(gto, "windows_at_once", lambda *_: 2)
    jax.clear_caches()
    np.testing.assert_allclose(scored(*about, trees, anchors, temperature), whole, atol=1e-4)
    ends = [(b, a, g, node) for b, a, g in ((0, 0, 0), (0, 1, 1), (1, 2, 0)) for node in range(1, 8)]
    texts = np.zeros((len(ends), T + 4), np.int32)
    for row, (b, a, g, node) in zip(texts, ends, strict=True):
        t, on = anchors[b, a] + 2, way(parents[b, a, g].tolist(), node)
        row[:t] = batch["tokens"][b, :t]
        row[t : t + len(on)] = tokens[b, a, g, on]
    logits = np.asarray(small.forward(tiny.target, tiny.params, texts)[1], np.float64)
    for row, (b, a, g, node) in enumerate(ends):
        at = anchors[b, a] + 1 + len(way(parents[b, a, g].tolist(), node))
        want = log_softmax(logits[row, at - 1] / temperature)[tokens[b, a, g, node]]
        assert whole[b, a, g, node] == pytest.approx(want, abs=1e-3)
    assert (whole[..., 0] == 0).all()


def test_nothing_is_on_the_text_behind_the_end_of_a_response():
    """Trees that are the text itself, and one wrong token; the response ends before position 8."""
    batch = {"tokens": np.arange(20, 32)[None], "assistant": (np.arange(12) >= 2)[None] & (np.arange(12) < 8)}
    anchors, real = np.array([[1, 4, 5, 2, 3]]), np.array([[True, True, True, True, False]])
    tokens = batch["tokens"][0][anchors[..., None] + 1 + np.arange(4)][:, :, None]
    tokens[0, 3, 0, 2] = 7
    parents = np.broadcast_to([0, 0, 1, 2], tokens.shape)
    above = np.broadcast_to(np.tri(4, dtype=bool), (*tokens.shape, 4))
    found = gto.text_matches(Trees(*map(jnp.asarray, (tokens, parents, above))), batch, anchors, real, 3)
    lengths = gto.path_lengths(jnp.asarray(above), found)[1].max(-1)[0, :, 0]
    assert np.asarray(lengths).tolist() == [3, 2, 1, 1, 0]


def test_groups_are_adjacent_and_whole_and_do_not_overlap():
    """Of a response of 11 tokens, which has two groups of 4, or one if they begin late."""
    assistant = np.zeros((64, 30), bool)
    assistant[:, 7:18] = True
    assistant[0, 10:] = False  # too short for one
    grouped, real = (np.asarray(x) for x in gto.pick_groups(KEY, assistant, 3, 4))
    assert (np.diff(grouped, axis=-1) == 1).all()
    begins = set()
    for row in range(64):
        first = np.sort(grouped[row, real[row], 0])
        assert all(t >= 5 and t + 3 <= 15 for t in first) and (np.diff(first) >= 4).all()
        begins |= set(first.tolist())
    assert (real.sum(1)[1:].min(), real.sum(1).max()) == (2, 2)
    assert not real[0].any() and begins == set(range(5, 13))


def trees_in_numpy(probs, token):
    """The dynamic tree after a token: its nodes' tokens and parents, by EAGLE-2's rule."""
    nodes, parents, scores, level = [token], [0], [0.0], [0]
    for _ in range(3):
        below = []
        for node in sorted(level, key=lambda n: -scores[n])[:3]:
            for i in np.argsort(-probs[nodes[node]], kind="stable")[:3]:
                below.append(len(nodes))
                scores.append(scores[node] + np.log(probs[nodes[node], i]))
                nodes.append(int(LETTERS[i]))
                parents.append(node)
        level = below
    kept = [0, *sorted(sorted(range(1, len(nodes)), key=lambda n: -scores[n])[:7])]
    return [nodes[n] for n in kept], [kept.index(parents[n]) for n in kept]


@pytest.mark.parametrize(("temperature", "reward"), [(1.0, "smooth_max"), (0.0, "expected")])
def test_a_step_is_that_of_the_formulas(chain, drafters, batch, temperature, reward):
    """Trees, rewards, advantages, ratios and the clipped loss in NumPy, from the distributions alone."""
    drafter, now, start, all_probs = drafters
    objective = dataclasses.replace(OBJECTIVE, temperature=temperature, tree_reward=reward)
    signal, _, metrics = taught(chain, drafter, now, start, objective, batch)
    real = np.asarray(signal.weights["policy"])[..., 0, 0] > 0
    assert real[:, :5].sum() == 0 and real.sum(1).tolist() == [M * SIZE, M * SIZE, 0]
    debiased, ratios, earned = np.zeros(real.shape), np.ones(real.shape), np.zeros((2, *real.shape, 2))
    for b, a in np.argwhere(real):
        t, end = int(signal.anchors[b, a]), (T, T - 4, SHORT)[b]
        ahead = batch["tokens"][b, t + 1 : min(end, t + 2 + K)].tolist()
        for which, probs in enumerate(all_probs):
            tokens, parents = trees_in_numpy(probs, ahead[0])
            paths = [[tokens[n] for n in way(parents, node)] for node in range(len(tokens))]
            here = [path == ahead[1 : 1 + len(path)] for path in paths]  # on the text
            chance = [float(x) for x in here]
            if temperature:
                chance = [chain.probs[tokens[p], x] for p, x in zip(parents, tokens, strict=True)]
            earned[which, b, a] = worth(parents, chance, 1.0)
            if which == 0:
                on = max((path for path, x in zip(paths, here, strict=True) if x), key=len)
                assert int(signal.extra.length[b, a, 0]) == len(on)
                pairs = list(zip(ahead, on, strict=False))
                logs = [[np.log(q[x, y == LETTERS][0]) for x, y in pairs] for q in all_probs]
                ratios[b, a] = np.exp((sum(logs[0]) - sum(logs[1])) / max(len(on), 1))
        debiased[b, a] = np.subtract(*earned[:, b, a, 0 if reward == "smooth_max" else 1])
    groups = debiased[:2, 5:].reshape(2, M, SIZE)
    advantage = (groups - groups.mean(-1, keepdims=True)) / (groups.std(-1, keepdims=True) + 0.05)
    assert (groups.std(-1) > 0.03).any()
    np.testing.assert_allclose(
        np.asarray(signal.extra.advantage)[:2, 5:, 0].reshape(2, M, SIZE), advantage, atol=1e-3
    )
    s = ratios[:2, 5:].reshape(2, M, SIZE)
    want = -np.minimum(s * advantage, np.clip(s, 0.7, 1.3) * advantage).mean()
    (_, more), _ = gradient_of(chain, drafter, now, objective, batch, signal)
    assert abs(want) > 0.05
    assert float(more["policy_loss"]) == pytest.approx(want, abs=1e-3)
    column = earned[:, real]
    for name, of in (("tree_reward", 0 if reward == "smooth_max" else 1), ("tree_accepted", 1)):
        assert float(metrics[name]) == pytest.approx(column[0, :, of].mean(), rel=1e-3)
        assert float(metrics[f"{name}_start"]) == pytest.approx(column[1, :, of].mean(), rel=1e-3)
    clipped = ((s > 1.3) & (advantage > 0)) | ((s < 0.7) & (advantage < 0))
    assert float(more["clip_fraction"]) == pytest.approx(clipped.mean(), abs=1e-6)


def test_the_rest_is_supervised(chain, drafters, batch):
    """The same anchors, and the same loss; with a weight the policy's comes on top."""
    drafter, now, start, _ = drafters
    plain = Supervised(5, K)
    signal, _, _ = taught(chain, drafter, now, start, plain, batch)
    (want, _), _ = gradient_of(chain, drafter, now, plain, batch, signal)
    signal, _, _ = taught(chain, drafter, now, start, OBJECTIVE, batch)
    (loss, metrics), _ = gradient_of(chain, drafter, now, OBJECTIVE, batch, signal)
    assert abs(float(metrics["policy_loss"])) > 0.05
    assert float(loss) - 0.5 * float(metrics["policy_loss"]) == pytest.approx(float(want), rel=1e-5)


def test_the_start_has_no_advantage_over_itself(chain, drafters, batch):
    drafter, _, start, _ = drafters
    signal, _, metrics = taught(chain, drafter, start, start, OBJECTIVE, batch)
    assert (np.asarray(signal.extra.advantage) == 0).all()
    assert float(metrics["tree_reward"]) == float(metrics["tree_reward_start"]) > 0
    (_, more), _ = gradient_of(chain, drafter, start, OBJECTIVE, batch, signal)
    assert float(more["policy_loss"]) == 0


def test_padding_has_no_say(chain, drafters, batch):
    drafter, now, start, _ = drafters
    signal, _, _ = taught(chain, drafter, now, start, OBJECTIVE, batch)
    counted = sum(np.asarray(x).sum((2, 3)) for x in signal.weights.values()) > 0
    assert counted.sum(1).tolist() == [5 + M * SIZE, 5 + M * SIZE, SHORT - 2]
    at = ~counted[..., None]
    extra = signal.extra._replace(
        start=jnp.where(at[..., None], -1.0, signal.extra.start),
        length=jnp.where(at, 2, signal.extra.length),
        advantage=jnp.where(at, 3.0, signal.extra.advantage),
    )
    junk = signal._replace(tokens=jnp.where(at[..., None], 7, signal.tokens), extra=extra)
    found = [gradient_of(chain, drafter, now, OBJECTIVE, batch, s) for s in (signal, junk)]
    assert float(found[0][0][0]) == float(found[1][0][0]) > 0
    assert norm(jax.tree.map(jnp.subtract, found[0][1], found[1][1])) == 0


def test_keys_that_do_not_go_together():
    with pytest.raises(ConfigError, match="window: found 2, expected at least 3"):
        GTO(window=2, tree=TREE)
    with pytest.raises(ConfigError, match="tree"):
        GTO(tree="bush:3")
    OBJECTIVE.check(27)
    with pytest.raises(ConfigError, match=r"^tree: found 28 candidates .* expected at most 27"):
        dataclasses.replace(OBJECTIVE, tree="tree:40x2x28").check(27)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_and_the_start_stays(chain, drafters, batch):
    drafter, weights, start, _ = drafters
    batch = {k: np.concatenate([v, v[1:2]]) for k, v in batch.items()}
    optimizer, found = optax.sgd(0.1), []
    for accumulate in (1, 2):
        recipe = Recipe(OBJECTIVE, chain.target, drafter, optimizer, accumulate, stops=NEVER)
        params = jax.tree.map(jnp.copy, weights.params)  # the step donates them
        state = {"params": params, "opt_state": optimizer.init(params), "vocab": weights.vocab}
        state |= {"memory": OBJECTIVE.init(Sizes(4, T), start.params)}
        found.append(make_step(recipe, chain.params, KEY)(1, state, batch))
        assert norm(jax.tree.map(jnp.subtract, found[-1][0]["memory"]["start"], start.params)) == 0
    changed = jax.tree.map(jnp.subtract, found[0][0]["params"], weights.params)
    assert norm(changed["head"]) > 0.01
    assert abs(found[0][1]["policy_loss"]) > 0.05
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        atol = max(5e-4, 1e-6 * np.abs(a).max())  # `fuse` of a chain's drafter is steep
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=atol)


def test_what_is_kept_of_the_start_is_a_copy(chain, drafters):
    params = jax.tree.map(jnp.copy, drafters[1].params)
    memory = dataclasses.replace(OBJECTIVE, anchor_rule=AnchorRule("adaw")).init(Sizes(7, T), params)
    assert memory["scores"].shape == (7, T)
    jax.tree.map(lambda x: x.delete(), params)
    assert norm(memory["start"]) > 0


def test_trees_grow_longer_than_those_of_the_start(chain, batch):
    """From a drafter that knows nothing; and reinforcement alone makes the ways likelier whose trees are
    better than their group's, and the others less likely."""
    drafter, start = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 27), LETTERS)
    params, found = start.params, []
    for _ in range(12):
        now = start._replace(params=params)
        signal, _, metrics = taught(chain, drafter, now, start, OBJECTIVE, batch)
        _, grads = gradient_of(chain, drafter, now, OBJECTIVE, batch, signal)
        head = jax.tree.map(lambda p, g: p - 1.0 * g, params["head"], grads["head"])
        params = params | {"head": head}
        found.append([float(metrics[f"tree_accepted{x}"]) for x in ("", "_start", "_text")])
    assert found[0][0] == found[0][1] == found[-1][1] < 0.5
    assert found[-1][0] > 2 * found[0][0] and found[-1][2] > found[0][2], found
