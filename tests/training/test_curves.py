"""The acceptance curves, against drafters whose distribution is known."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from ppow_jax.data import texts
from ppow_jax.decode.simulate import expected_accepted
from ppow_jax.drafters.eagle3 import weights_of
from ppow_jax.drafters.windows import text_prefix, text_starts, window_pass
from ppow_jax.errors import UserError
from ppow_jax.stages.train import corpus
from ppow_jax.training import curves, drafters

VOCAB = np.array([0, 1, 2, 3, 5, 6])  # token 4 cannot be drafted
TEXT = [3, 1, 2, 4, 1, 2, 1, 5, 0, 0]


def distributions() -> np.ndarray:
    """One over `VOCAB` after each token."""
    values = np.random.default_rng(3).gamma(1.0, size=(small.markov.SIZE, len(VOCAB)))
    return values / values.sum(1, keepdims=True)


def test_expected_acceptance_is_the_sum_of_products_of_the_drafters_probabilities(chain):
    drafter, weights = chain.drafter(distributions(), VOCAB)
    tokens = np.array([TEXT], np.int32)
    taps = jnp.zeros((1, len(TEXT), drafter.config.taps_width))
    end, K = 8, 3
    anchors = np.array([[0, 1, 2, 3, 4, 5]], np.int32)
    found = expected_accepted(drafter, weights, taps, tokens, np.array([end]), anchors, K)

    def after(token: int, following: int) -> float:
        return float(distributions()[token, following == VOCAB].sum())  # 0 for a token that cannot be drafted

    for anchor, length in zip(anchors[0], found[0], strict=True):
        want, product = 0.0, 1.0
        for at in range(anchor + 2, min(anchor + 2 + K, end)):
            product *= after(TEXT[at - 1], TEXT[at])
            want += product
        assert float(length) == pytest.approx(want, abs=1e-5)
    assert float(found[0, 1]) == 0.0  # its first token is token 4
    assert 0 < float(found[0, 5]) < 1.0  # one token before the text's end


def test_anchors_are_spread_over_the_first_response(tmp_path):
    run = runs.build(tmp_path / "w", data__cache_features=False)
    responses = [(2, 30), (2, 4), (4, 32)]
    items = []
    for start, end in responses:
        inside = (np.arange(32) >= start) & (np.arange(32) < end)
        items.append({"tokens": np.ones(32, np.int32), "assistant": inside})
    sample = curves._sample(run, items)
    real = [row[keep].tolist() for row, keep in zip(sample.anchors, sample.real, strict=True)]
    # the window at t drafts t + 2; the response's first token is prefill's
    assert real[1] == [1]
    for (start, end), row in zip(responses, real, strict=True):
        assert row[0] == start - 1 and row[-1] + 2 < end
    assert len(real[0]) == len(real[2]) == 16 and real[2][-1] >= 27


def test_curves_are_measured_on_held_out_and_on_training_texts(tmp_path):
    workdir = tmp_path / "w"
    chosen = dict(stages=("respond", "train"), runs=("supervise",), train__supervise__steps=20)
    runs.run(workdir, **chosen)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    measured = [r for r in rows if "holdout_tau" in r]
    assert [r["step"] for r in measured] == [7, 14, 20]
    run = runs.build(workdir, **chosen)
    found, trained = corpus(run), drafters.load(run, "supervise")
    state = {"params": trained.params, "opt_state": (None,), "vocab": trained.vocab}
    again = curves.acceptance(run, found, trained.drafter)(state)
    one = dataclasses.replace(run.settings.evaluate, batch_size=1)
    by_one = dataclasses.replace(run, settings=dataclasses.replace(run.settings, evaluate=one))
    assert len(found.held) > 1
    assert curves.acceptance(by_one, found, trained.drafter)(state) == pytest.approx(again, abs=1e-5)
    assert set(again) == {"holdout_tau", "holdout_sampled", "train_tau", "train_sampled"}
    for key, value in again.items():
        assert measured[-1][key] == pytest.approx(value, abs=1e-5)
    assert again["holdout_sampled"] != again["train_sampled"]
    silent = jax.tree.map(jnp.zeros_like, state["params"])  # drafts evenly
    even = curves.acceptance(run, found, trained.drafter)(state | {"params": silent})
    assert even["holdout_sampled"] < 0.1 < again["holdout_sampled"]
    given = runs.build(workdir, respond__keep_answers=True, train__ppow__temperature=1.0)
    assert curves.acceptance(given, found, trained.drafter)(state) == {}


def test_a_run_learns_from_as_many_texts_as_it_says(tmp_path, monkeypatch):
    seen = set()
    iterate = texts.iterate

    def watched(of, *rest):
        seen.update(int(of[at]["index"]) for at in range(len(of)))
        return iterate(of, *rest)

    monkeypatch.setattr(texts, "iterate", watched)
    runs.run(tmp_path / "w", stages=("respond", "train"), runs=("supervise",), train__supervise__texts=5)
    assert len(seen) == 5
    with pytest.raises(UserError, match=r"config.train.supervise.texts: found 500, expected at most"):
        many = dict(runs=("supervise",), train__supervise__texts=500)
        runs.run(tmp_path / "v", stages=("respond", "train"), **many)


def test_sampled_texts_are_measured_as_they_were_sampled(tmp_path):
    """tau by draws, and the mean accepted length of all windows: by hand, from the two distributions."""
    chosen = dict(stages=("respond", "train"), runs=("supervise",), respond__temperature=0.8)
    chosen |= dict(train__supervise__steps=20, evaluate__window=1)
    runs.run(tmp_path / "w", **chosen)
    run = runs.build(tmp_path / "w", **chosen)
    corpus_, trained = corpus(run), drafters.load(run, "supervise")
    state = {"params": trained.params, "opt_state": (None,), "vocab": trained.vocab}
    found = curves.acceptance(run, corpus_, trained.drafter)(state)
    assert set(found) == {"holdout_tau", "holdout_sampled", "train_tau", "train_sampled"}
    sample = curves._sample(run, [corpus_.held[i] for i in range(len(corpus_.held))])
    weights = weights_of(trained.params, run.target_params, trained.vocab)
    prefix = text_prefix(trained.drafter, weights, sample.texts.taps, sample.texts.tokens)
    ways = text_starts(prefix, sample.texts.tokens, sample.anchors)

    def choose(_, hidden, logits, given):
        return jnp.zeros(logits.shape[:3], jnp.int32), jax.nn.softmax(logits / 0.8)

    drafted = window_pass(trained.drafter, weights, prefix.keys_values, ways, choose, 1, lambda step: None)
    q, vocab, lengths = np.asarray(drafted[:, :, 0, :, 0]), np.asarray(trained.vocab), []
    p = np.exp(np.asarray(sample.sampled.log_prob))
    for b, a in np.argwhere(sample.real):
        at = int(sample.anchors[b, a]) + 2
        own = vocab == int(sample.texts.tokens[b, at])
        lengths.append(min(1.0, q[b, a, own].sum() / p[b, at]))
    assert found["holdout_sampled"] == pytest.approx(np.mean(lengths), rel=1e-3)
    assert 0.05 < np.mean(lengths) < 0.99
    # of chains of one token: a round emits two tokens where the draft is accepted
    assert found["holdout_tau"] == pytest.approx(1 + np.mean(lengths), abs=0.15)
