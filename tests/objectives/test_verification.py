"""Scoring many drafted windows in one forward is scoring each as an ordinary text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from ppow_jax.drafters import windows
from ppow_jax.models import target_outputs
from ppow_jax.objectives import verification

B, T, W, K = 2, 12, 6, 4
RNG = np.random.default_rng(5)
TOKENS = RNG.integers(small.TINY.vocab_size, size=(B, T)).astype(np.int32)
ANCHORS = np.array([[0, 0, 3, 10, 7, 5], [9, 2, 2, 2, 6, 10]], np.int32)
DRAFTED = RNG.integers(small.TINY.vocab_size, size=(B, W, K)).astype(np.int32)
WANTED = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 0]], bool)


@pytest.fixture(scope="module")
def read(tiny):
    return jax.jit(target_outputs.read, static_argnums=0)(tiny.target, tiny.params, TOKENS)


@functools.partial(jax.jit, static_argnames=("target", "chunk", "temperature"))
def score(target, params, cache, hidden, drafted, needed, chunk, temperature):
    args = (hidden, ANCHORS, drafted, needed, chunk, temperature)
    return verification.score_windows(target, params, cache, *args)


@pytest.fixture(scope="module")
def alone(tiny) -> tuple[np.ndarray, np.ndarray]:
    """Of each window as the end of an ordinary text: logits and hidden states, `[B, W, K, ...]`."""
    texts = np.zeros((B, W, T + K + 1), np.int32)
    ends = ANCHORS + 2
    for b, w in np.ndindex(B, W):
        text = [*TOKENS[b, : ends[b, w]], *DRAFTED[b, w]]
        texts[b, w, : len(text)] = text
    flat = texts.reshape(B * W, -1)
    out, logits = small.forward(tiny.target, tiny.params, flat)
    at = (ends[..., None] - 1 + np.arange(K)).reshape(B * W, K)

    def pick(x):
        return np.asarray(x)[np.arange(B * W)[:, None], at].reshape(B, W, K, -1)

    return pick(logits), pick(out.hidden[:, 0])


def check(scores, alone, needed, window: int, temperature: float) -> None:
    logits, hidden = (x[:, :, :window] for x in alone)
    drafted = DRAFTED[:, :, :window, None]
    log_prob = np.take_along_axis(reference.log_softmax(logits), drafted, -1)[..., 0]
    tempered = reference.log_softmax(logits / (temperature or 1))
    tempered = np.take_along_axis(tempered, drafted, -1)[..., 0]
    for got, want in zip(scores, (log_prob, tempered, hidden), strict=True):
        assert got.shape == want.shape
        np.testing.assert_allclose(np.asarray(got)[needed], want[needed], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("window", "chunk", "temperature"), [(1, 2, 1.0), (4, 2, 0.0), (4, 3, 0.7), (4, 1, 1.0)]
)
def test_every_window_asked_for_is_scored_as_an_ordinary_text(tiny, read, alone, window, chunk, temperature):
    """Rows ask for four windows and for one; what nobody asked for is skipped."""
    outputs, cache = read
    scores = score(
        tiny.target,
        tiny.params,
        cache,
        outputs.hidden,
        DRAFTED[..., :window],
        WANTED,
        chunk,
        temperature,
    )
    check(scores, alone, WANTED, window, temperature)
    scored = np.asarray(scores.log_prob != 0).all(-1)
    chunks = -(-WANTED.sum(1).max() // chunk)  # of the fullest row
    assert (scored.sum(1) == chunks * chunk).all()
    for part in scores:
        assert not np.asarray(part)[~scored].any()


def test_all_or_none_of_the_windows(tiny, read, alone):
    outputs, cache = read
    args = (tiny.target, tiny.params, cache, outputs.hidden, DRAFTED)
    everything = np.ones((B, W), bool)
    check(score(*args, everything, 2, 0.0), alone, everything, K, 0.0)
    for part in score(*args, ~everything, 2, 0.0):
        assert not part.any()


def test_the_block_mask_gives_each_window_the_hidden_states_of_an_ordinary_text(tiny, read, alone):
    _, cache = read
    run = jax.jit(windows.target_window_pass, static_argnums=0)
    hidden = run(tiny.target, tiny.params, cache, ANCHORS, DRAFTED[..., :-1])
    np.testing.assert_allclose(hidden, alone[1][:, :, 1:], atol=1e-5, rtol=0)


def test_windows_do_not_see_one_another_nor_the_text_beyond_their_anchor(tiny, read):
    outputs, cache = read
    args = (tiny.target, tiny.params)
    everything = np.ones((B, W), bool)
    before = score(*args, cache, outputs.hidden, DRAFTED, everything, 2, 0.0).log_prob
    drafted = DRAFTED.copy()
    drafted[0, 1, 0] += 1
    beyond = tuple(kv._replace(values=kv.values.at[:, :, 5:].set(7.0)) for kv in cache)  # 3 sees 0 .. 4
    after = score(*args, beyond, outputs.hidden, drafted % small.TINY.vocab_size, everything, 2, 0.0).log_prob
    change = np.abs(after - before).max(-1)
    assert (change[ANCHORS > 3] > 1e-2).all()
    assert change[0, 1] > 1e-2
    near = ANCHORS <= 3
    near[0, 1] = False
    assert change[near].max() <= 1e-6


def test_outputs_on_a_text_are_the_distribution_of_its_next_tokens(tiny, read):
    outputs, cache = read
    entropy = target_outputs.entropy_of(tiny.target, tiny.params, outputs.hidden)
    assert len(cache) == small.TINY.layers
    assert cache[0].values.shape == (B, small.TINY.kv_heads, T, small.TINY.head_size)
    for b in range(B):
        logits, inputs = reference.target_text(tiny.params, small.TINY, TOKENS[b].tolist())
        logp = reference.log_softmax(logits)
        want = [logp[t, TOKENS[b, t + 1]] for t in range(T - 1)] + [0.0]
        np.testing.assert_allclose(outputs.log_prob[b], want, atol=1e-4, rtol=0)
        np.testing.assert_allclose(entropy[b], -(np.exp(logp) * logp).sum(-1), atol=1e-4, rtol=0)
        taps = np.concatenate([inputs[i] for i in small.TINY.taps], -1)
        np.testing.assert_allclose(outputs.taps[b], taps, atol=1e-4, rtol=0)
        head = jnp.asarray(outputs.hidden[b]) @ tiny.params["head"]["weight"].T
        np.testing.assert_allclose(head, logits, atol=1e-4, rtol=0)
