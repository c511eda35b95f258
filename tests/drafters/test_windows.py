"""The one primitive against EAGLE-3 written out in NumPy, and who sees what."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from ppow_jax.drafters import eagle3, windows
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights

B, T, A, G, K = 2, 14, 3, 2, 4
N = len(small.DRAFT_VOCAB)
ANCHORS = np.array([[0, 6, 11], [3, 12, 6]], np.int32)
RNG = np.random.default_rng(3)
TOKENS = RNG.integers(small.TINY.vocab_size, size=(B, T)).astype(np.int32)
TAPS = RNG.normal(size=(B, T, 3 * small.TINY.width)).astype(np.float32)
GIVEN = RNG.integers(small.TINY.vocab_size, size=(B, A, G, K)).astype(np.int32)


@functools.partial(jax.jit, static_argnames="drafter")
def forced(drafter, weights, taps, tokens, anchors, given) -> jax.Array:
    """Logits `[B, A, G, K, N]` of windows whose tokens are given."""
    prefix = windows.text_prefix(drafter, weights, taps, tokens)
    start = windows.text_starts(prefix, tokens, anchors)

    def choose(step, hidden, logits, _):
        return given[..., step], jnp.broadcast_to(logits, (*given.shape[:3], N))

    out = windows.window_pass(drafter, weights, prefix.keys_values, start, choose, given.shape[-1])
    return jnp.moveaxis(out, -1, -2)


def chosen_by(tiny, choose):
    """The statistics of windows that `choose` goes on with."""

    @jax.jit
    def run(weights):
        prefix = windows.text_prefix(tiny.drafter, weights, TAPS, TOKENS)
        start = windows.text_starts(prefix, TOKENS, ANCHORS)
        return windows.window_pass(tiny.drafter, weights, prefix.keys_values, start, choose, K)

    return run(tiny.weights)


def slowly(tiny, b: int, a: int, choose, weights: DrafterWeights | None = None) -> np.ndarray:
    """The reference's logits `[K, N]` of one window."""
    w, shape = weights or tiny.weights, tiny.drafter.config
    return reference.drafter_window(
        w.params, shape, w.embedding, TAPS[b], TOKENS[b].tolist(), ANCHORS[b, a], K, choose
    )


@pytest.fixture(scope="module")
def logits(tiny) -> np.ndarray:
    return np.asarray(forced(tiny.drafter, tiny.weights, TAPS, TOKENS, ANCHORS, GIVEN))


def test_logits_of_every_window_are_those_of_eagle_3_in_numpy(tiny, logits):
    assert logits.shape == (B, A, G, K, N)
    for b, a, g in np.ndindex(B, A, G):
        want = slowly(tiny, b, a, lambda step, _, given=GIVEN[b, a, g]: given[step])
        np.testing.assert_allclose(logits[b, a, g], want, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("layers", "normed"), [(3, False), (1, True), (2, True)])
def test_drafters_of_more_layers_or_with_another_residual(tiny, layers, normed):
    shape = dataclasses.replace(tiny.drafter.config, layers=layers, normed_residual=normed)
    weights = tiny.weights._replace(params=small.randomise(eagle3.abstract_params(shape), 3))
    found = forced(Drafter(shape), weights, TAPS, TOKENS, ANCHORS, GIVEN)
    for b, a, g in np.ndindex(B, A, G):
        inputs = (weights.params, shape, weights.embedding, TAPS[b], TOKENS[b].tolist(), ANCHORS[b, a], K)
        want = reference.drafter_window(*inputs, lambda step, _, given=GIVEN[b, a, g]: given[step])
        np.testing.assert_allclose(found[b, a, g], want, atol=2e-4, rtol=0)


def test_a_greedy_chain_feeds_on_its_own_tokens_and_names_them_by_target_id(tiny):
    vocab = np.asarray(tiny.weights.vocab)
    chosen = chosen_by(tiny, windows.greedy(tiny.weights.vocab))
    assert chosen.shape == (B, A, 1, K)
    for b, a in np.ndindex(B, A):
        want = slowly(tiny, b, a, lambda _, row: vocab[row.argmax()])
        assert chosen[b, a, 0].tolist() == vocab[want.argmax(-1)].tolist()


def test_log_probs_of_a_rollout_are_those_of_its_tokens_recomputed(tiny):
    """Sampled from the drafter, then forced through it again, and through the reference."""

    def roll(step, hidden, logits, given):
        probs = jax.nn.log_softmax(jnp.broadcast_to(logits, (B, A, G, N)))
        ids = jax.random.categorical(jax.random.fold_in(jax.random.key(5), step), probs)
        tokens = tiny.weights.vocab[ids]
        return tokens, (ids, tokens, jnp.take_along_axis(probs, ids[..., None], -1)[..., 0])

    ids, tokens, log_prob = map(np.asarray, chosen_by(tiny, roll))
    assert len({tuple(w) for w in ids.reshape(-1, K)}) > A * B  # a group is not one window twice
    again = reference.log_softmax(
        np.asarray(forced(tiny.drafter, tiny.weights, TAPS, TOKENS, ANCHORS, tokens))
    )
    again = np.take_along_axis(again, ids[..., None], -1)[..., 0]
    np.testing.assert_allclose(log_prob, again, atol=1e-5, rtol=0)
    for b, a, g in np.ndindex(B, A, G):
        slow = reference.log_softmax(slowly(tiny, b, a, lambda s, _, w=tokens[b, a, g]: w[s]))
        want = slow[np.arange(K), ids[b, a, g]]
        np.testing.assert_allclose(log_prob[b, a, g], want, atol=2e-4, rtol=0)


def test_windows_do_not_influence_one_another(tiny, logits):
    """Another token in one window changes that window from the next step on, and nothing else."""
    given = GIVEN.copy()
    given[1, 2, 0, 1] += 1
    given %= small.TINY.vocab_size
    other = np.asarray(forced(tiny.drafter, tiny.weights, TAPS, TOKENS, ANCHORS, given))
    change = np.abs(other - logits).max(-1)
    assert (change[1, 2, 0, 2:] > 1e-2).all()
    change[1, 2, 0, 2:] = 0
    assert change.max() <= 1e-6


def test_anchors_and_rows_do_not_influence_one_another(tiny, logits):
    anchors, tokens, taps = ANCHORS.copy(), TOKENS.copy(), TAPS.copy()
    anchors[0, 1] = 8
    tokens[1], taps[1] = tokens[1, ::-1], taps[1, ::-1]
    other = np.asarray(forced(tiny.drafter, tiny.weights, taps, tokens, anchors, GIVEN))
    change = np.abs(other - logits).max((-1, -2, -3))
    assert change[0, [0, 2]].max() <= 1e-6
    assert change[0, 1] > 1e-2
    assert (change[1] > 1e-2).all()


@pytest.mark.parametrize(
    ("what", "offset", "seen"),
    [("taps", 0, True), ("taps", 1, False), ("tokens", 1, True), ("tokens", 2, False)],
)
def test_a_window_sees_taps_up_to_its_anchor_and_tokens_one_further(tiny, logits, what, offset, seen):
    tokens, taps = TOKENS.copy(), TAPS.copy()
    b, a = 0, 1
    first = ANCHORS[b, a] + offset
    if what == "taps":
        taps[b, first:] += 1.0
    else:
        tokens[b, first:] = (tokens[b, first:] + 1) % small.TINY.vocab_size
    other = np.asarray(forced(tiny.drafter, tiny.weights, taps, tokens, ANCHORS, GIVEN))
    change = np.abs(other - logits).max((-1, -2, -3))[b, a]
    assert change > 1e-2 if seen else change <= 1e-6


def test_a_window_sees_the_whole_prefix_up_to_its_anchor(tiny, logits):
    """Each single earlier position matters, position 0 too."""
    b, a = 1, 2
    for position in range(ANCHORS[b, a] + 1):
        taps = TAPS.copy()
        taps[b, position] = -taps[b, position]
        other = np.asarray(forced(tiny.drafter, tiny.weights, taps, TOKENS, ANCHORS, GIVEN))
        assert np.abs(other - logits)[b, a].max() > 1e-3, position


def test_gradients_flow_through_the_drafters_own_hidden_states(tiny):
    """The derivative of a window's log-probability is that of the reference, by differences."""
    b, a, given = 1, 0, GIVEN[1, 0, 0]
    ids = np.arange(K)
    direction = small.randomise(jax.eval_shape(lambda: tiny.weights.params), 9)

    def total(params):
        weights = tiny.weights._replace(params=params)
        args = (TAPS[b : b + 1], TOKENS[b : b + 1], ANCHORS[b : b + 1, :1], given[None, None, None])
        logits = forced(tiny.drafter, weights, *args)[0, 0, 0]
        return jax.nn.log_softmax(logits)[ids, ids].sum()

    def slow_total(params):
        logits = slowly(tiny, b, a, lambda s, _: given[s], tiny.weights._replace(params=params))
        return reference.log_softmax(logits)[ids, ids].sum()

    gradient = jax.grad(total)(tiny.weights.params)
    for part in ("fuse", "attention", "head", "hidden_norm"):
        got = sum(
            float(jnp.vdot(x, y))
            for x, y in zip(jax.tree.leaves(gradient[part]), jax.tree.leaves(direction[part]), strict=True)
        )
        shifted = []
        for sign in (1, -1):
            params = reference.float64(tiny.weights.params)
            move = reference.float64(direction[part])
            params[part] = jax.tree.map(lambda x, y, s=sign: x + s * 1e-5 * y, params[part], move)
            shifted.append(slow_total(params))
        want = (shifted[0] - shifted[1]) / 2e-5
        assert got == pytest.approx(want, rel=2e-3, abs=2e-3), part
