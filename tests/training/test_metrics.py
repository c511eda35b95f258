"""The metrics writer: one step late, honest about restarts, and strict about the loss."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ppow_jax.errors import UserError
from ppow_jax.settings import LogSettings
from ppow_jax.training import metrics
from ppow_jax.training.metrics import Writer


def lines(workdir) -> list[str]:
    return (workdir / "metrics.jsonl").read_text().splitlines()


def test_a_step_is_written_when_the_next_one_arrives(tmp_path):
    with Writer(tmp_path, "cst", 3) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "shares": jnp.array([0.25, 0.75])})
        assert lines(tmp_path) == []
        writer.write(2, {"loss": np.float32(0.25)})
        assert [json.loads(x)["step"] for x in lines(tmp_path)] == [1]
        writer.flush()
        assert [json.loads(x)["step"] for x in lines(tmp_path)] == [1, 2]
        writer.flush()  # nothing is pending
        writer.write(3, {"loss": 0})
        assert len(lines(tmp_path)) == 2
    rows = [json.loads(x) for x in lines(tmp_path)]  # leaving the context writes the last
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert rows[0] == {
        "stage": "cst", "step": 1, "seconds": rows[0]["seconds"], "loss": 0.5, "shares": [0.25, 0.75],
    }  # fmt: skip


def test_seconds_are_those_of_the_step_and_go_on_after_a_restart(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    with Writer(tmp_path, "cst", 9, first_step=4, seconds=50.0) as writer:
        for step in (5, 6):
            clock[0] += 1.5
            writer.write(step, {})
        assert writer.seconds == 53.0
    assert [json.loads(x)["seconds"] for x in lines(tmp_path)] == [51.5, 53.0]


def test_resume_drops_what_was_never_saved(tmp_path):
    rows = [("supervise", s) for s in range(1, 6)] + [("cst", s) for s in range(1, 6)]
    text = "".join(json.dumps({"stage": x, "step": s, "seconds": 0.5}) + "\n" for x, s in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"stage": "cst", "step": 6, "se')  # killed here
    assert [(r["stage"], r["step"]) for r in metrics.read(tmp_path)] == rows
    with Writer(tmp_path, "cst", 9, first_step=3) as writer:
        writer.write(4, {"loss": 1.0})
    found = [(r["stage"], r["step"]) for r in metrics.read(tmp_path)]
    assert found == [*rows[:8], ("cst", 4)]
    assert len(lines(tmp_path)) == 9  # the half line is gone too

    with Writer(tmp_path, "cst", 9):  # from the beginning
        pass
    assert {r["stage"] for r in metrics.read(tmp_path)} == {"supervise"}


def test_lines_cut_short_are_left_out(tmp_path):
    assert metrics.read(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n{"step": 4}')
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 3]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_refused(tmp_path, bad):
    writer = Writer(tmp_path, "ppow", 10)
    writer.write(1, {"loss": 1.0, "other": bad})  # only the loss decides
    writer.write(2, {"loss": jnp.float32(bad)})
    with pytest.raises(UserError, match=rf"^ppow: the loss at step 2 is {bad}; .*checkpoint is kept"):
        writer.write(3, {"loss": 1.0})
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]  # the bad step is on record
    writer.flush()  # and is not raised again


def test_a_gradient_that_is_not_finite_is_refused_before_it_is_saved(tmp_path):
    writer = Writer(tmp_path, "cst", 10)
    writer.write(1, {"loss": 1.0, "grad_norm": float("nan")})
    with pytest.raises(UserError, match=r"norm of the gradient at step 1 is nan; .*cst\.optimizer"):
        writer.flush()


def shown(monkeypatch, workdir, every: int, seconds: float, values: dict, width: int = 120) -> list[str]:
    """The lines of the log of steps 3 to 7, which take so many seconds each."""
    clock, lines = [0.0], []
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(metrics, "width", lambda: width)
    monkeypatch.setattr(metrics.log, "info", lambda form, *values: lines.append(form % values))
    with Writer(workdir, "cst", 7, first_step=2, settings=LogSettings(every_steps=every)) as writer:
        for step in range(3, 8):
            clock[0] += seconds
            writer.write(step, {"loss": step / 8, "shares": [0.5]} | values)
    return lines


def test_the_log_gets_a_line_now_and_then(tmp_path, monkeypatch):
    """Step 4, after the one that compiled, took 2 s, so 3 more take 6 s; the last is always shown."""
    assert shown(monkeypatch, tmp_path, 4, 2.0, {}) == [
        "cst 4/7 loss 0.5 | 2 s each | 6s left",
        "cst 7/7 loss 0.875 | 2 s each | 0s left",
    ]


def test_slow_steps_get_a_line_each_ten_seconds(tmp_path, monkeypatch):
    lines = shown(monkeypatch, tmp_path, 100, 4.0, {})
    assert [line.split()[1] for line in lines] == ["4/7", "7/7"]  # step 4 is written after 12 s


def test_the_speed_is_that_after_compilation(tmp_path, monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(metrics.log, "info", lambda form, *values: lines.append(form % values))
    with Writer(tmp_path, "cst", 5, seconds=7.0, settings=LogSettings(every_steps=1)) as writer:
        for step, seconds in enumerate((100.0, 2.0, 2.0), 1):
            clock[0] += seconds
            writer.write(step, {"loss": 1.0})
    assert [line.split(" | ", 1)[1] for line in lines] == [
        "the first step, with what it compiled, 1m40s", "2 s each | 6s left", "2 s each | 4s left",
    ]  # fmt: skip
    lines.clear()
    with Writer(tmp_path, "cst", 4, first_step=3, seconds=7.0) as writer:
        clock[0] += 3
        writer.write(4, {"loss": 1.0})
    assert lines == ["cst 4/4 loss 1 | the first step, with what it compiled, 3s"]


def test_a_line_shows_what_matters_most_and_as_much_of_it_as_fits(tmp_path, monkeypatch):
    many = {f"metric_{i}": i for i in range(30)} | {"accepted": 2.5, "accuracy_0": 0.5, "holdout_tau": 3.25}
    for width, line in (
        (120, "cst 4/7 loss 0.5 accepted 2.5 holdout_tau 3.25 | 2 s each | 6s left"),
        (66, "cst 4/7 loss 0.5 accepted 2.5 | 2 s each | 6s left"),
        (40, "cst 4/7 loss 0.5 | 2 s each | 6s left"),
        (20, "cst 4/7 | 2 s each |"),
    ):
        assert shown(monkeypatch, tmp_path, 4, 2.0, many, width)[0] == line
    del many["accepted"]
    assert " loss 0.5 accuracy_0 0.5 holdout" in shown(monkeypatch, tmp_path, 4, 2.0, many)[0]
