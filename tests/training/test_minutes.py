"""A run of so many minutes: how many steps these are is settled once, written down, and resumed."""

import json

import pytest
import runs

from ppow_jax.training import drafters, loop, metrics

CHANGES = dict(
    runs=("supervise",),
    stages=("respond", "train"),
    train__supervise__steps=0,
    train__supervise__minutes=1.0,
    log__checkpoint_every_steps=4,
)


class Stopped(Exception):
    """Stands for whatever ends a run in the middle."""


def test_minutes_become_steps_once(tmp_path, monkeypatch):
    """Timed at 5 s a step a minute has 12; when it goes on after the seventh nothing is timed again."""
    timed, made = [], []

    def five_seconds(*_):
        timed.append(1)
        return 5.0

    walk = loop._walk

    def walking(experiment, run, state, step, *rest):
        def stepping(number, *args):
            if number == 7 and not made:
                made.append(number)
                raise Stopped
            return step(number, *args)

        walk(experiment, run, state, stepping, *rest)

    monkeypatch.setattr(loop, "_seconds_a_step", five_seconds)
    monkeypatch.setattr(loop, "_walk", walking)
    workdir = tmp_path / "run"
    with pytest.raises(Stopped):
        runs.run(workdir, **CHANGES)
    known = json.loads((workdir / "train" / "supervise.json").read_text())
    assert known == {"steps": 12, "seconds_a_step": 5.0, "minutes": 1.0}
    runs.run(workdir, **CHANGES)
    assert timed == [1]
    assert [row["step"] for row in metrics.read(workdir)] == list(range(1, 13))
    assert drafters.load(runs.build(workdir, **CHANGES), "supervise").steps == 12


def test_steps_are_timed_without_touching_the_run(tmp_path, monkeypatch):
    """The real timing: it gives a time, and the run begins as if nothing had been timed."""
    monkeypatch.setattr(loop, "_TIMED_SECONDS", 0.0)
    seconds, found = [], {}
    measure = loop._seconds_a_step

    def measured(*args):
        seconds.append(measure(*args))
        return 60 / 3  # three steps a minute

    monkeypatch.setattr(loop, "_seconds_a_step", measured)
    for name, changes in (("timed", CHANGES), ("counted", CHANGES | dict(
        train__supervise__steps=3, train__supervise__minutes=0.0))):  # fmt: skip
        runs.run(tmp_path / name, **changes)
        found[name] = [(row["step"], row["loss"]) for row in metrics.read(tmp_path / name)]
    assert 0 < seconds[0] < 60
    assert found["timed"] == found["counted"]
