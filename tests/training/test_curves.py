"""The acceptance curves, against drafters whose distribution is known."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from ppow_jax.decode.simulate import expected_accepted
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
    texts = [(2, 30), (2, 4), (4, 32)]
    items = []
    for start, end in texts:
        inside = (np.arange(32) >= start) & (np.arange(32) < end)
        items.append({"tokens": np.ones(32, np.int32), "assistant": inside})
    sample = curves._sample(run, items)
    real = [row[keep].tolist() for row, keep in zip(sample.anchors, sample.real, strict=True)]
    # the window at t drafts t + 2; the response's first token is prefill's
    assert real[1] == [1]
    for (start, end), row in zip(texts, real, strict=True):
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
    texts, trained = corpus(run), drafters.load(run, "supervise")
    state = {"params": trained.params, "opt_state": (None,), "vocab": trained.vocab}
    again = curves.acceptance(run, texts, trained.drafter)(state)
    one = dataclasses.replace(run.settings.evaluate, batch_size=1)
    by_one = dataclasses.replace(run, settings=dataclasses.replace(run.settings, evaluate=one))
    assert len(texts.held) > 1
    assert curves.acceptance(by_one, texts, trained.drafter)(state) == pytest.approx(again, abs=1e-5)
    assert set(again) == {"holdout_tau", "holdout_sampled", "train_tau", "train_sampled"}
    for key, value in again.items():
        assert measured[-1][key] == pytest.approx(value, abs=1e-5)
    assert again["holdout_sampled"] != again["train_sampled"]
    silent = jax.tree.map(jnp.zeros_like, state["params"])  # drafts evenly
    even = curves.acceptance(run, texts, trained.drafter)(state | {"params": silent})
    assert even["holdout_sampled"] < 0.1 < again["holdout_sampled"]
    sampled = runs.build(workdir, respond__temperature=1.0, train__ppow__temperature=1.0)
    assert curves.acceptance(sampled, texts, trained.drafter)(state) == {}
