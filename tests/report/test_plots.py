"""What the plots show, read back from the figures."""

import numpy as np
import pytest
import reports

from ppow_jax.report import plots

COLOUR = {"supervise": "C0", "cst": "C1", "ppow": "C2"}
LINEAGES = {"supervise": ["supervise"], "cst": ["supervise", "cst"], "ppow": ["supervise", "cst", "ppow"]}


def row(stage: str, step: int, seconds: float, **metrics) -> dict:
    return {"stage": stage, "step": step, "seconds": seconds} | metrics


def points(panel) -> list:
    return [line.get_xydata().tolist() for line in panel.lines]


def test_bars_and_shares():
    lengths, positions = (
        plots.acceptance_length(reports.report()),
        plots.acceptance_by_position(reports.report()),
    )
    (bars,) = lengths.axes
    assert [bar.get_height() for bar in bars.patches] == [2.25, 3.25, 2.75] * 2
    assert bars.get_ylim()[0] == 1
    assert positions.axes[1].get_title() == "maths"
    assert points(positions.axes[0]) == [[[1, 0.75], [2, 0.5]]] * 2


def test_below_the_bars_each_drafter_is_compared_with_the_control():
    bars, below = plots.acceptance_length(reports.report("supervise")).axes
    assert len(bars.patches) == 6
    (points, _, (intervals,)) = below.containers[0]  # of ppow alone: the control has no difference
    assert len(below.containers) == 1 and below.get_ylabel() == "difference to supervise"
    assert points.get_ydata().tolist() == [0.125, -0.0625, 0.125]
    assert points.get_xdata().tolist() == [b.get_x() + b.get_width() / 2 for b in bars.patches[3:]]
    ends = [segment[:, 1] for segment in intervals.get_segments()]
    assert np.allclose(ends, [[0.025, 0.25], [-0.25, 0.125], [0.025, 0.25]])


def test_differences_are_drawn_with_their_intervals():
    figure = plots.differences(reports.report("supervise"))
    chat, maths, _ = figure.axes
    assert [panel.get_title() for panel in figure.axes] == ["chat", "maths", "mean"]
    low_to_high, value, zero = chat.lines
    assert low_to_high.get_xydata().tolist() == [[0.025, 0], [0.25, 0]]
    assert value.get_xydata().tolist() == [[0.125, 0]]
    assert set(zero.get_xdata()) == {0}
    assert maths.lines[1].get_xdata().tolist() == [-0.0625]
    assert [label.get_text() for label in chat.get_yticklabels()] == ["ppow"]


def test_a_run_is_drawn_after_those_that_it_starts_from():
    rows = [row("supervise", s, 60.0 * s, holdout_tau=1.5) for s in (1, 2)]
    rows += [row("cst", s, 30.0 * s, holdout_tau=1.75) for s in (3, 4)]
    rows += [row("ppow", 1, 90.0, holdout_tau=2.0, train_sampled=0.75)]
    figure = plots.training_curves(rows, LINEAGES, COLOUR)
    tau_steps, tau_minutes, sampled_steps, sampled_minutes = figure.axes
    assert points(tau_steps) == [[[1, 1.5], [2, 1.5]], [[5, 1.75], [6, 1.75]], [[7, 2.0]]]
    # minutes: supervise 2, cst another 2
    assert points(tau_minutes) == [[[1, 1.5], [2, 1.5]], [[3.5, 1.75], [4, 1.75]], [[5.5, 2.0]]]
    assert points(sampled_steps) == [[[7, 0.75]]] and points(sampled_minutes) == [[[5.5, 0.75]]]
    assert [line.get_linestyle() for line in sampled_steps.lines] == [":"]  # of training texts
    assert [line.get_linestyle() for line in tau_steps.lines] == ["-"] * 3
    assert [line.get_color() for line in tau_steps.lines] == ["C0", "C1", "C2"]
    assert (tau_steps.get_xlabel(), tau_minutes.get_xlabel()) == ("steps", "minutes")


def test_each_objectives_loss_has_a_panel_of_its_own():
    objectives = {"supervise": "supervised", "cst": "supervised", "ppow": "ppow"}
    rows = [row(name, 1, 1.0, loss=float(i)) for i, name in enumerate(objectives)]
    rows += [row("ppow", 2, 2.0, reward=0.5)]
    figure = plots.training_metrics(rows, objectives, COLOUR)
    assert [(panel.get_title(), points(panel)) for panel in figure.axes if panel.get_title()] == [
        ("loss of supervised", [[[1, 0.0]], [[1, 1.0]]]),
        ("loss of ppow", [[[1, 2.0]]]),
        ("reward", [[[2, 0.5]]]),  # and no panel of accepted lengths, which nobody has
    ]


def test_a_long_curve_is_drawn_with_its_running_mean():
    rows = [row("supervise", s, 1.0 * s, holdout_tau=s % 2) for s in range(1, 101)]
    faint, smooth = plots.training_curves(rows, {"supervise": ["supervise"]}, COLOUR).axes[0].lines
    assert len(faint.get_xdata()) == 100 and faint.get_alpha() < 0.5
    assert len(smooth.get_xdata()) == 96 and smooth.get_xdata()[-1] == 100
    assert set(smooth.get_ydata().round(6)) == {0.4, 0.6}  # of five in turn


def test_what_there_is_nothing_of_is_not_drawn():
    assert set(plots.figures(reports.report(), [])) == {"acceptance_length", "acceptance_by_position"}
    assert plots.training_curves([row("supervise", 1, 1.0, loss=1.0)], LINEAGES, COLOUR) is None


def test_every_run_has_a_colour():
    found = plots.colours([f"run_{i}" for i in range(12)])
    assert len(found) == len(set(found.values())) == 12
    many = plots.colours([f"run_{i}" for i in range(21)])
    assert len(set(many.values())) == 20 and many["run_20"] == many["run_0"] != many["run_1"]


def test_svg_is_the_same_each_time_and_its_ids_are_its_own():
    first, again = (plots.svg(plots.acceptance_length(reports.report()), "bars") for _ in range(2))
    assert first == again and first.startswith("<svg") and "currentColor" in first
    other = plots.svg(plots.acceptance_length(reports.report()), "other")
    assert 'id="bars-' in first and 'id="bars-' not in other
    assert ">chat</text>" in first  # text is text


@pytest.mark.parametrize("drafters", [1, 7])
def test_any_number_of_drafters(drafters):
    made = reports.report()
    made["drafters"] = {f"run_{i}": made["drafters"]["ppow"] for i in range(drafters)}
    assert len(plots.figures(made, [])) == 2
