"""Which drafters are compared with which, and what is known of runs and stages."""

import dataclasses
import json

import numpy as np
import pytest

from ppow_jax.objectives.supervised import Supervised
from ppow_jax.report import contents
from ppow_jax.report.statistics import Decoded, Measured, Simulated
from ppow_jax.settings import Settings, TrainSettings

RUN = TrainSettings(steps=10, method=Supervised())


def of(tau: float, speedup: float = 2.0) -> Measured:
    """Two prompts of ten passes, both alike."""
    names, two = np.array(["a", "b"]), np.ones(2, int)
    chain = Simulated(names, two * round(tau * 10), two * 10, np.zeros(2, int), np.zeros(2, int))
    times = (two * 10, two / speedup, two * 10, two * 1.0)
    return Measured(chain, None, Decoded(names, *times, two, two, two > 0, None))


MEASURED = {
    "sft": {"x": of(2.0), "y": of(3.0)},
    "cst": {"x": of(2.5, 3.0), "y": of(3.0)},
    "cst_1": {"x": of(2.7), "y": of(3.0)},
    "rl": {"x": of(3.0), "y": of(3.5)},
    "rl_1": {"x": of(4.0), "y": of(3.5)},
}


def test_all_but_the_control_are_compared_with_it():
    found = contents.results(MEASURED, "cst")
    assert "difference" not in found["cst"]["mean"]
    assert "difference" not in found["cst"]["benchmarks"]["x"]
    difference = found["rl"]["benchmarks"]["x"]["difference"]
    assert difference["tau"] == pytest.approx(0.5) and difference["speedup"] == pytest.approx(-1.0)
    assert found["rl"]["mean"]["difference"]["tau"] == pytest.approx(0.5)
    assert found["rl"]["mean"]["tau"] == pytest.approx(3.25)
    assert found["sft"]["mean"]["difference"]["tau"] == pytest.approx(-0.25)
    alone = contents.results(MEASURED, None)
    assert all("difference" not in result["mean"] for result in alone.values())


def test_repetitions_are_grouped_under_the_first_ones_name():
    groups = [["sft"], ["cst", "cst_1"], ["rl", "rl_1"]]
    results = contents.results(MEASURED, "cst")
    found = contents.repetitions(results, MEASURED, groups, "cst")
    assert list(found) == ["cst", "rl"] and found["rl"]["drafters"] == ["rl", "rl_1"]
    x = found["rl"]["benchmarks"]["x"]
    assert (x["tau"], x["tau_std"]) == pytest.approx((3.5, 0.5**0.5))
    # to the mean of the control's repetitions, 2.6
    assert x["difference"]["tau"] == pytest.approx(0.9) and x["difference"]["ci95"] == pytest.approx(
        [0.9] * 2
    )
    assert found["rl"]["mean"]["difference"]["tau"] == pytest.approx((0.9 + 0.5) / 2)
    assert found["rl"]["mean"]["tau_std"] == pytest.approx(0.5 * 0.5**0.5)
    assert "difference" not in found["cst"]["mean"]
    assert "difference" not in contents.repetitions(results, MEASURED, groups, None)["rl"]["mean"]
    json.dumps(found)


def test_runs_that_differ_in_their_seeds_alone_are_repetitions():
    other = dataclasses.replace(RUN, method=Supervised(window=3))
    train = {
        "a": RUN,
        "a_1": dataclasses.replace(RUN, seed=1),
        "b": dataclasses.replace(RUN, steps=11),
        "c": other,
        "c_2": dataclasses.replace(other, seed=2),
        # what starts from repetitions is repeated too
        "d": dataclasses.replace(RUN, start="a"),
        "d_1": dataclasses.replace(RUN, start="a_1", seed=1),
        "e": dataclasses.replace(RUN, start="b"),
    }
    settings = Settings(train=train)
    found = contents.groups(settings, ["imported", *train])
    assert found == [["imported"], ["a", "a_1"], ["b"], ["c", "c_2"], ["d", "d_1"], ["e"]]
    assert contents.groups(settings, ["a_1", "b"]) == [["a_1"], ["b"]]  # of those that were evaluated


def test_a_run_of_the_same_seed_tells_nothing_of_seeds():
    same = dataclasses.replace(RUN, order="x")
    settings = Settings(train={"a": same, "again": same, "a_1": dataclasses.replace(same, seed=1)})
    assert contents.groups(settings, list(settings.train)) == [["a", "a_1"], ["again"]]


def test_stages_tell_what_they_took(tmp_path):
    assert contents.stages(tmp_path) == {}
    records = {
        "respond": {"finished": True, "settings": {}, "seconds": 3.5, "peak_bytes": 1024},
        "train/a": {"finished": True, "settings": {}},
        "evaluate": {"finished": False, "settings": {}, "seconds": 1.0},
    }
    (tmp_path / "stages.json").write_text(json.dumps(records))
    assert contents.stages(tmp_path) == {"respond": {"seconds": 3.5, "peak_bytes": 1024}}
