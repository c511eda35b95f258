"""HASS: the loss of the target's likeliest tokens against its formula, alone and in a step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
from phases import KEY, batch_of, gradient_of, norm
from reference import log_softmax

from ppow_jax.objectives import losses
from ppow_jax.objectives.hass import HASS, top_k_loss
from ppow_jax.training.step import Recipe, make_signal, make_step

T, LENGTHS = 16, [16, 16, 5]  # the last text has fewer anchors than are asked for
LETTERS = np.arange(4, small.markov.SIZE, dtype=np.int32)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
@pytest.mark.parametrize("top_k", [1, 4, 9, 20])
def test_the_loss_is_that_of_the_formula(temperature, top_k):
    rng = np.random.default_rng(0)
    target_logits, logits = 2 * rng.normal(size=(2, 5, 3, 9))
    target = losses.renormalised(jnp.asarray(target_logits, jnp.float32), temperature)
    found = top_k_loss(target, jnp.asarray(logits, jnp.float32), top_k)
    want = np.zeros((5, 3))
    for i, j in np.ndindex(want.shape):
        t = target_logits[i, j] / (temperature or 1.0)
        p = np.exp(log_softmax(t)) if temperature else (t == t.max()).astype(float)
        log_q = log_softmax(logits[i, j])
        for x in np.argsort(-t)[:top_k]:
            want[i, j] -= p[x] * log_q[x]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    if top_k >= 9:
        np.testing.assert_allclose(found, losses.cross_entropy(target, logits), rtol=1e-5)


def test_of_equal_tokens_the_first_count():
    target = losses.renormalised(jnp.zeros(4))
    logits = jnp.asarray([0.0, 1.0, 2.0, 3.0])
    want = -0.25 * log_softmax(np.arange(4.0))[:2].sum()
    assert float(top_k_loss(target, logits, 2)) == pytest.approx(want, rel=1e-6)


@pytest.fixture(scope="module")
def batch(chain):
    tokens = np.zeros((3, T), np.int32)
    tokens[:, 0] = 9, 4, 11
    for at in range(1, T):
        tokens[:, at] = chain.probs.argmax(-1)[tokens[:, at - 1]]
    return batch_of(tokens, LENGTHS)


def signal_of(chain, drafter, weights, objective, batch):
    recipe = Recipe(objective, chain.target, drafter, optax.identity())
    return make_signal(recipe)(weights.params, weights.vocab, chain.params, batch, {}, 1, KEY)[0]


def test_a_step_adds_up_both_losses_by_their_weights(chain, batch):
    """Mean of each step over its tokens, 0.8 ** j of it; both distributions are known."""
    probs = np.random.default_rng(1).dirichlet(np.ones(len(LETTERS)), size=small.markov.SIZE)
    drafter, weights = chain.drafter(probs, LETTERS)
    objective = HASS(8, 3, losses="0.1*cross_entropy", top_k=3, top_k_weight=0.7)
    signal = signal_of(chain, drafter, weights, objective, batch)
    (loss, _), _ = gradient_of(chain, drafter, weights, objective, batch, signal)
    p = chain.probs[:, LETTERS] / chain.probs[:, LETTERS].sum(-1, keepdims=True)
    total, count = np.zeros(3), np.zeros(3)
    for b, a, j in np.argwhere(np.asarray(signal.weights["valid"])[:, :, 0] > 0):
        before = batch["tokens"][b, int(signal.anchors[b, a]) + 1 + j]
        each = -p[before] * np.log(probs[before])
        best = np.argsort(-p[before])[:3]
        total[j] += 0.1 * each.sum() + 0.7 * each[best].sum()
        count[j] += 1
    assert (count > 8).all()
    assert float(loss) == pytest.approx((total / count * 0.8 ** np.arange(3)).sum(), rel=1e-4)


def test_padding_has_no_say(chain, batch):
    drafter, weights = chain.drafter(chain.probs[:, LETTERS], LETTERS)
    objective = HASS(8, 3)
    signal = signal_of(chain, drafter, weights, objective, batch)
    padding = np.asarray(signal.weights["valid"]).sum((2, 3)) == 0
    assert padding.any()
    tokens = np.where(padding[..., None, None], 7, signal.tokens)
    found = [
        gradient_of(chain, drafter, weights, objective, batch, s)
        for s in (signal, signal._replace(tokens=jnp.asarray(tokens)))
    ]
    assert float(found[0][0][0]) == float(found[1][0][0]) > 0
    assert norm(jax.tree.map(jnp.subtract, found[0][1], found[1][1])) == 0


@pytest.mark.slow
def test_parts_of_a_batch_add_up(chain, batch):
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 27), LETTERS)
    batch = {k: np.concatenate([v, v[1:2]]) for k, v in batch.items()}
    optimizer, found = optax.sgd(0.1), []
    for accumulate in (1, 2):
        recipe = Recipe(HASS(8, 3), chain.target, drafter, optimizer, accumulate)
        params = jax.tree.map(jnp.copy, weights.params)  # the step donates them
        state = {"params": params, "opt_state": optimizer.init(params), "vocab": weights.vocab}
        found.append(make_step(recipe, chain.params, KEY)(1, state | {"memory": {}}, batch))
    changed = jax.tree.map(jnp.subtract, found[0][0]["params"], weights.params)
    assert norm(changed["head"]) > 0.01
    for state, metrics in found:
        # A chain's drafter has features of 0, and its norm of them makes a million of rounding.
        del state["params"]["fuse"], metrics["grad_norm"]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-4)


def test_by_itself_it_learns_the_likeliest_tokens_and_forgets_the_rest(chain, batch):
    """Its minimum is T over the sum of its K largest on those, 0 elsewhere; the cross-entropy's is T."""
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 30), LETTERS)
    objective = dataclasses.replace(HASS(14, 1), losses="1e-9*cross_entropy", top_k=2)
    signal = signal_of(chain, drafter, weights, objective, batch)
    params, found = weights.params, []
    for _ in range(60):
        now = weights._replace(params=params)
        (loss, _), grads = gradient_of(chain, drafter, now, objective, batch, signal)
        head = jax.tree.map(lambda p, g: p - 2.0 * g, params["head"], grads["head"])
        params, found = params | {"head": head}, [*found, float(loss)]
    assert (np.diff(found) < 0).all()
    D = chain.target.config.width
    seen = sorted({int(batch["tokens"][b, t + 1]) for b, t in np.argwhere(batch["assistant"][:, 2:])})
    for token in seen:
        q = np.exp(log_softmax(np.asarray(params["head"]["weight"])[:, token] * np.sqrt(D)))
        p = chain.probs[token, LETTERS]
        best = np.argsort(-p)[:2]
        assert q[best].sum() > 0.9
        np.testing.assert_allclose(q[best] / q[best].sum(), p[best] / p[best].sum(), atol=0.1)
