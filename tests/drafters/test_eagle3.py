"""What a fresh drafter is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from ppow_jax.drafters import eagle3, windows
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights
from ppow_jax.errors import ConfigError

VOCAB = jnp.asarray(small.DRAFT_VOCAB)


@pytest.mark.parametrize("kv_heads", [0, 4])
def test_blind_to_the_embedding_a_fresh_drafter_is_the_targets_last_layer(tiny, kv_heads):
    """Its highest tap is here the last layer's input: from an anchor it says what the target says there.

    With more key/value heads than the target's two, too: they begin as copies.
    """
    shape = eagle3.drafter_config(small.TINY, len(VOCAB), 0, "float32", kv_heads)
    assert (small.TINY.kv_heads, shape.kv_heads) == (2, kv_heads or 2)
    params = eagle3.init_params(shape, small.TINY, tiny.params, VOCAB, jax.random.key(0))
    for name in ("query", "key", "value"):
        weight = params["attention"][name]["weight"]
        assert np.asarray(weight[:, : shape.width]).std() > 0
        params["attention"][name]["weight"] = weight.at[:, : shape.width].set(0.0)
    tokens = np.random.default_rng(0).integers(small.TINY.vocab_size, size=(2, 12)).astype(np.int32)
    out, logits = small.forward(tiny.target, tiny.params, tokens)
    weights = DrafterWeights(params, tiny.weights.embedding, VOCAB)
    drafter = Drafter(shape)
    prefix = windows.text_prefix(drafter, weights, out.taps[:, 0], tokens)
    anchors = jnp.array([[0, 4, 9], [2, 3, 10]])
    start = windows.text_starts(prefix, tokens, anchors)

    def same(step, hidden, logits, given):
        return jnp.zeros(logits.shape[:3], jnp.int32), logits

    found = windows.window_pass(drafter, weights, prefix.keys_values, start, same, 1)[:, :, 0, :, 0]
    want = jnp.take_along_axis(logits[..., VOCAB], anchors[..., None], 1)
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_an_mlp_of_another_width_starts_at_random_and_nothing_is_shared_with_the_target(tiny):
    shape = eagle3.drafter_config(small.TINY, len(VOCAB), 40, "float32")
    params = eagle3.init_params(shape, small.TINY, tiny.params, VOCAB, jax.random.key(0))
    assert params["mlp"]["up"]["weight"].shape == (40, 32)
    donate = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    donate(params)
    jax.block_until_ready(jax.tree.map(lambda x: x + 0, tiny.params))  # would raise if it had been deleted


@pytest.mark.parametrize("kv_heads", [1, 3, 8])
def test_key_value_heads_that_do_not_fit_the_target_are_refused(kv_heads):
    expected = f"kv_heads: found {kv_heads}, expected 0 or a multiple of 2 that divides 4"
    with pytest.raises(ConfigError, match=expected):
        eagle3.drafter_config(small.TINY, len(VOCAB), 0, "float32", kv_heads)
