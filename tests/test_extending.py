"""docs/extending.md: every example as it stands, written to files and used by its config line."""

import dataclasses
import importlib
import json
import pathlib
import re
import sys

import golden_families
import jax
import numpy as np
import pytest
import runs
import small

from ppow_jax import config
from ppow_jax import run as runner
from ppow_jax.drafters import eagle3
from ppow_jax.errors import ConfigError
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.stages import train
from ppow_jax.targets import huggingface
from ppow_jax.training import drafters, loop, metrics

PAGE = (pathlib.Path(__file__).parents[1] / "docs/extending.md").read_text()
EXAMPLES = dict(re.findall(r"<!-- example: (\S+) -->\n```python\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> pathlib.Path:
    """A directory outside the package, from which Python imports, with the examples."""
    directory = tmp_path_factory.mktemp("examples")
    for name, text in EXAMPLES.items():
        (directory / (name if name.endswith(".py") else f"example_{name}.py")).write_text(text)
    sys.path.insert(0, str(directory))
    yield directory
    sys.path.remove(str(directory))


def lines(word: str) -> str:
    """The one config line of the page that has a word."""
    (found,) = set(re.findall(rf"`(c\.[^`]*{word}[^`]*)`", PAGE.split("## A training run")[1]))
    return found


def test_the_page_has_an_example_of_each():
    assert set(EXAMPLES) == {
        "configs", "my_loss.py", "my_reward.py", "my_objective.py", "my_drafter.py", "my_family.py"
    }  # fmt: skip


def test_a_comparison_of_six_objectives_and_three_seeds_is_a_config_of_thirty_lines(files):
    assert len(EXAMPLES["configs"].splitlines()) <= 30
    found = config.from_config(importlib.import_module("example_configs").get_config())
    assert len(found.train) == 1 + 6 * 3
    assert {run.start for run in found.train.values()} == {"fresh", "supervise"}
    assert {(run.minutes, run.order) for run in list(found.train.values())[1:]} == {(10.0, "continue")}
    assert sorted({run.seed for run in found.train.values()}) == [0, 1, 2]
    train.check(found)
    assert len(runner.units(found)) == 1 + len(found.train) + 2


CHANGES = dict(train__supervise__steps=4, train__supervise__optimizer__warmup_steps=2, log__curve_points=1)
CHANGES |= dict(train__supervise__anchors=4, train__ppow__steps=3, log__checkpoint_every_steps=2)


class Stopped(Exception):
    """Stands for whatever ends a run in the middle."""


def settings_of(directory: pathlib.Path, **changes):
    """A small run whose config has the page's lines for a loss, a reward, an objective and a drafter."""
    c = runs.config(directory, **CHANGES | changes)
    run = config.training_run  # noqa: F841  (the line of the objective calls it)
    for word in ("my_loss", "my_reward", "my_objective", "my_drafter"):
        exec(lines(word))
    c.train.margin.steps, c.train.margin.batch_size, c.train.margin.anchors = 6, 4, 4
    c.export.drafter, c.export.server = "margin", ""
    return config.from_config(c)


@pytest.fixture(scope="module")
def both(files, tmp_path_factory):
    """Workdirs of a run left alone and of one stopped in the middle of the new objective; what each saved."""
    directory, found = tmp_path_factory.mktemp("runs"), {}
    save, walk = Checkpoints.save, loop._walk
    for name in ("whole", "stopped"):
        saved, stops = {}, {("margin", 5)} if name == "stopped" else set()

        def saving(store, step, state, *rest, saved=saved):
            leaves = jax.tree_util.tree_leaves_with_path(state)
            saved[store._directory.name] = step, {str(path): np.array(x).tobytes() for path, x in leaves}
            save(store, step, state, *rest)

        def walking(experiment, run, state, step, *rest, stops=stops):
            def stepping(number, *args):
                if (run, number) in stops:
                    stops.remove((run, number))
                    raise Stopped
                return step(number, *args)

            walk(experiment, run, state, stepping, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "save", saving)
            patch.setattr(loop, "_walk", walking)
            if stops:
                with pytest.raises(Stopped):
                    runner.run(settings_of(directory, runs=()), directory / name)
            runner.run(settings_of(directory, runs=()), directory / name)
        found[name] = directory / name, saved
    return found


@pytest.mark.slow
def test_an_objective_from_one_file_trains_and_resumes_bit_for_bit(both):
    (workdir, saved), (other, others) = both["whole"], both["stopped"]
    assert saved["margin"][0] == 6
    assert saved == others
    rows = [[r for r in metrics.read(w) if r["stage"] == "margin"] for w in (workdir, other)]
    assert [r["step"] for r in rows[1]] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in rows[0]] == [r["loss"] for r in rows[1]]
    start = [v for k, v in saved["supervise"][1].items() if "params" in k]
    assert start != [v for k, v in saved["margin"][1].items() if "params" in k]


@pytest.mark.slow
def test_it_is_evaluated_and_exported(both):
    workdir, _ = both["whole"]
    report = json.loads((workdir / "report.json").read_text())
    assert list(report["drafters"]) == ["supervise", "cst", "ppow", "margin"]
    for benchmark in report["drafters"]["margin"]["benchmarks"].values():
        assert benchmark["identical_outputs"] == benchmark["prompts"]
    manifest = json.loads((workdir / "export" / "manifest.json").read_text())
    assert manifest["run"] == "margin"
    assert manifest["params_sha256"] == report["drafters"]["margin"]["params_sha256"]
    assert manifest["config"]["train"]["margin"]["margin"] == 2.0


@pytest.mark.slow
def test_the_loss_the_reward_and_the_drafter_are_used(both, files):
    workdir, _ = both["whole"]
    reward = importlib.import_module("my_reward").saved_passes
    rows = [r for r in metrics.read(workdir) if r["stage"] == "ppow"]
    for row in rows:  # its k are those of windows of 3, gamma is 0.12
        context = type("Context", (), {"gamma": 0.12, "window": 3})
        want = sum(
            share * float(reward(np.array(k), context)) for k, share in enumerate(row["accepted_shares"])
        )
        assert row["reward_speedup"] == pytest.approx(want, abs=1e-5)
    run = runs.build(workdir, drafter__module="my_drafter:Gated", **CHANGES)
    found = drafters.load(run, "margin")
    assert type(found.drafter).__name__ == "Gated"
    assert found.params["gate"]["weight"].shape == (
        found.drafter.config.width,
        found.drafter.config.taps_width,
    )
    plain = settings_of(workdir.parent, train__supervise__losses="cross_entropy").train["supervise"]
    assert plain.method.losses == "cross_entropy+2*my_loss:squared"


def test_a_drafter_that_is_none_is_refused(files):
    shape = eagle3.drafter_config(small.TINY, 24, 40, "float32", module="my_loss:squared")
    with pytest.raises(
        ConfigError, match=r"config\.drafter\.module: found 'my_loss:squared', expected eagle3"
    ):
        eagle3.drafter_of(shape)


def test_a_family_from_one_file(files, tmp_path):
    """Its weights are those of a Qwen3, whose norms it has; every other layer sees a few tokens."""
    directory = golden_families.write(tmp_path / "model", "qwen3")
    values = json.loads((directory / "config.json").read_text())
    plain, params = huggingface.load(directory, "float32", golden_families.partition.make_mesh((-1, 1, 1)))
    del values["layer_types"]  # a key that this family does not ask for
    values |= {"model_type": "my_family", "sliding_window": 3}
    (directory / "config.json").write_text(json.dumps(values))
    importlib.import_module("my_family")
    try:
        shape, again = huggingface.load(directory, "float32", golden_families.partition.make_mesh((-1, 1, 1)))
    finally:
        del importlib.import_module("ppow_jax.targets.families").FAMILIES["my_family"]
    assert shape.head_norms and shape.spans == tuple(3 * (i % 2) for i in range(shape.layers))
    assert dataclasses.replace(shape, spans=plain.spans) == plain
    same = jax.tree.map(np.array_equal, params, again)
    assert all(jax.tree.leaves(same))
