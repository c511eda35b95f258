"""cuDNN's kernel, where it applies: lowered here, and with JAX's plain attention in its place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from ppow_jax.models import attention, flash
from ppow_jax.models.cache import KeyValues
from ppow_jax.parallel import partition

B, K, G, R, E = 2, 10, 2, 3, 16
RNG = np.random.default_rng(5)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(partition, "platform", lambda: "gpu")
    monkeypatch.setattr(flash, "capability", lambda: 8.0)


def text(dtype=jnp.bfloat16, K=K, W=1, E=E):
    draw = lambda *shape: jnp.asarray(RNG.normal(size=shape), dtype)  # noqa: E731
    return draw(B, W, K, G * R, E), KeyValues(draw(B, G, W, E, K), draw(B, G, W, K, E))


def read(queries, own, prefix=None, visible=None):
    return attention.attend(queries, prefix, visible, own, None, 0.3)


def test_the_kernel_is_asked_for_and_differentiated(ampere, monkeypatch):
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    of = jax.jit(jax.value_and_grad(lambda *a: read(*a).sum().astype(jnp.float32)))
    lowered = of.trace(*text()).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("custom_call @__cudnn$fmhaSoftmax(") == 1
    assert lowered.count("custom_call @__cudnn$fmhaSoftmaxBackward(") == 1


def test_what_it_is_given_means_the_same(ampere, monkeypatch):
    """JAX's plain attention in the kernel's place; ours in float32 on the same values."""
    queries, own = text()
    plain = jax.nn.dot_product_attention
    as_xla = lambda *a, implementation, **k: plain(*a, **k)  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_xla)
    found = read(queries, own)
    monkeypatch.setattr(partition, "platform", lambda: "cpu")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (queries, own))
    assert found.shape == (B, 1, K, G * R * E)
    np.testing.assert_allclose(found.astype(jnp.float32), read(*wide), atol=0.03)


def test_where_it_does_not_apply(ampere, monkeypatch):
    assert flash.applies(*text())
    assert not flash.applies(*text(jnp.float32))
    assert not flash.applies(*text(W=2))
    assert not flash.applies(*text(K=9))
    assert not flash.applies(*text(E=256))
    assert not flash.applies(*text(E=12))
    monkeypatch.setattr(flash, "capability", lambda: 7.5)
    assert not flash.applies(*text())
    monkeypatch.setattr(flash, "capability", lambda: 9.0)
    monkeypatch.setattr(partition, "platform", lambda: "tpu")
    assert not flash.applies(*text())


def test_a_prefix_goes_the_usual_way(ampere, monkeypatch):
    monkeypatch.setattr(flash, "causal", lambda *_: pytest.fail("the kernel knows no prefix"))
    queries, own = text()
    prefix = KeyValues(own.keys[:, :, 0], own.values[:, :, 0])
    assert read(queries, own, prefix, jnp.ones((B, 1, K), bool)).shape == (B, 1, K, G * R * E)
