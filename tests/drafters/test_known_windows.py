"""The gradient through the drafter's head and losses of its logits: that of the plain formulas."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.drafters import known_windows, windows
from ppow_jax.drafters.eagle3 import Drafter
from ppow_jax.errors import ConfigError
from ppow_jax.models import blocks
from ppow_jax.models.layers import Linear, RMSNorm
from ppow_jax.objectives import losses
from ppow_jax.objectives.base import prob_of

B, T, A, K = 2, 12, 5, 3
N, D = len(small.DRAFT_VOCAB), small.TINY.width
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(small.TINY.vocab_size, size=(B, T)).astype(np.int32)
TAPS = RNG.normal(size=(B, T, 3 * small.TINY.width)).astype(np.float32)
ANCHORS = np.stack([RNG.permutation(T - K - 2)[:A] for _ in range(B)]).astype(np.int32)
LOGITS = (2 * RNG.normal(size=(B, A, K, N))).astype(np.float32)  # the target's
COUNT = RNG.normal(size=(B, A, 1, K)).astype(np.float32)  # what each token's loss counts


def softmax(x):
    e = jnp.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


PLAIN = {
    "cross_entropy": lambda p, q: -(p * jnp.log(q)).sum(-1),
    "kl": lambda p, q: (p * jnp.log(p / q)).sum(-1),
    "reverse_kl": lambda p, q: (q * jnp.log(q / p)).sum(-1),
    "jensen_shannon": lambda p, q: (
        ((p * jnp.log(2 * p / (p + q))).sum(-1) + (q * jnp.log(2 * q / (p + q))).sum(-1)) / 2
    ),
    "hard_cross_entropy": lambda p, q: -jnp.take_along_axis(jnp.log(q), p.argmax(-1)[..., None], -1)[..., 0],
    "total_variation": lambda p, q: jnp.abs(p - q).sum(-1) / 2,
    "neg_log_acceptance": lambda p, q: -jnp.log(jnp.minimum(p, q).sum(-1)),
}


def along_windows(drafter, weights, of):
    """Sum of COUNT times `of(step, logits, target logits of the anchors at hand)` over all windows."""
    prefix = windows.text_prefix(drafter, weights, TAPS, TOKENS)
    start = windows.text_starts(prefix, TOKENS, ANCHORS)

    def observe(step, hidden, logits, target_logits):
        return of(step, logits, target_logits)

    ahead = jnp.stack([windows.text_ahead(TOKENS, ANCHORS, step) for step in range(K)], -1)
    about = (drafter, weights, prefix.keys_values, start, ahead, observe)
    return jnp.sum(COUNT * known_windows.known_pass(*about, lambda step: jnp.asarray(LOGITS[:, :, step])))


def close(found, wanted, tolerance):
    """To a part of the largest value of each leaf."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True):
        atol = tolerance * float(jnp.abs(b).max()) + 1e-9
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=0, atol=atol, err_msg=str(path))


@pytest.mark.parametrize(
    ("dtype", "parts"), [("float32", 1), pytest.param("bfloat16", 3, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", list(losses.LOSSES))
def test_gradients_of_losses_are_those_of_plain_formulas(tiny, name, dtype, parts, monkeypatch):
    """At once, and anchors in parts; the plain formula is differentiated through the same windows by jax."""
    monkeypatch.setattr(blocks, "count", lambda values, length: min(parts, length))
    drafter = Drafter(dataclasses.replace(tiny.drafter.config, dtype=dtype))

    def ours(params):
        def of(step, logits, target_logits):
            return losses.LOSSES[name](losses.renormalised(target_logits[:, :, None]), logits)

        return along_windows(drafter, tiny.weights._replace(params=params), of)

    def plain(params):
        def of(step, logits, target_logits):
            return PLAIN[name](softmax(target_logits[:, :, None]), softmax(logits))

        monkeypatch.setattr(known_windows, "_observed", straight)
        return along_windows(drafter, tiny.weights._replace(params=params), of)

    def straight(drafter, observe, params, hidden, given):
        logits = [drafter.apply({"params": params}, h, method="logits") for h in hidden]
        return [observe(step, *about) for step, about in enumerate(zip(hidden, logits, given, strict=True))]

    found = jax.jit(jax.value_and_grad(ours))(tiny.weights.params)
    wanted = jax.jit(jax.value_and_grad(plain))(tiny.weights.params)
    assert float(jnp.abs(wanted[1]["head"]["weight"]).max()) > 1e-3
    close(found, wanted, 1e-5 if dtype == "float32" else 1e-2)


def test_the_gradient_of_a_texts_probability(tiny):
    """Of tokens inside and outside of the draft vocabulary."""
    vocab, tokens = tiny.weights.vocab, jnp.asarray(TOKENS[:, :A, None])
    logits = jnp.asarray(LOGITS[:, :, :1])

    def plain(logits):
        hot = tokens[..., None] == vocab
        return jnp.sum(COUNT[..., 0] * (softmax(logits) * hot).sum(-1))

    found = jax.grad(lambda z: jnp.sum(COUNT[..., 0] * prob_of(z, vocab, tokens)))(logits)
    assert 0 < float(jnp.isin(tokens, vocab).mean()) < 1
    close(found, jax.grad(plain)(logits), 1e-5)


def test_what_an_observation_closes_over_has_its_gradient(tiny):
    """A scale of the logits that nobody handed over, at once and under jit."""

    def total(scale):
        of = lambda step, logits, target_logits: (scale * logits**2).sum(-1)  # noqa: E731
        return along_windows(tiny.drafter, tiny.weights, of)

    wanted = total(1.0)
    assert abs(float(wanted)) > 1
    for gradient in (jax.grad(total), jax.jit(jax.grad(total)), jax.grad(jax.jit(total))):
        assert float(gradient(1.0)) == pytest.approx(float(wanted), rel=1e-5)


def test_logits_are_all_that_is_kept_of_a_vocabulary(tiny):
    """Between the passes: K arrays of them, and none of what losses make of them."""

    def total(params):
        def of(step, logits, target_logits):
            return losses.jensen_shannon(losses.renormalised(target_logits[:, :, None]), logits)

        return along_windows(tiny.drafter, tiny.weights._replace(params=params), of)

    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(total, params)[1], tiny.weights.params))
    wide = [x.shape for x in kept if x.shape[-1:] == (N,) and x.size == B * A * N]
    # the logits of each step, and the target's, which are given here
    assert sorted(wide) == sorted([(B, A, 1, N)] * K + [(B, A, N)] * K)


def test_in_parts_nothing_of_a_vocabulary_is_kept(tiny, monkeypatch):
    """Of the first step neither, which is the group's, so that its logits fit at once."""
    G = 3
    monkeypatch.setattr(blocks, "VALUES", {"default": B * A * N})

    def total(params):
        def observe(step, hidden, logits, target_logits):
            loss = losses.jensen_shannon(losses.renormalised(target_logits[:, :, None]), logits)
            return jnp.broadcast_to(loss, (*loss.shape[:2], G))

        weights = tiny.weights._replace(params=params)
        prefix = windows.text_prefix(tiny.drafter, weights, TAPS, TOKENS)
        start = windows.text_starts(prefix, TOKENS, ANCHORS)
        tokens = jnp.zeros((B, A, G, K), jnp.int32)
        about = (tiny.drafter, weights, prefix.keys_values, start, tokens, observe)
        return known_windows.known_pass(*about, lambda step: jnp.asarray(LOGITS[:, :, step])).sum()

    kept = jax.tree.leaves(jax.eval_shape(lambda params: jax.vjp(total, params)[1], tiny.weights.params))
    # the target's logits are given here, and cut into parts: [A, B, 1, N]
    assert not [x.shape for x in kept if x.shape[-2:] == (G, N) or x.shape == (B, A, 1, N)]


@pytest.mark.parametrize("values", [2**30, B * A * N])  # at once, and in parts
def test_a_statistic_of_another_shape_is_refused(tiny, values, monkeypatch):
    """A group's own at step 0, where there should be one for each of its windows."""
    monkeypatch.setattr(blocks, "VALUES", {"default": values})
    prefix = windows.text_prefix(tiny.drafter, tiny.weights, TAPS, TOKENS)
    start = windows.text_starts(prefix, TOKENS, ANCHORS)
    about = (tiny.drafter, tiny.weights, prefix.keys_values, start, jnp.zeros((B, A, 2, K), jnp.int32))
    found = re.escape(f"found the statistic ['best'] of shapes [{(B, A, 1)}, {(B, A, 2)}, ")
    with pytest.raises(ConfigError, match=found):
        known_windows.known_pass(*about, lambda step, hidden, logits, given: {"best": logits.max(-1)})


@pytest.mark.parametrize(
    ("values", "products"), [(B * A * K * N, 1), (B * A * 2 * N, 2), (B * A * 2 * N - 1, K)]
)
def test_the_head_has_its_gradient_of_as_many_steps_at_once_as_fit(tiny, values, products, monkeypatch):
    """Each step's own would be as large as the head."""

    def total(params):
        def of(step, logits, target_logits):
            return losses.cross_entropy(losses.renormalised(target_logits[:, :, None]), logits)

        return along_windows(tiny.drafter, tiny.weights._replace(params=params), of)

    gradient = jax.jit(jax.grad(total))
    monkeypatch.setattr(blocks, "VALUES", {"default": 2**30})
    whole = gradient(tiny.weights.params)
    monkeypatch.setattr(blocks, "VALUES", {"default": values})
    jax.clear_caches()
    close(gradient(tiny.weights.params), whole, 1e-5)
    over_rows = f":f32[{N},{D}] = dot_general[dimension_numbers=(([0, 1], [0, 1])"
    lines = str(jax.make_jaxpr(gradient)(tiny.weights.params)).splitlines()
    assert sum(over_rows in line for line in lines) == products


@functools.partial(jax.jit, static_argnums=0)
def _gradients(module, params, x, count):
    return jax.grad(lambda p, x: jnp.sum(count * module.apply({"params": p}, x)), (0, 1))(params, x)


@pytest.mark.parametrize("rows", [3, 50])
def test_gradients_of_a_matrix_and_of_a_norm(rows):
    """More rows than inputs, and fewer."""
    x, count = (jnp.float32(RNG.normal(size=(2, rows, n))) for n in (16, 24))
    weight = jnp.float32(RNG.normal(size=(24, 16)))
    found = _gradients(Linear(24, jnp.float32), {"weight": weight}, x, count)
    close(found[0]["weight"], jnp.einsum("bro,bri->oi", count, x), 1e-5)
    close(found[1], jnp.einsum("bro,oi->bri", count, weight), 1e-5)
    scale, count = jnp.float32(RNG.normal(size=16)), count[..., :16]

    def plain(scale, x):
        return jnp.sum(count * scale * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5))

    found = _gradients(RMSNorm(1e-5), {"scale": scale}, x, count)
    close((found[0]["scale"], found[1]), jax.grad(plain, (0, 1))(scale, x), 1e-5)
