"""Layers that see a few tokens only: everything that decodes writes what reading all anew would write."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from jax.sharding import Mesh

from ppow_jax.decode import batch, shapes
from ppow_jax.decode.drafting import Eagle
from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.drafters.windows import target_window_pass
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.target import Target
from ppow_jax.parallel import partition

CONFIG = DecodeConfig(14, small.NEVER)


@pytest.fixture(scope="module")
def pair() -> small.Pair:
    return small.tiny_pair(dataclasses.replace(small.TINY, spans=(5, 0, 3), local_theta=100.0))


@pytest.fixture(scope="module")
def wanted(pair) -> list[list[int]]:
    return [small.naive_greedy(pair.target, pair.params, p, 14) for p in small.PROMPTS]


def test_spans_matter(pair, wanted):
    target = Target(dataclasses.replace(pair.target.config, spans=()))
    assert wanted != [small.naive_greedy(target, pair.params, p, 14) for p in small.PROMPTS]


@pytest.mark.parametrize("shape", ["", "chain:3", "tree:8x3x3"])
def test_prompts_of_different_lengths_side_by_side(pair, wanted, shape):
    drafting = Eagle(pair.drafter, shapes.parse(shape)) if shape else None
    found = small.generate(pair, small.PROMPTS, CONFIG, drafting, pair.weights)
    assert np.asarray(found.tokens).tolist() == wanted


def test_large_batches(pair, wanted, monkeypatch):
    monkeypatch.setattr(batch, "_SLOTS", 8)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), partition.AXES)
    tokens = np.full((len(wanted), 8), 5, np.int32)
    for row, prompt in zip(tokens, small.PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in small.PROMPTS], np.int32)
    keys = jax.random.split(jax.random.key(0), len(wanted))
    found, _ = batch.decode_batch(pair.target, pair.params, tokens, lengths, keys, CONFIG, mesh)
    assert found.tokens.tolist() == wanted


def test_windows_that_branch_from_a_text(pair):
    text = np.arange(3, 15, dtype=np.int32)[None]
    out, _ = small.forward(pair.target, pair.params, text)
    anchors, tokens = np.array([[2, 7]]), np.array([[[9, 1, 4, 30], [8, 8, 2, 5]]], np.int32)
    inputs = (kv_cache.as_prefix(out.new), anchors, tokens)
    hidden = np.asarray(target_window_pass(pair.target, pair.params, *inputs))
    for w, anchor in enumerate(anchors[0]):
        whole = np.concatenate([text[0, : anchor + 2], tokens[0, w]])[None]
        want = small.forward(pair.target, pair.params, whole)[0].hidden[0, 0, anchor + 2 :]
        np.testing.assert_allclose(hidden[0, w], want, atol=2e-5)
