"""The running mean of the parameters: its values, and that it is what a run leaves and measures."""

import contextlib

import jax.numpy as jnp
import numpy as np
import optax
import runs

from ppow_jax.objectives.base import Sizes
from ppow_jax.settings import OptimizerSettings
from ppow_jax.training import drafters, loop
from ppow_jax.training.step import drafter_params, make_optimizer


def test_it_is_the_mean_of_the_parameters_after_each_update():
    """Against NumPy, from those at the start on."""
    params, rng = {"w": jnp.arange(3.0)}, np.random.default_rng(0)
    optimizer = make_optimizer(OptimizerSettings(learning_rate=0.1, warmup_steps=1), 9, average=0.7)
    state, want = optimizer.init(params), np.arange(3.0)
    for _ in range(4):
        updates, state = optimizer.update({"w": jnp.asarray(rng.normal(size=3))}, state, params)
        params = optax.apply_updates(params, updates)
        want = 0.7 * want + 0.3 * np.asarray(params["w"])
    found = drafter_params({"params": params, "opt_state": state})["w"]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    assert np.abs(found - params["w"]).max() > 1e-3
    plain = make_optimizer(OptimizerSettings(), 9)
    assert drafter_params({"params": params, "opt_state": plain.init(params)}) is params


def test_a_run_leaves_it(tmp_path):
    """The parameters of a finished run are the mean that its optimiser keeps, not those last trained."""
    few = dict(runs=("supervise",), stages=("respond", "train"), train__supervise__steps=2)
    few |= dict(log__checkpoint_every_steps=1, log__curve_points=1, train__supervise__average=0.5)
    runs.run(tmp_path / "run", **few)
    experiment = runs.build(tmp_path / "run", **few)
    left = drafters.load(experiment, "supervise")
    made = loop.recipe(experiment, experiment.settings.train["supervise"], left.drafter, 2, 0.0)
    shapes = loop.abstract_state(experiment, made, Sizes(1, 1))
    with contextlib.closing(drafters.checkpoints(experiment, "supervise")) as store:
        means = [store._load(n, {"state": shapes}, partial=True)["state"]["opt_state"][-1] for n in (1, 2)]
    first, last = (np.asarray(mean.params["head"]["weight"]) for mean in means)
    np.testing.assert_array_equal(left.params["head"]["weight"], last)
    assert np.abs(first - last).max() > 0
