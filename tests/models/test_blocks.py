"""In blocks everything is what it is at once, and no more than a block is held."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.drafters import windows
from ppow_jax.models import attention, blocks, target_outputs
from ppow_jax.models.cache import KeyValues
from ppow_jax.objectives import losses
from ppow_jax.parallel import partition

RNG = np.random.default_rng(11)
B, G, R, E = 2, 2, 3, 4


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def both(of, *arguments, values=300):
    """Results at once, and in blocks so small that every axis is cut, unevenly."""
    whole = jax.jit(lambda *a: of(*a))(*arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "VALUES", {"default": values})
        cut = jax.jit(lambda *a: of(*a))(*arguments)
    return whole, cut


def close(whole, cut, atol=1e-5):
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def test_an_axis_is_cut_no_finer_than_needed(monkeypatch):
    monkeypatch.setattr(blocks, "VALUES", {"default": 100})
    assert [blocks.count(values, 7) for values in (1, 100, 101, 250, 10**6)] == [1, 1, 2, 3, 7]


def test_blocks_are_computed_in_order_and_the_last_may_be_short():
    seen = []

    def of(x_BxL, y_BxLx2):
        seen.append(x_BxL.shape)
        return x_BxL + y_BxLx2.sum(-1), y_BxLx2[..., :1]

    x, y = draw(3, 7), draw(3, 7, 2)
    total, first = blocks.mapped(of, 3, x, y)
    assert set(seen) == {(3, 3)}  # 3 + 3 + 1
    np.testing.assert_allclose(total, x + y.sum(-1), rtol=1e-6)
    np.testing.assert_allclose(first, y[..., :1])


KINDS = {  # windows, tokens of each, slots before, masks
    "a text": (1, 11, 0, "causal"),
    "a text after a prefix": (1, 11, 6, "causal"),
    "a text whose tokens see different slots": (1, 11, 6, "each"),
    "windows": (7, 3, 6, "causal"),
    "trees": (7, 3, 6, "each"),
    "windows of nothing yet": (7, 1, 6, "none"),
}


def attended(kind, causal=False, attend=attention.attend):
    """Attention with its gradient, and arguments of both."""
    W, K, S, masks = KINDS[kind]
    q, keep = draw(B, W, K, G * R, E), draw(B, W, K, G * R * E)
    prefix = KeyValues(draw(B, G, E, S), draw(B, G, S, E)) if S else None
    own = None if masks == "none" else KeyValues(draw(B, G, W, E, K), draw(B, G, W, K, E))
    visible = jnp.asarray(RNG.random((B, W, S)) < 0.7).at[..., 0].set(True) if S else None
    mask = jnp.tri(K, dtype=bool)
    if masks == "each":
        visible = jnp.asarray(RNG.random((B, W, K, S)) < 0.7)
        mask = jnp.asarray(RNG.random((B, W, K, K)) < 0.5) | jnp.eye(K, dtype=bool)

    def attended(q, prefix, own):
        out = attend(q, prefix, visible, own, None if causal else mask, 0.5)
        return jnp.sum(out * keep), out

    return jax.value_and_grad(attended, (0, 1, 2), has_aux=True), (q, prefix, own)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_its_gradient(kind):
    of, arguments = attended(kind)
    close(*both(of, *arguments))


def formula(q, prefix, visible, own, mask, scale):
    """Attention as it is written, for jax to derive."""
    (W, K), wide = q.shape[1:3], functools.partial(jnp.repeat, repeats=R, axis=1)
    scores, values = [], []
    if prefix:
        s = jnp.einsum("bwkhe,bhes->bhwks", q, wide(prefix.keys)) * scale
        scores.append(jnp.where(visible.reshape(B, 1, W, -1, s.shape[-1]), s, -jnp.inf))
        values.append(jnp.broadcast_to(wide(prefix.values)[:, :, None], (B, G * R, W, s.shape[-1], E)))
    if own:
        s = jnp.einsum("bwkhe,bhwej->bhwkj", q, wide(own.keys)) * scale
        scores.append(jnp.where(jnp.broadcast_to(mask, (B, W, K, K))[:, None], s, -jnp.inf))
        values.append(wide(own.values))
    weights = jax.nn.softmax(jnp.concatenate(scores, -1))
    out = jnp.einsum("bhwks,bhwse->bwkhe", weights, jnp.concatenate(values, -2))
    return out.reshape(B, W, K, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_its_gradient_are_those_of_the_formula(kind):
    state = RNG.bit_generator.state
    of, arguments = attended(kind)
    RNG.bit_generator.state = state
    by_formula, _ = attended(kind, attend=formula)
    wanted = by_formula(*arguments)
    close(of(*arguments), wanted)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arguments)
    (_, out), gradients = of(*narrow)
    for x, like in zip(
        jax.tree.leaves((out, gradients)), jax.tree.leaves((wanted[0][1], wanted[1])), strict=True
    ):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), like, atol=0.03 * float(jnp.abs(like).max()))


@pytest.mark.parametrize("kind", ["a text", "a text after a prefix"])
def test_a_long_text_in_parts(kind, monkeypatch):
    state = RNG.bit_generator.state
    of, arguments = attended(kind)
    whole = of(*arguments)
    RNG.bit_generator.state = state
    of, arguments = attended(kind, causal=True)
    monkeypatch.setattr(attention, "_LONG", 4)  # 11 tokens in eight parts
    cut = jax.make_jaxpr(of)(*arguments)
    assert str(cut).count(" exp ") >= 8
    close(whole, of(*arguments))


@pytest.mark.parametrize("kind", ["a text after a prefix", "trees"])
def test_on_a_tpu_a_column_of_ones_sums_the_weights(kind, monkeypatch):
    of, arguments = attended(kind)
    plain = of(*arguments)
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    summed = jax.make_jaxpr(of)(*arguments)
    assert f",{E + 1}]" in str(summed)
    close(plain, of(*arguments))


def test_the_outputs_along_a_text(tiny):
    tokens = jnp.asarray(RNG.integers(small.TINY.vocab_size, size=(2, 19)))
    read = functools.partial(target_outputs.read, tiny.target)
    close(*both(lambda params: read(params, tokens)[0], tiny.params))


def test_a_window_pass_and_its_gradient(tiny):
    """Given something of every anchor; the tokens that it goes on with are its own."""
    T, A, K, N = 12, 7, 3, len(small.DRAFT_VOCAB)
    tokens = jnp.asarray(RNG.integers(small.TINY.vocab_size, size=(2, T)))
    taps, target_logits = draw(2, T, 3 * small.TINY.width), draw(K, 2, A, N)
    anchors = jnp.asarray(RNG.integers(T - 2, size=(2, A)))

    def loss(params):
        weights = tiny.weights._replace(params=params)
        prefix = windows.text_prefix(tiny.drafter, weights, taps, tokens)
        start = windows.text_starts(prefix, tokens, anchors)

        def choose(step, hidden, logits, given):
            onward = weights.vocab[logits.argmax(-1)]
            return onward, (onward, losses.kl(losses.renormalised(given[:, :, None]), logits))

        run = (tiny.drafter, weights, prefix.keys_values, start, choose, K, lambda step: target_logits[step])
        onward, divergence = windows.window_pass(*run)
        return divergence.sum(), (onward, divergence)

    close(*both(jax.value_and_grad(loss, has_aux=True), tiny.weights.params, values=100), atol=1e-4)


def test_no_array_of_all_positions_and_the_vocabulary_is_held():
    """Forward and backward, by the compiler: a loss of the distributions at 2 x 512 positions, 32 each."""
    T, D, N = 512, 8, 640
    hidden, context, head = draw(2, T, 1, D), draw(2, T, 1, D), draw(N, D)

    def loss(head, hidden):
        def of(hidden, context):
            return losses.kl(losses.renormalised(context @ head.T), hidden @ head.T)

        return blocks.mapped(of, blocks.count(2 * T * N, T), hidden, context).sum()

    def held(values):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "VALUES", {"default": values})
            program = jax.jit(lambda *a: jax.grad(loss, (0, 1))(*a)).lower(head, hidden).compile()
        return program.memory_analysis().temp_size_in_bytes

    everything = 4 * 2 * T * N  # bytes of one such array
    assert held(2**40) > everything
    assert held(2 * 32 * N) < everything / 2


def test_no_array_of_all_windows_and_their_prefix_is_held():
    """Attention of 64 windows of 4 tokens over 512 slots, forward and backward."""
    W, K, S = 64, 4, 512
    q, prefix = draw(B, W, K, G * R, E), KeyValues(draw(B, G, E, S), draw(B, G, S, E))
    visible = jnp.ones((B, W, S), bool)

    def held(values):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocks, "VALUES", {"default": values})
            of = lambda q, prefix: attention.attend(q, prefix, visible, None, None, 0.5).sum()  # noqa: E731
            program = jax.jit(jax.grad(of, (0, 1))).lower(q, prefix).compile()
        return program.memory_analysis().temp_size_in_bytes

    everything = 4 * B * G * R * W * K * S
    assert held(2**40) > everything
    assert held(everything // 4 // 16) < everything / 2
