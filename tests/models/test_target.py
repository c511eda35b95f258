"""The target against a decoder written out in NumPy; cached and uncached; its taps; bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import small

from ppow_jax.models import attention, layers
from ppow_jax.models import cache as kv_cache
from ppow_jax.models.cache import KeyValues
from ppow_jax.models.target import Target, abstract_params, default_taps, fingerprint, head_matrix
from ppow_jax.parallel import partition

DEEP = dataclasses.replace(small.TINY, layers=6, taps=(1, 3, 4), tied_head=True, width=24)
B, T = 3, 13
TOKENS = np.random.default_rng(2).integers(small.TINY.vocab_size, size=(B, T)).astype(np.int32)


@pytest.fixture(scope="module")
def whole(tiny):
    return small.forward(tiny.target, tiny.params, TOKENS)


@pytest.mark.parametrize("shape", [small.TINY, DEEP], ids=["own head", "tied head"])
def test_logits_and_taps_are_those_of_a_llama_decoder_in_numpy(shape):
    """Taps are the inputs of the stated layers, in their order."""
    params = small.randomise(abstract_params(shape), 4)
    assert ("head" in params) != shape.tied_head
    out, logits = small.forward(Target(shape), params, TOKENS)
    assert logits.dtype == jnp.float32
    for b in range(B):
        want, inputs = reference.target_text(params, shape, TOKENS[b].tolist())
        scale = np.abs(want).max()
        np.testing.assert_allclose(logits[b], want, atol=1e-5 * scale, rtol=0)
        taps = np.split(np.asarray(out.taps[b, 0]), len(shape.taps), -1)
        for layer, tap in zip(shape.taps, taps, strict=True):
            np.testing.assert_allclose(tap, inputs[layer], atol=1e-4, rtol=0)
        head = np.asarray(head_matrix(shape, params))
        np.testing.assert_allclose(out.hidden[b, 0] @ head.T, want, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize(("layers", "taps"), [(30, (2, 15, 27)), (32, (2, 16, 29)), (36, (2, 18, 33))])
def test_the_default_taps_are_eagle_3s(layers, taps):
    assert default_taps(layers) == taps


@functools.partial(jax.jit, static_argnames="target")
def extend(target, params, cache, tokens_BxK, start_B):
    """Logits `[B, K, V]` and taps of each row's next tokens, and the cache with them."""
    positions = start_B[:, None] + jnp.arange(tokens_BxK.shape[1])
    visible = kv_cache.visible(start_B, cache[0].values.shape[2])
    out = target.apply({"params": params}, tokens_BxK[:, None], positions[:, None], cache, visible)
    logits = target.apply({"params": params}, out.hidden[:, 0], method=Target.logits)
    return logits, out.taps[:, 0], kv_cache.write(cache, kv_cache.as_prefix(out.new), start_B)


def test_cached_steps_equal_the_whole_text(tiny, whole):
    """Ragged prefill of junk-padded rows, single tokens, a block; slots hold junk that is not seen."""
    start = np.array([1, 4, 6], np.int32)
    rows = np.arange(B)[:, None]
    prompt = np.where(np.arange(6) < start[:, None], TOKENS[:, :6], 39)
    c = small.TINY
    cache = kv_cache.empty(c.layers, B, c.kv_heads, T, c.head_size, jnp.float32)
    cache = jax.tree.map(lambda x: x + 9.0, cache)
    new = small.forward(tiny.target, tiny.params, prompt)[0].new
    cache = kv_cache.write(cache, kv_cache.as_prefix(new), jnp.zeros(B, jnp.int32))
    for count in (1, 1, 4):
        at = start[:, None] + np.arange(count)
        got, taps, cache = extend(tiny.target, tiny.params, cache, TOKENS[rows, at], start)
        np.testing.assert_allclose(got, np.asarray(whole[1])[rows, at], atol=2e-5, rtol=0)
        want = np.asarray(whole[0].taps)[rows, 0, at]
        np.testing.assert_allclose(taps, want, atol=2e-5, rtol=0)
        start = start + count


def test_a_rejected_block_needs_no_undoing(tiny, whole):
    """A wrong block is written and then overwritten from the same slot."""
    start = np.full(B, 5, np.int32)
    c = small.TINY
    cache = kv_cache.empty(c.layers, B, c.kv_heads, T, c.head_size, jnp.float32)
    new = small.forward(tiny.target, tiny.params, TOKENS[:, :6])[0].new
    cache = kv_cache.write(cache, kv_cache.as_prefix(new), jnp.zeros(B, jnp.int32))
    wrong = (TOKENS[:, 5:9] + 1) % c.vocab_size
    _, _, cache = extend(tiny.target, tiny.params, cache, wrong, start)
    got, _, _ = extend(tiny.target, tiny.params, cache, TOKENS[:, 5:9], start)
    np.testing.assert_allclose(got, whole[1][:, 5:9], atol=2e-5, rtol=0)


def test_a_cache_in_blocks_is_the_same_cache():
    """Slots 10 to 13 are written one by one, from a block of four into the next, and attended to."""
    G, R, E, size = 2, 3, 5, 4
    key = iter(jax.random.split(jax.random.key(0), 20))
    draw = lambda *shape: jax.random.normal(next(key), shape)  # noqa: E731
    plain = (KeyValues(draw(B, G, E, 12), draw(B, G, 12, E)),)
    blocks = kv_cache.in_blocks(plain, size)
    assert blocks[0].keys.shape == (B, G, 3, E, size)
    assert blocks[0].keys[0, 1, 2, :, 1].tolist() == plain[0].keys[0, 1, :, 9].tolist()
    plain, blocks = kv_cache.grow(plain, 16), kv_cache.grow(blocks, 16)
    for slot in range(10, 14):
        new = (KeyValues(draw(B, G, E, 1), draw(B, G, 1, E)),)
        plain, blocks = (kv_cache.write(c, new, jnp.int32(slot)) for c in (plain, blocks))
    assert all(map(np.array_equal, kv_cache.in_blocks(plain, size)[0], blocks[0]))
    queries = draw(B, 2, 3, G * R, E)
    visible = jax.random.bernoulli(next(key), 0.6, (B, 2, 16)).at[:, :, 13].set(True)
    one, other = (attention.attend(queries, c[0], visible, None, None, 0.5) for c in (plain, blocks))
    np.testing.assert_allclose(other, one, atol=1e-6, rtol=0)


def test_later_tokens_do_not_change_earlier_logits(tiny, whole):
    tokens = TOKENS.copy()
    tokens[:, 8] = (tokens[:, 8] + 1) % small.TINY.vocab_size
    change = np.abs(small.forward(tiny.target, tiny.params, tokens)[1] - whole[1]).max((0, -1))
    assert change[:8].max() <= 1e-6
    assert change[8:].min() > 1e-3


def test_bfloat16_runs_in_bfloat16_and_stays_close(tiny, whole):
    shape = dataclasses.replace(small.TINY, dtype="bfloat16")
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    out, logits = small.forward(Target(shape), params, TOKENS)
    assert out.hidden.dtype == out.taps.dtype == out.new[0].keys.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    gap, spread = np.abs(np.asarray(logits) - whole[1]), np.asarray(whole[1]).std()
    assert 0 < gap.mean() < 0.05 * spread
    assert np.median(np.abs(out.taps.astype(np.float32) - whole[0].taps)) < 0.05


def test_the_fingerprint_names_the_weights_and_not_the_dtype(tiny):
    shape = dataclasses.replace(small.TINY, dtype="bfloat16")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    name = fingerprint(small.TINY, tiny.params)
    assert fingerprint(shape, half) == name
    other = small.randomise(abstract_params(small.TINY), 99)
    assert fingerprint(small.TINY, tiny.params | {"norm": other["norm"]}) != name
    assert fingerprint(dataclasses.replace(small.TINY, rope_theta=5e5), tiny.params) != name


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 2), (7,), (3, 1, 11), (64,), (65,), (5, 30)])
def test_a_product_is_the_same_for_any_number_of_rows(rows):
    """Few rows take another way through XLA's CPU backend, padded to a number that it likes."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(*rows, 24)), rng.normal(size=(10, 24))
    low = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    out, pull = jax.vjp(jax.jit(layers.product), low(x), low(weight))
    np.testing.assert_allclose(out, x @ weight.T, atol=1e-5, rtol=0)
    by_x, by_weight = pull(out)
    np.testing.assert_allclose(by_x, x @ weight.T @ weight, atol=1e-4, rtol=0)
    want = (x @ weight.T).reshape(-1, 10).T @ x.reshape(-1, 24)
    np.testing.assert_allclose(by_weight, want, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("size", [1, 7, 96, 640])
def test_the_likeliest_is_the_first_of_the_largest(size, platform, monkeypatch):
    monkeypatch.setattr(partition, "platform", lambda: platform)
    logits = np.random.default_rng(size).integers(0, 4, (50, 3, size)).astype(np.float32)  # many are equal
    found = jax.jit(lambda x: layers.likeliest(x))(logits)  # traced anew on each platform
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, logits.argmax(-1))


def test_one_value_a_row_and_its_gradient():
    rng = np.random.default_rng(0)
    values, ids = rng.normal(size=(5, 3, 70)).astype(np.float32), rng.integers(0, 70, (5, 3))
    values[0, 0, ids[0, 0] - 1] = np.inf  # not asked for
    given = rng.normal(size=(5, 3)).astype(np.float32)
    found, pull = jax.vjp(lambda x: layers.at_ids(x, ids), values)
    np.testing.assert_array_equal(found, np.take_along_axis(values, ids[..., None], -1)[..., 0])
    want = np.zeros_like(values)
    np.put_along_axis(want, ids[..., None], given[..., None], -1)
    np.testing.assert_array_equal(pull(given)[0], want)


def test_entropy_of_a_softmax_without_gradient():
    """However large the logits; log N where all are equal, 0 where one is certain."""
    logits = np.random.default_rng(0).normal(size=(4, 3, 50)).astype(np.float32) + 300
    logits[0] = 7.0
    logits[1, :, 5] = 900.0
    q = np.exp(np.float64(logits) - logits.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    found, pull = jax.vjp(layers.softmax_entropy, logits)
    np.testing.assert_allclose(found, -np.sum(q * np.log(np.maximum(q, 1e-300)), -1), atol=1e-4)
    np.testing.assert_allclose(found[0], np.log(50), atol=1e-5)
    assert not pull(np.ones((4, 3), np.float32))[0].any()


def test_the_tap_behind_the_last_layer_is_its_output(tiny):
    config = dataclasses.replace(small.TINY, taps=(1, small.TINY.layers))
    tokens = np.array([[3, 9, 1, 30]], np.int32)
    out, _ = small.forward(Target(config), tiny.params, tokens)
    last = np.asarray(out.taps)[..., small.TINY.width :]
    normed = reference.rms_norm(last, np.asarray(tiny.params["norm"]["scale"]), small.TINY.norm_epsilon)
    np.testing.assert_allclose(out.hidden, normed, atol=1e-5)
