"""On-policy distillation: what the target says along drafted windows, and what that teaches."""

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

from ppow_jax.errors import ConfigError
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.anchors import AnchorRule
from ppow_jax.objectives.base import Sizes, models_of
from ppow_jax.objectives.opd import OPD, replay
from ppow_jax.objectives.rollout import Rollout
from ppow_jax.training.step import Recipe, make_signal, make_step

T, SHORT, K, G = 20, 6, 3, 3
LETTERS = np.arange(4, small.markov.SIZE, dtype=np.int32)
# One for all tests that need no other, so that it is compiled once.
OBJECTIVE = OPD(6, G, K, accepted_weight=0.5, decay=0.7, anchor_rule=AnchorRule())


@functools.cache
def signaller(target, drafter, objective, stops):
    return make_signal(Recipe(objective, target, drafter, optax.identity(), stops=stops))


def taught(pair, drafter, weights, objective, batch, key=KEY, stops=NEVER):
    """(signal, memory, metrics)."""
    memory = objective.init(Sizes(len(batch["tokens"]), T), weights.params)
    make = signaller(pair.target, drafter, objective, stops)
    return make(weights.params, weights.vocab, pair.params, batch, memory, 1, key)


@pytest.fixture(scope="module")
def text(tiny):
    """Greedy texts of the random target; the last is too short for six anchors."""
    prompts = np.array([[3, 9], [4, 1], [7, 7]])
    out = small.generate(tiny, prompts.tolist(), small.DecodeConfig(T - 2, NEVER), padded=2)
    return batch_of(np.concatenate([prompts, out.tokens], 1), [T, T - 4, SHORT])


@pytest.fixture(scope="module")
def batch(chain):
    tokens = np.zeros((3, T), np.int32)
    tokens[:, 0] = 9, 4, 11
    for at in range(1, T):
        tokens[:, at] = chain.probs.argmax(-1)[tokens[:, at - 1]]
    return batch_of(tokens, [T, T - 4, SHORT])


ANCHORS = np.array([[1, 5, T - 4, T - 3], [1, 4, 9, T - 7], [1, 2, 3, 0]])
REAL = np.array([[True] * 4, [True] * 4, [True, True, True, False]])


@functools.partial(jax.jit, static_argnames=("target", "drafter", "temperature"))
def replayed(target, drafter, target_params, weights, batch, rollout, temperature):
    models = models_of(target, drafter, target_params, weights.params, weights.vocab, NEVER)
    outputs = outputs_of(target, target_params, batch)
    return replay(models, batch, outputs, rollout, jax.random.key(1), temperature)


def made_up(batch) -> Rollout:
    """Windows along the text, of each group one that goes on, one wrong at its second token, one at once."""
    tokens = np.zeros((*ANCHORS.shape, G, K), np.int32)
    for b, a, j in np.ndindex(*ANCHORS.shape, K):
        tokens[b, a, :, j] = batch["tokens"][b, min(ANCHORS[b, a] + 2 + j, T - 1)]
    for g, first in ((1, 1), (2, 0)):
        tokens[:, :, g, first] = (tokens[:, :, g, first] + 5) % small.TINY.vocab_size
    return Rollout(ANCHORS, REAL, tokens, tokens, np.zeros(tokens.shape, np.float32))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_target_reads_windows_as_they_are(tiny, text, temperature):
    """Its distribution at every token that counts is that of a plain text which ends like the window.

    At temperature 0 they are accepted as far as they repeat the text; behind its end nothing is known, unless
    the window was refused before.
    """
    rollout = made_up(text)
    about = (tiny.target, tiny.drafter, tiny.params, tiny.weights, text, rollout)
    found = replayed(*about, temperature)
    valid, context = np.asarray(found.valid), np.asarray(found.context)
    whole, kinds = np.zeros((*rollout.tokens.shape[:3], T + K), np.int32), set()
    for b, a, g in np.ndindex(whole.shape[:3]):
        t = ANCHORS[b, a] + 2
        whole[b, a, g, :t], whole[b, a, g, t : t + K] = text["tokens"][b, :t], rollout.tokens[b, a, g]
        left = max(0, (T, T - 4, SHORT)[b] - t) * REAL[b, a]  # of the text
        k = min(left, (K, 1, 0)[g])
        known = 0 if not REAL[b, a] else K if temperature or k < left else k
        assert valid[b, a, g].tolist() == [j < known for j in range(K)]
        assert temperature or int(found.accepted[b, a, g]) == k
        kinds |= {(k > 0, k < left)}
    assert len(kinds) == 4
    logits = small.forward(tiny.target, tiny.params, whole.reshape(-1, T + K))[1]
    logits = np.asarray(logits, np.float64).reshape(*whole.shape, -1)
    head = np.asarray(tiny.params["head"]["weight"], np.float64)[small.DRAFT_VOCAB]
    for b, a, g, j in np.argwhere(valid):
        want = log_softmax(logits[b, a, g, ANCHORS[b, a] + 1 + j][small.DRAFT_VOCAB])
        np.testing.assert_allclose(log_softmax(head @ context[b, a, g, j]), want, atol=1e-3)


def test_nothing_behind_a_stop_token_counts(chain, batch):
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, 3), 1 / 3), LETTERS[:3])
    stops = (int(LETTERS[0]),)
    signal, _, _ = taught(chain, drafter, weights, OBJECTIVE, batch, stops=stops)
    counts = sum(np.asarray(x) for x in signal.weights.values()) > 0
    stopped = np.cumsum(np.asarray(signal.tokens) == stops[0], -1)
    behind = np.pad(stopped[..., :-1], ((0, 0),) * 3 + ((1, 0),)) > 0
    assert behind.any() and counts.any()
    assert not counts[behind].any()


@pytest.mark.parametrize(("temperature", "decay_from"), [(0.0, "window"), (1.0, "refusal")])
def test_the_loss_is_that_of_the_formula(chain, batch, temperature, decay_from):
    """The chain's target and drafter know the last token alone, so both distributions are known anywhere."""
    q = np.random.default_rng(1).dirichlet(np.ones(len(LETTERS)), size=small.markov.SIZE)
    p = chain.probs[:, LETTERS] / chain.probs[:, LETTERS].sum(-1, keepdims=True)
    q = 0.5 * q + 0.5 * p
    drafter, weights = chain.drafter(q, LETTERS)
    objective = dataclasses.replace(OBJECTIVE, decay_from=decay_from, temperature=temperature)
    signal, _, metrics = taught(chain, drafter, weights, objective, batch)
    counted = {name: np.asarray(x) > 0 for name, x in signal.weights.items()}
    (loss, more), _ = gradient_of(chain, drafter, weights, objective, batch, signal)
    sums, totals, lengths = np.zeros(2), np.zeros(2), []
    for b, a, g in np.ndindex(signal.tokens.shape[:3]):
        accepted = counted["accepted"][b, a, g]
        k = int(accepted.sum())
        assert accepted.tolist() == [j < k for j in range(K)]
        lengths.append(k)
        before = batch["tokens"][b, int(signal.anchors[b, a]) + 1]
        for j, token in enumerate(np.asarray(signal.tokens[b, a, g])):
            if accepted[j]:
                sums[0] += (p[before] * np.log(p[before] / q[before])).sum()
                totals[0] += 1
            if counted["refused"][b, a, g, j]:
                weight = 0.7 ** (j if decay_from == "window" else j - k)
                sums[1] += weight * (q[before] * np.log(q[before] / p[before])).sum()
                totals[1] += weight
            before = token
    assert len(set(lengths)) > 2
    want = sums / totals
    assert float(more["accepted_loss"]) == pytest.approx(want[0], rel=1e-3)
    assert float(more["refused_loss"]) == pytest.approx(want[1], rel=1e-3)
    assert float(loss) == pytest.approx((0.5 * want[0] + want[1]) / 1.5, rel=1e-3)
    refused = counted["refused"].sum() / (counted["refused"] | counted["accepted"]).sum()
    assert float(metrics["share_refused_tokens"]) == pytest.approx(refused, rel=1e-5)


def test_a_drafter_that_is_the_target_has_nothing_to_learn(chain, batch):
    drafter, weights = chain.drafter(chain.probs[:, LETTERS], LETTERS)
    signal, _, _ = taught(chain, drafter, weights, OBJECTIVE, batch)
    (loss, _), grads = gradient_of(chain, drafter, weights, OBJECTIVE, batch, signal)
    assert abs(float(loss)) < 1e-4 and norm(grads["head"]) < 1e-3


def test_padding_has_no_say(chain, batch):
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 27), LETTERS)
    signal, _, _ = taught(chain, drafter, weights, OBJECTIVE, batch)
    padding = sum(np.asarray(x) for x in signal.weights.values()).sum((2, 3)) == 0
    assert padding.sum(1).tolist() == [0, 0, 6 - (SHORT - 2)]
    at = padding[..., None, None]
    junk = signal._replace(
        tokens=jnp.where(at, 7, signal.tokens), extra=jnp.where(at[..., None], 3.0, signal.extra)
    )
    found = [gradient_of(chain, drafter, weights, OBJECTIVE, batch, s) for s in (signal, junk)]
    assert float(found[0][0][0]) == float(found[1][0][0]) > 0
    assert norm(jax.tree.map(jnp.subtract, found[0][1], found[1][1])) == 0


def test_windows_may_be_the_drafters_likeliest(chain, batch):
    """As a chain is drafted at temperature 0, from where its rounds begin; they end where it was wrong."""
    wrong = int(batch["tokens"][0, 7])
    drafter, weights = small.flawed(chain, (wrong,))
    objective = OPD(T, 1, K, rollout_temperature=0.0)
    signal, memory, metrics = taught(chain, drafter, weights, objective, batch)
    begins = np.asarray(memory["scores"]).astype(bool)
    real = sum(np.asarray(x) for x in signal.weights.values())[:, :, 0].sum(-1) > 0
    for b, a in np.argwhere(real):
        t = int(signal.anchors[b, a])
        assert begins[b, t]
        token = int(batch["tokens"][b, t + 1])
        for drafted in np.asarray(signal.tokens[b, a, 0]):
            best = np.roll(np.eye(small.markov.SIZE)[small.walk(token, 1)[0]], 3 if token == wrong else 0)
            assert int(drafted) == best.argmax()
            token = int(drafted)
    assert 2 < real.sum() < batch["assistant"].sum()
    assert 0 < float(metrics["share_refused_tokens"]) < 1


def test_keys_that_do_not_go_together():
    for changes in (dict(rollout_temperature=0.0, group=2), dict(refused_loss="kl+lk_batch"),
                    dict(accepted_weight=0.0, refused_weight=0.0)):  # fmt: skip
        with pytest.raises(ConfigError, match=next(reversed(changes)).split("_")[0]):
            OPD(**changes)


def test_parts_of_a_batch_add_up(chain, batch):
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 27), LETTERS)
    batch = {k: np.concatenate([v, v[1:2]]) for k, v in batch.items()}
    optimizer, found = optax.sgd(0.1), []
    for accumulate in (1, 2):
        recipe = Recipe(OBJECTIVE, chain.target, drafter, optimizer, accumulate, stops=NEVER)
        params = jax.tree.map(jnp.copy, weights.params)  # the step donates them
        state = {"params": params, "opt_state": optimizer.init(params), "vocab": weights.vocab}
        found.append(make_step(recipe, chain.params, KEY)(1, state | {"memory": {}}, batch))
    changed = jax.tree.map(jnp.subtract, found[0][0]["params"], weights.params)
    assert norm(changed["head"]) > 0.01
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=5e-4)  # `fuse` of a chain's drafter is steep


def test_it_learns_to_be_accepted(chain, batch):
    """From a drafter that knows nothing; the divergences fall, and windows get longer."""
    drafter, weights = chain.drafter(np.full((small.markov.SIZE, len(LETTERS)), 1 / 27), LETTERS)
    params, found = weights.params, []
    for number in range(25):
        now = weights._replace(params=params)
        signal, _, metrics = taught(chain, drafter, now, OBJECTIVE, batch, jax.random.key(number))
        (loss, _), grads = gradient_of(chain, drafter, now, OBJECTIVE, batch, signal)
        head = jax.tree.map(lambda p, g: p - 1.0 * g, params["head"], grads["head"])
        params = params | {"head": head}
        found.append([float(loss), float(metrics["accepted"])])
    assert np.mean(found[-5:], 0)[0] < 0.5 * found[0][0]
    assert found[0][1] < 0.3 and np.mean(found[-5:], 0)[1] > 1.0, found
