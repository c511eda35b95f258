"""Every family against golden values that transformers + torch computed from the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from golden_families import GOLDEN, POSITIONS, TEXT, load, parity, write

from ppow_jax.models import cache as kv_cache
from ppow_jax.models.target import Target

TOLERANCE = 1e-4


def compare(name: str, logits: np.ndarray, taps: np.ndarray) -> None:
    np.testing.assert_allclose(logits, GOLDEN[name]["logits"], atol=TOLERANCE)
    np.testing.assert_allclose(taps, GOLDEN[name]["taps"], atol=TOLERANCE)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_text_at_once_and_token_by_token(name, tmp_path):
    target, params = load(write(tmp_path, name))
    positions = jnp.arange(parity.LENGTH)[None, None]
    out, logits = small.forward(target, params, TEXT)
    assert target.config.taps == parity.TAPS
    compare(name, np.asarray(logits)[0, POSITIONS], np.asarray(out.taps)[0, 0, POSITIONS])

    @jax.jit
    def step(params, token, at, cache):
        visible = kv_cache.visible(at[None], parity.LENGTH)
        out = target.apply({"params": params}, token[None, None, None], at[None, None, None], cache, visible)
        logits = target.apply({"params": params}, out.hidden[0, 0, 0], method=Target.logits)
        return kv_cache.write(cache, kv_cache.as_prefix(out.new), at), logits, out.taps[0, 0, 0]

    c = target.config
    first = 7  # of the text, read at once
    out = target.apply({"params": params}, TEXT[:, None, :first], positions[..., :first])
    cache = kv_cache.grow(kv_cache.as_prefix(out.new), parity.LENGTH)
    logits, taps = {}, {}
    for at in range(first, parity.LENGTH):
        cache, logits[at], taps[at] = step(params, TEXT[0, at], jnp.int32(at), cache)
    late = [p for p in POSITIONS if p >= first]
    want = [POSITIONS.index(p) for p in late]
    assert len(late) == 3 and c.context > parity.LENGTH
    for found, key in ((logits, "logits"), (taps, "taps")):
        wanted = np.array(GOLDEN[name][key])[want]
        np.testing.assert_allclose(np.stack([found[p] for p in late]), wanted, atol=TOLERANCE)
