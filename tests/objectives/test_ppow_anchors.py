"""Where PPOW's windows begin: criticality by hand, uniform and informed draws, scores that grow stale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from ppow_jax.drafters import windows
from ppow_jax.models.target_outputs import outputs_of
from ppow_jax.objectives.anchors import AnchorRule, blank_table, criticality, pick_anchors, round_beginnings
from ppow_jax.objectives.base import Sizes, models_of

B, T = 3, 14
TOKENS = np.random.default_rng(6).integers(small.TINY.vocab_size, size=(B, T)).astype(np.int32)
ASSISTANT = (np.arange(T) >= 3) & (np.arange(T) < np.array([[T], [T - 3], [9]]))
INDEX = np.array([4, 0, 2], np.int32)  # of these texts among five
BATCH = {"index": INDEX, "tokens": TOKENS, "assistant": ASSISTANT}
ANCHORS = np.pad(ASSISTANT[:, 2:], ((0, 0), (0, 2)))
ADAW = AnchorRule("adaw", warmup_steps=10, rescore_every=5)
WINDOW = 3


def table(scores: np.ndarray, scored_at: np.ndarray) -> dict:
    return {"scores": jnp.asarray(scores, jnp.float32), "scored_at": jnp.asarray(scored_at, jnp.int32)}


def picker(tiny, rule: AnchorRule, anchors: int = 1):
    """(memory, batch, step, key) -> (picked, memory), jitted."""

    @jax.jit
    def pick(memory, batch, step, key):
        models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
        outputs = outputs_of(tiny.target, tiny.params, batch)
        return pick_anchors(rule, models, batch, outputs, memory, step, key, anchors, WINDOW)

    return pick


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
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
    outputs = jax.jit(outputs_of, static_argnums=0)(tiny.target, tiny.params, BATCH)
    got = jax.jit(criticality, static_argnums=3)(models, BATCH, outputs, WINDOW)
    assert np.ptp(scores[ANCHORS]) > 0.1
    np.testing.assert_allclose(got, scores, atol=2e-4)


def test_scores_are_renewed_when_stale_and_only_then(tiny, scores):
    """Step 20; scores stay valid for 5 steps: those of step 15 are, those of step 14 are not."""
    old = np.random.default_rng(0).uniform(1, 2, size=(5, T)).astype(np.float32)
    scored_at = np.array([15, 0, 14, 0, -(2**30)], np.int32)
    pick = picker(tiny, ADAW)
    _, memory = pick(table(old, scored_at), BATCH, 20, jax.random.key(0))
    assert memory["scored_at"].tolist() == [15, 0, 20, 0, 20]
    want = old.copy()
    want[4], want[2] = scores[0], scores[2]
    np.testing.assert_allclose(memory["scores"], want, atol=2e-4)
    assert (np.asarray(memory["scores"])[[0, 1, 3]] == old[[0, 1, 3]]).all()
    _, warm = pick(table(old, scored_at), BATCH, 10, jax.random.key(0))
    assert (np.asarray(warm["scores"]) == old).all()
    assert warm["scored_at"].tolist() == scored_at.tolist()


ROWS = 4000


def draws(tiny, rule: AnchorRule, number: int, scores: np.ndarray) -> np.ndarray:
    """How often each position of the first text is drawn when its scores, just made, are these."""
    many = {k: np.repeat(v[:1], ROWS, 0) for k, v in BATCH.items()}
    known = np.zeros((5, T))
    known[INDEX[0]] = scores
    memory = table(known, np.full(5, number - 1))
    picked, _ = picker(tiny, rule)(memory, many, number, jax.random.key(number))
    assert picked.real.all()
    return np.bincount(np.asarray(picked.anchors)[:, 0], minlength=T)


@pytest.mark.parametrize(
    ("changes", "number", "informed"),
    [({}, 11, True), ({}, 10, False), ({"rule": "uniform"}, 11, False)],
    ids=["after the warm-up", "during it", "switched off"],
)
def test_anchors_are_drawn_by_score_after_the_warm_up_and_evenly_without(tiny, changes, number, informed):
    weights = np.where(ANCHORS[0], 1.0 + np.arange(T) % 4 * 2, 0.0)
    seen = draws(tiny, dataclasses.replace(ADAW, **changes), number, weights)
    chances = weights if informed else ANCHORS[0].astype(float)
    expected = ROWS * chances / chances.sum()
    assert seen[expected == 0].sum() == 0
    some = expected > 0
    chi = ((seen - expected)[some] ** 2 / expected[some]).sum()
    assert chi < 40  # 10 degrees: p ~ 2e-5


def test_a_text_whose_scores_are_all_zero_is_drawn_from_evenly(tiny):
    seen = draws(tiny, ADAW, 11, np.zeros(T))
    assert seen[~ANCHORS[0]].sum() == 0
    assert seen[ANCHORS[0]].min() > ROWS / ANCHORS[0].sum() * 0.7


def test_rounds_begin_where_a_walk_along_the_text_drafts_anew(tiny):
    """Drafts in NumPy from each beginning on; a round ends behind its first mistake or its last token."""
    models = models_of(tiny.target, tiny.drafter, tiny.params, tiny.weights.params, tiny.weights.vocab)
    outputs = jax.jit(outputs_of, static_argnums=0)(tiny.target, tiny.params, BATCH)
    got = np.asarray(jax.jit(round_beginnings, static_argnums=3)(models, BATCH, outputs, WINDOW))
    want, weights = np.zeros((B, T)), tiny.weights
    for b in range(B):
        tokens, start = TOKENS[b].tolist(), int(ASSISTANT[b].argmax())
        end, anchor = start + int(ASSISTANT[b].sum()), start - 1
        while anchor + 2 < end:
            want[b, anchor] = 1
            ahead = np.pad(tokens, (0, WINDOW))[anchor + 2 : anchor + 2 + WINDOW]
            about = (weights.params, tiny.drafter.config, weights.embedding, outputs.taps[b], tokens)
            logits = reference.drafter_window(*about, anchor, WINDOW, lambda j, _, ahead=ahead: ahead[j])
            right = small.DRAFT_VOCAB[logits.argmax(-1)] == ahead
            right &= anchor + 2 + np.arange(WINDOW) < end
            anchor += int(right.cumprod().sum()) + 1
    assert (got == want).all()


def test_what_decoding_begins_with_is_drawn_from(tiny):
    """After the warm-up only beginnings of rounds are anchors; the table is empty before."""
    rule = AnchorRule("rounds", warmup_steps=0, rescore_every=5)
    memory = blank_table(rule, Sizes(5, T))
    picked, memory = picker(tiny, rule, 4)(memory, BATCH, 1, jax.random.key(0))
    beginnings = np.asarray(memory["scores"])[INDEX] > 0
    assert beginnings.any(1).all()
    for b in range(B):
        drawn = np.asarray(picked.anchors)[b][np.asarray(picked.real)[b]]
        assert beginnings[b, drawn].all() and len(drawn) == min(4, beginnings[b].sum())
