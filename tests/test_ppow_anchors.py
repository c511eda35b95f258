"""Where PPOW's windows begin: criticality by hand, uniform and informed draws, scores that grow stale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from ppow_jax import windows
from ppow_jax.settings import AdawSettings
from ppow_jax.stages import ppow

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T = 3, 14
TOKENS = np.random.default_rng(6).integers(small.TINY.vocab_size, size=(B, T)).astype(np.int32)
ASSISTANT = (np.arange(T) >= 3) & (np.arange(T) < np.array([[T], [T - 3], [9]]))
INDEX = np.array([4, 0, 2], np.int32)  # of these texts among five
BATCH = {"index": INDEX, "tokens": TOKENS, "assistant": ASSISTANT}
ANCHORS = np.pad(ASSISTANT[:, 2:], ((0, 0), (0, 2)))
ADAW = AdawSettings(enabled=True, warmup_steps=10, rescore_every=5)
WINDOW = 3


def state_of(tiny, scores: np.ndarray, scored_at: np.ndarray) -> dict:
    return {
        "params": tiny.weights.params,
        "vocab": tiny.weights.vocab,
        "scores": jnp.asarray(scores, jnp.float32),
        "scored_at": jnp.asarray(scored_at, jnp.int32),
    }


def picker(tiny, adaw: AdawSettings, anchors: int = 1):
    settings = small.ppow_settings(anchors=anchors, window=WINDOW, adaw=adaw)
    return ppow.make_pick(tiny.target, tiny.drafter, settings)


@pytest.fixture(scope="module")
def values(tiny) -> np.ndarray:
    """(1 - H(P) / log V) KL(P || Q) at every anchor, `[B, T]`, in NumPy; KL over the draft vocabulary."""
    found = np.zeros((B, T))
    for b, t in np.argwhere(ANCHORS):
        tokens = TOKENS[b].tolist()
        logits, inputs = reference.target_text(tiny.params, small.TINY, tokens)
        taps = np.concatenate([inputs[i] for i in small.TINY.taps], -1)
        (drafted,) = reference.drafter_window(
            tiny.weights.params,
            tiny.drafter.config,
            tiny.weights.embedding,
            taps,
            tokens,
            t,
            1,
            lambda *_: 0,
        )
        whole = reference.log_softmax(logits[t + 1])
        p, q = reference.log_softmax(logits[t + 1, small.DRAFT_VOCAB]), reference.log_softmax(drafted)
        confidence = 1 + (np.exp(whole) * whole).sum() / np.log(small.TINY.vocab_size)
        found[b, t] = confidence * (np.exp(p) * (p - q)).sum()
    return found


@pytest.fixture(scope="module")
def scores(values) -> np.ndarray:
    """Means over the anchors of each window."""
    found = np.zeros((B, T))
    for b, t in np.argwhere(ANCHORS):
        inside = [values[b, s] for s in range(t, min(t + WINDOW, T)) if ANCHORS[b, s]]
        found[b, t] = np.mean(inside)
    return found


def test_anchors_are_the_positions_whose_prediction_the_target_wrote():
    assert (np.asarray(windows.anchor_mask(ASSISTANT)) == ANCHORS).all()


def test_scores_are_the_mean_criticality_of_each_window(tiny, scores):
    score = jax.jit(ppow.criticality, static_argnums=(0, 1, 5))
    state = state_of(tiny, np.zeros((5, T)), np.zeros(5))
    got = score(tiny.target, tiny.drafter, state, tiny.params, BATCH, WINDOW)
    assert np.ptp(scores[ANCHORS]) > 0.1
    np.testing.assert_allclose(got, scores, atol=2e-4)


def test_scores_are_renewed_when_stale_and_only_then(tiny, scores):
    """Step 20; scores stay valid for 5 steps: those of step 15 are, those of step 14 are not."""
    old = np.random.default_rng(0).uniform(1, 2, size=(5, T)).astype(np.float32)
    scored_at = np.array([15, 0, 14, 0, -(2**30)], np.int32)
    pick = picker(tiny, ADAW)
    table, _, _ = pick(state_of(tiny, old, scored_at), tiny.params, BATCH, 20, jax.random.key(0))
    assert table["scored_at"].tolist() == [15, 0, 20, 0, 20]
    want = old.copy()
    want[4], want[2] = scores[0], scores[2]
    np.testing.assert_allclose(table["scores"], want, atol=2e-4)
    assert (np.asarray(table["scores"])[[0, 1, 3]] == old[[0, 1, 3]]).all()
    warm, _, _ = pick(state_of(tiny, old, scored_at), tiny.params, BATCH, 10, jax.random.key(0))
    assert (np.asarray(warm["scores"]) == old).all()
    assert warm["scored_at"].tolist() == scored_at.tolist()


ROWS = 4000


def draws(tiny, adaw: AdawSettings, number: int, scores: np.ndarray) -> np.ndarray:
    """How often each position of the first text is drawn when its scores, just made, are these."""
    many = {k: np.repeat(v[:1], ROWS, 0) for k, v in BATCH.items()}
    table = np.zeros((5, T))
    table[INDEX[0]] = scores
    state = state_of(tiny, table, np.full(5, number - 1))
    _, anchors, real = picker(tiny, adaw)(state, tiny.params, many, number, jax.random.key(number))
    assert real.all()
    return np.bincount(np.asarray(anchors)[:, 0], minlength=T)


@pytest.mark.parametrize(
    ("changes", "number", "informed"),
    [({}, 11, True), ({}, 10, False), ({"enabled": False}, 11, False)],
    ids=["after the warm-up", "during it", "switched off"],
)
def test_anchors_are_drawn_by_score_after_the_warm_up_and_evenly_without(tiny, changes, number, informed):
    weights = np.where(ANCHORS[0], 1.0 + np.arange(T) % 4 * 2, 0.0)
    seen = draws(tiny, dataclasses.replace(ADAW, **changes), number, weights)
    law = weights if informed else ANCHORS[0].astype(float)
    expected = ROWS * law / law.sum()
    assert seen[expected == 0].sum() == 0
    some = expected > 0
    chi = ((seen - expected)[some] ** 2 / expected[some]).sum()
    assert chi < 40  # 10 degrees: p ~ 2e-5


def test_a_text_whose_scores_are_all_zero_is_drawn_from_evenly(tiny):
    seen = draws(tiny, ADAW, 11, np.zeros(T))
    assert seen[~ANCHORS[0]].sum() == 0
    assert seen[ANCHORS[0]].min() > ROWS / ANCHORS[0].sum() * 0.7
