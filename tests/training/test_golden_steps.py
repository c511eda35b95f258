"""Twenty steps of each kind end where they ended before objectives had a seam: tests/golden/steps.json."""

import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from ppow_jax.decode.loop import DecodeConfig
from ppow_jax.drafters.eagle3 import Drafter, drafter_config, init_params
from ppow_jax.objectives.anchors import AnchorRule
from ppow_jax.objectives.base import Sizes
from ppow_jax.objectives.ppow import PPOW
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.parallel import partition
from ppow_jax.training.step import Recipe, make_step

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden/steps.json").read_text())["steps"]
B, T, PROMPT, STEPS = 8, 32, 4, 20
RULE = AnchorRule("adaw", warmup_steps=2, rescore_every=3)


def ppow(**changes) -> PPOW:
    return PPOW(anchors=6, window=3, group=4, anchor_rule=RULE, **changes)


KINDS = {  # name -> objective, name of the run (and so its random numbers), parts of a batch
    "supervise-1": (Supervised(anchors=12, window=2), "supervise", 1),
    "supervise-2": (Supervised(anchors=12, window=2), "supervise", 2),
    "ppow-as-one": (ppow(proximity_weight=0.0), "ppow", 1),
    "ppow-proximity": (ppow(proximity_weight=0.5), "ppow", 1),
    "ppow-t1": (ppow(temperature=1.0, proximity_weight=0.0), "ppow", 1),
    "ppow-2-parts": (ppow(proximity_weight=0.0), "ppow", 2),
}
FAST = ("supervise-1", "ppow-proximity", "ppow-t1")


@pytest.fixture(scope="module")
def batch(tiny) -> dict[str, np.ndarray]:
    """Greedy texts of the tiny target; one is short and two are padded."""
    prompts = np.random.default_rng(0).integers(small.TINY.vocab_size, size=(B, PROMPT))
    out = small.generate(tiny, prompts.tolist(), DecodeConfig(T - PROMPT, (-1,)), padded=PROMPT)
    tokens = np.concatenate([prompts, out.tokens], 1).astype(np.int32)
    lengths = np.full(B, T)
    lengths[:3] = PROMPT + 3, 20, 27
    inside = np.arange(T) < lengths[:, None]
    return {
        "index": np.arange(B, dtype=np.int32)[::-1].copy(),
        "tokens": np.where(inside, tokens, 0),
        "assistant": inside & (np.arange(T) >= PROMPT),
    }


def root(name: str) -> jax.Array:
    """As `Experiment.key` makes it."""
    return jax.random.fold_in(jax.random.key(0), zlib.crc32(name.encode()))


@pytest.fixture(scope="module")
def walk(tiny, batch):
    """(kind, parameters) -> parameters and losses of 20 steps."""
    drafter = Drafter(drafter_config(small.TINY, len(small.DRAFT_VOCAB), 40, "float32"))

    def of(kind, params=None):
        objective, name, parts = KINDS[kind]
        if params is None:
            about = (small.TINY, tiny.params, jnp.asarray(small.DRAFT_VOCAB))
            params = init_params(drafter.config, *about, root("drafter"))
        optimizer = optax.sgd(0.05)
        recipe = Recipe(objective, tiny.target, drafter, optimizer, parts, stops=(1,), gamma=0.12)
        params = jax.tree.map(jnp.array, params)  # a step donates them
        state = {"params": params, "opt_state": optimizer.init(params), "vocab": small.DRAFT_VOCAB}
        state |= {"memory": objective.init(Sizes(B, T), params)}
        step, losses = make_step(recipe, tiny.params, root(name)), []
        for number in range(1, STEPS + 1):
            state, metrics = step(number, state, batch)
            losses.append(float(metrics["loss"]))
        return jax.tree.map(np.asarray, state["params"]), losses

    return of


@pytest.fixture(scope="module")
def supervised(walk):
    return walk("supervise-1")


@pytest.mark.parametrize(
    "kind",
    [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_twenty_steps_end_where_they_did(walk, supervised, kind):
    if kind == "supervise-1":
        params, losses = supervised
    else:
        params, losses = walk(kind, None if kind.startswith("supervise") else supervised[0])
    want = GOLDEN[kind]
    np.testing.assert_allclose([losses[0], losses[9], losses[19]], want["losses"], rtol=2e-4)
    leaves = {partition.path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    for name, (total, absolute) in want["sums"].items():
        np.testing.assert_allclose(np.abs(leaves[name]).sum(), absolute, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(leaves[name].sum(), total, atol=1e-4 * absolute, err_msg=name)
