"""A fresh drafter with induction heads proposes what followed the same token before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

from ppow_jax.drafters import eagle3, induction, windows
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.models.layers import likeliest
from ppow_jax.models.target import abstract_params, head_matrix
from ppow_jax.stages import train
from ppow_jax.training import drafters

B, HALF, D, E, V = 16, 20, 64, 32, 40
WIDE = dataclasses.replace(small.TINY, width=D, heads=6, kv_heads=2, head_size=E, rope_theta=1e5)


def texts(rng, params):
    """Twenty different tokens and then the same twenty again, and taps that tell them: the lowest is the
    embedding, as after few layers, the others are noise of a residual stream's size."""
    half = np.stack([rng.permutation(V)[:HALF] for _ in range(B)])
    tokens = np.concatenate([half, half], 1).astype(np.int32)
    low = 3 * np.asarray(params["embedding"]["embedding"])[tokens]
    noise = rng.normal(size=(*tokens.shape, 2 * D)) * np.repeat([6.0, 20.0], D)
    return np.concatenate([low, noise], -1).astype(np.float32), tokens


class Case:
    """A fresh drafter for a random target of width 64, before and after."""

    def __init__(self, kv_heads):
        rng = np.random.default_rng(0)
        self.target_params = small.randomise(abstract_params(WIDE), 0)
        vocab = jnp.arange(V)
        self.config = eagle3.drafter_config(WIDE, V, 0, "float32", kv_heads)
        self.before = eagle3.init_params(self.config, WIDE, self.target_params, vocab, jax.random.key(0))
        self.taps, self.tokens = texts(rng, self.target_params)
        self.embedding = self.target_params["embedding"]["embedding"]
        self.after = self.begin([(self.taps, self.tokens, np.ones_like(self.tokens, bool))])
        self.unseen = texts(rng, self.target_params)
        self.weights = lambda params: DrafterWeights(params, self.embedding, vocab)

    def begin(self, texts):
        head = head_matrix(WIDE, self.target_params)
        return induction.begin(Drafter(self.config), self.before, self.embedding, head, texts)

    def hits(self, params, steps=2):
        """Shares of windows' tokens that are right in the second half of unseen texts, by step."""
        taps, tokens = self.unseen
        anchors = jnp.broadcast_to(jnp.arange(HALF, 2 * HALF - 2 - steps), (B, HALF - 2 - steps))
        weights, drafter = self.weights(params), Drafter(self.config)
        prefix = windows.text_prefix(drafter, weights, taps, tokens)

        def choose(step, hidden, logits, given):
            right = windows.text_ahead(jnp.asarray(tokens), anchors, step)
            return right, likeliest(logits) == right

        start = windows.text_starts(prefix, jnp.asarray(tokens), anchors)
        found = windows.window_pass(drafter, weights, prefix.keys_values, start, choose, steps)
        return np.asarray(found).reshape(-1, steps).mean(0)


@pytest.mark.parametrize("kv_heads", [2, 6])
def test_what_followed_a_token_before_is_proposed_again(kv_heads):
    """One of two key/value heads, with three query heads each; and two of six. In the second step of a window
    the drafter's own hidden state, still full of the token before, is in the way."""
    case = Case(kv_heads)
    assert (case.hits(case.before) < 0.2).all()
    first, second = case.hits(case.after)
    assert first > 0.9 and second > 0.35, (first, second)


def test_only_the_last_third_of_the_heads_changes():
    case = Case(6)
    kept = 4 * E
    for name in ("query", "key", "value"):
        was, now = (p["attention"][name]["weight"] for p in (case.before, case.after))
        np.testing.assert_array_equal(was[:kept], now[:kept])
        assert (was[kept:] != now[kept:]).any(1).all()
    was, now = (p["attention"]["out"]["weight"] for p in (case.before, case.after))
    np.testing.assert_array_equal(was[:, :kept], now[:, :kept])
    for name in ("mlp", "mlp_norm", "norm", "head", "embedding_norm", "hidden_norm"):
        jax.tree.map(np.testing.assert_array_equal, case.before[name], case.after[name])


@pytest.mark.parametrize("kv_heads, first", [(2, 1), (6, 4)])
def test_matches_and_copies_have_the_strength_that_is_asked_for(kv_heads, first):
    """In NumPy, over the key/value heads from `first` on: a token's query with its own features' key is 10 on
    average before rotation, and a copied token's logit rises by 20, over all the heads, where the hidden
    state has the fused feature's size."""
    case = Case(kv_heads)
    unit = lambda x: x / np.sqrt(np.mean(x**2, -1, keepdims=True))  # noqa: E731
    weight = {name: np.asarray(case.after["attention"][name]["weight"]) for name in case.after["attention"]}
    fused = case.taps @ np.asarray(case.after["fuse"]["weight"]).T
    tokens, fused = case.tokens[:, 1:].ravel(), fused[:, 1:].reshape(-1, D)
    e = unit(np.asarray(case.embedding))
    f = unit(fused) * np.asarray(case.after["hidden_norm"]["scale"])
    copied = np.zeros((V, D))
    for h in range(first * 6 // kv_heads, 6):
        own, kv = (slice(g * E, (g + 1) * E) for g in (h, h * kv_heads // 6))
        queries, keys = e[tokens] @ weight["query"][own, :D].T, f @ weight["key"][kv, D:].T
        assert np.sum(queries * keys, -1).mean() / E**0.5 == pytest.approx(10, rel=0.1)
        copied += e @ weight["value"][kv, :D].T @ weight["out"][:, own].T
    rms = np.sqrt((fused**2).mean())
    head = np.asarray(head_matrix(WIDE, case.target_params)) * np.asarray(case.after["norm"]["scale"])
    head = head - head.mean(0) * (head @ head.mean(0) / (head.mean(0) @ head.mean(0)))[:, None]
    assert np.sum(head * copied, -1).mean() / rms == pytest.approx(20, rel=1e-3)


def test_padding_and_the_first_position_teach_nothing_and_batches_add_up():
    case = Case(6)
    real = np.ones((B, 2 * HALF + 3), bool)
    real[:, 2 * HALF :] = False
    taps, tokens = np.pad(case.taps, ((0, 0), (0, 3), (0, 0)), constant_values=7.0), case.tokens
    tokens = np.pad(tokens, ((0, 0), (0, 3)))
    taps[:, 0] = 1e4  # an attention sink
    found = case.begin([(taps[:9], tokens[:9], real[:9]), (taps[9:], tokens[9:], real[9:])])
    products = [  # of queries and keys: a direction's sign is free
        np.asarray(p["attention"]["query"]["weight"])[5 * E :].T @ p["attention"]["key"]["weight"][5 * E :]
        for p in (found, case.after)
    ]
    np.testing.assert_allclose(*products, atol=2e-3 * np.abs(products[1]).max())


@pytest.mark.slow
def test_a_run_begins_with_them_if_the_settings_say_so_and_reads_no_text_where_it_resumes(
    tmp_path, monkeypatch
):
    workdir = tmp_path / "w"
    runs.run(workdir, stages=("respond",))

    def fresh(on):
        experiment = runs.build(workdir, drafter__induction=on)
        vocab = np.arange(20, dtype=np.int32)
        return drafters.fresh(experiment, vocab, train.corpus(experiment)).params

    off, on = fresh(False), fresh(True)
    changed = [name for name in off if not jax.tree.all(jax.tree.map(np.array_equal, off[name], on[name]))]
    assert changed == ["attention", "fuse"]

    begun = []
    begin = induction.begin
    monkeypatch.setattr(induction, "begin", lambda *about: begun.append(about) or begin(*about))
    for _ in range(2):
        runs.run(workdir, stages=("respond", "train"), runs=("supervise",), train__supervise__steps=2)
        (workdir / "stages.json").unlink()  # as after a kill
        assert len(begun) == 1
