"""GRIFFIN: which steps of a window count, by its rule, and what they teach."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import small
from phases import KEY, batch_of, gradient_of, norm

from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.base import models_of
from ppow_jax.objectives.griffin import GRIFFIN, text_hits
from ppow_jax.objectives.hass import HASS
from ppow_jax.training.step import Recipe, make_signal, make_step

T, LENGTHS, K = 16, [16, 16, 5], 3  # the last text has fewer anchors than are asked for
LETTERS = np.arange(4, small.markov.SIZE, dtype=np.int32)


@pytest.fixture(scope="module")
def batch(chain):
    """Texts that the chain samples, so that some tokens are likelier than others."""
    rng, tokens = np.random.default_rng(5), np.zeros((3, T), np.int32)
    tokens[:, 0] = 9, 4, 11
    for b, at in np.ndindex(3, T - 1):
        probs = chain.probs[tokens[b, at], LETTERS]
        tokens[b, at + 1] = rng.choice(LETTERS, p=probs / probs.sum())
    return batch_of(tokens, LENGTHS)


# One for all tests that need no other, so that it is compiled once.
OBJECTIVE = GRIFFIN(8, K, losses="kl", top_k=4, top_k_weight=0.5, decay=0.9)


@functools.cache
def signaller(target, drafter, objective):
    return make_signal(Recipe(objective, target, drafter, optax.identity()))


def taught(pair, drafter, weights, objective, batch):
    """(signal, memory, metrics)."""
    make = signaller(pair.target, drafter, objective)
    return make(weights.params, weights.vocab, pair.params, batch, {}, 1, KEY)


def smoothed(chain):
    """Half of what the chain does, half anything."""
    near = chain.probs[:, LETTERS] / chain.probs[:, LETTERS].sum(-1, keepdims=True)
    return 0.5 * near + 0.5 / len(LETTERS)


def test_a_hit_is_a_token_among_the_drafters_likeliest(tiny):
    """Against the drafter in NumPy, window by window."""
    rng, k = np.random.default_rng(2), 12
    tokens = small.DRAFT_VOCAB[rng.integers(24, size=(2, T))].astype(np.int32)
    tokens[:, 9] = 0 if 0 not in small.DRAFT_VOCAB else 1  # not in the draft vocabulary
    assert tokens[0, 9] not in small.DRAFT_VOCAB
    batch, anchors = batch_of(tokens, [T, T]), np.array([[1, 5, 6, T - 1], [2, 9, 10, 0]])

    @functools.partial(jax.jit, static_argnums=0)
    def hits(models_of_params, params, target_params, vocab, batch):
        models = models_of_params(target_params, params, vocab)
        return text_hits(models, batch, outputs_of(tiny.target, target_params, batch), anchors, k, K)

    make = functools.partial(models_of, tiny.target, tiny.drafter)
    found = np.asarray(hits(make, tiny.weights.params, tiny.params, tiny.weights.vocab, batch))[:, :, 0]
    taps = np.asarray(small.forward(tiny.target, tiny.params, tokens)[0].taps[:, 0])
    seen = []
    for b, a in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)):
        anchor, row = int(anchors[b, a]), tokens[b].tolist()
        about = tiny.weights.params, tiny.drafter.config, tiny.weights.embedding, taps[b]
        ahead = row[anchor + 2 : anchor + 2 + K]
        logits = reference.drafter_window(*about, row, anchor, K, lambda j, _, ahead=ahead: ahead[j])
        want = [t in small.DRAFT_VOCAB[np.argsort(-logits[j])[:k]] for j, t in enumerate(ahead)]
        assert found[b, a].tolist() == want
        seen += want
    assert 3 < sum(seen) < 15


@pytest.mark.parametrize("agreement", ["next", "own"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_step_counts_where_the_tokens_before_it_could_be_drafted(chain, batch, agreement, k):
    """A chain's drafter knows the last token alone, so a hit is a pair of tokens: x_1 .. x_j are drafted
    after x_0 .. x_(j - 1), and those of the window itself, x_0 .. x_(j - 1), after the token before."""
    probs = np.random.default_rng(1).dirichlet(np.ones(len(LETTERS)), size=small.markov.SIZE)
    probs = 0.5 * probs + 0.5 * chain.probs[:, LETTERS] / chain.probs[:, LETTERS].sum(-1, keepdims=True)
    drafter, weights = chain.drafter(probs, LETTERS)
    objective = GRIFFIN(8, K, agreement=agreement, agreement_k=k)
    signal, _, metrics = taught(chain, drafter, weights, objective, batch)
    plain, _, _ = taught(chain, drafter, weights, HASS(8, K), batch)
    assert (np.asarray(signal.anchors) == np.asarray(plain.anchors)).all()
    valid = np.asarray(plain.weights["valid"]) > 0
    want = np.zeros(valid.shape)
    for b, a, j in np.argwhere(valid[:, :, 0]):
        at = int(signal.anchors[b, a]) + 2  # of x_0
        first = at + 1 if agreement == "next" else at
        pairs = [batch["tokens"][b, [i - 1, i]] for i in range(first, first + j)]
        want[b, a, 0, j] = all(t in LETTERS[np.argsort(-probs[before])[:k]] for before, t in pairs)
    assert 0 < want[..., 2].sum() < want[..., 1].sum() < want[..., 0].sum() == valid[..., 0].sum()
    count = want.sum((0, 1, 2))
    np.testing.assert_allclose(signal.weights["valid"], want / count, rtol=1e-5)
    for j in range(K):
        share = count[j] / valid[..., j].sum()
        assert float(metrics[f"counted_{j}"]) == pytest.approx(share, rel=1e-5)


def test_the_loss_is_the_mean_over_what_counts(chain, batch):
    drafter, weights = chain.drafter(smoothed(chain), LETTERS)
    signal, _, _ = taught(chain, drafter, weights, OBJECTIVE, batch)
    (loss, _), _ = gradient_of(chain, drafter, weights, OBJECTIVE, batch, signal)
    assert float(loss) == pytest.approx(loss_of(chain, smoothed(chain), batch, signal), rel=1e-4)


def loss_of(chain, probs, batch, signal):
    """KL plus half the loss of the four likeliest, mean of each step, by 0.9 ** j."""
    p = chain.probs[:, LETTERS] / chain.probs[:, LETTERS].sum(-1, keepdims=True)
    total = 0.0
    for j in range(K):
        each = []
        for b, a in np.argwhere(np.asarray(signal.weights["valid"])[:, :, 0, j] > 0):
            before = batch["tokens"][b, int(signal.anchors[b, a]) + 1 + j]
            best = np.argsort(-p[before])[:4]
            each.append((p[before] * np.log(p[before] / probs[before])).sum())
            each[-1] -= 0.5 * (p[before] * np.log(probs[before]))[best].sum()
        total += 0.9**j * np.sum(each) / max(len(each), 1)
    return total


def test_where_nothing_could_be_drafted_the_first_step_alone_teaches(chain, batch):
    """The three likeliest tokens are always the same, and the text has none of them."""
    probs = np.full((small.markov.SIZE, len(LETTERS)), 1e-3)
    probs[:, :3] = 1.0
    probs /= probs.sum(-1, keepdims=True)
    batch = batch | {"tokens": np.where(batch["tokens"] < LETTERS[3], LETTERS[4], batch["tokens"])}
    drafter, weights = chain.drafter(probs, LETTERS)
    signal, _, metrics = taught(chain, drafter, weights, OBJECTIVE, batch)
    assert float(metrics["counted_0"]) == pytest.approx(1) and float(metrics["counted_1"]) == 0
    (loss, _), grads = gradient_of(chain, drafter, weights, OBJECTIVE, batch, signal)
    assert float(loss) == pytest.approx(loss_of(chain, probs, batch, signal), rel=1e-4)
    assert norm(grads) > 0.1


def test_padding_has_no_say(chain, batch):
    drafter, weights = chain.drafter(smoothed(chain), LETTERS)
    objective = OBJECTIVE
    signal, _, _ = taught(chain, drafter, weights, objective, batch)
    padding = np.asarray(signal.weights["valid"]).sum((2, 3)) == 0
    assert padding.any()
    junk = signal._replace(tokens=jnp.where(padding[..., None, None], 7, signal.tokens))
    found = [gradient_of(chain, drafter, weights, objective, batch, s) for s in (signal, junk)]
    assert float(found[0][0][0]) == float(found[1][0][0]) > 0
    assert norm(jax.tree.map(jnp.subtract, found[0][1], found[1][1])) == 0


@pytest.mark.slow
def test_parts_of_a_batch_add_up(chain, batch):
    drafter, weights = chain.drafter(smoothed(chain), LETTERS)
    batch = {k: np.concatenate([v, v[1:2]]) for k, v in batch.items()}
    optimizer, found = optax.sgd(0.1), []
    for accumulate in (1, 2):
        recipe = Recipe(OBJECTIVE, chain.target, drafter, optimizer, accumulate)
        params = jax.tree.map(jnp.copy, weights.params)  # the step donates them
        state = {"params": params, "opt_state": optimizer.init(params), "vocab": weights.vocab}
        found.append(make_step(recipe, chain.params, KEY)(1, state | {"memory": {}}, batch))
    changed = jax.tree.map(jnp.subtract, found[0][0]["params"], weights.params)
    assert norm(changed["head"]) > 0.01
    assert 0 < found[0][1]["counted_2"] < 1
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-4)  # `fuse` of a chain's drafter is steep


def test_as_it_learns_more_steps_count(chain, batch):
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 27), LETTERS)
    objective, params, found = OBJECTIVE, weights.params, []
    for _ in range(15):
        now = weights._replace(params=params)
        signal, _, metrics = taught(chain, drafter, now, objective, batch)
        (_, more), grads = gradient_of(chain, drafter, now, objective, batch, signal)
        head = jax.tree.map(lambda p, g: p - 1.0 * g, params["head"], grads["head"])
        params = params | {"head": head}
        found.append([float(x) for x in (metrics["counted_2"], more["accuracy_0"])])
    assert found[0][0] < 0.1 and found[-1][0] > 0.4, found
    assert found[0][1] < 0.1 and found[-1][1] > 0.5, found
