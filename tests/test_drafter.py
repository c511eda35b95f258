"""What a fresh drafter is."""

import jax
import jax.numpy as jnp
import numpy as np
import small

from ppow_jax import windows
from ppow_jax.models import drafter as drafters
from ppow_jax.models.drafter import Drafter, DrafterWeights

VOCAB = jnp.asarray(small.DRAFT_VOCAB)


def test_blind_to_the_embedding_a_fresh_drafter_is_the_targets_last_layer(tiny):
    """Its highest tap is here the last layer's input: from an anchor it says what the target says there."""
    shape = drafters.drafter_config(small.TINY, len(VOCAB), 0, "float32")
    params = drafters.init_params(shape, small.TINY, tiny.params, VOCAB, jax.random.key(0))
    for name in ("query", "key", "value"):
        kernel = params["attention"][name]["kernel"]
        assert np.asarray(kernel[: shape.width]).std() > 0
        params["attention"][name]["kernel"] = kernel.at[: shape.width].set(0.0)
    tokens = np.random.default_rng(0).integers(small.TINY.vocab_size, size=(2, 12)).astype(np.int32)
    out, logits = small.forward(tiny.target, tiny.params, tokens)
    weights = DrafterWeights(params, tiny.weights.embedding, VOCAB)
    drafter = Drafter(shape)
    prefix = windows.text_prefix(drafter, weights, out.taps[:, 0], tokens)
    anchors = jnp.array([[0, 4, 9], [2, 3, 10]])
    start = windows.text_starts(prefix, tokens, anchors)
    same = lambda _, x: (jnp.zeros(x.shape[:3], jnp.int32), x)  # noqa: E731
    found = windows.window_pass(drafter, weights, prefix.keys_values, start, same, 1)[:, :, 0, :, 0]
    want = jnp.take_along_axis(logits[..., VOCAB], anchors[..., None], 1)
    np.testing.assert_allclose(found, want, atol=1e-4)


def test_an_mlp_of_another_width_starts_at_random_and_nothing_is_shared_with_the_target(tiny):
    shape = drafters.drafter_config(small.TINY, len(VOCAB), 40, "float32")
    params = drafters.init_params(shape, small.TINY, tiny.params, VOCAB, jax.random.key(0))
    assert params["mlp"]["up"]["kernel"].shape == (32, 40)
    donate = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)
    donate(params)
    jax.block_until_ready(jax.tree.map(lambda x: x + 0, tiny.params))  # would raise if it had been deleted
