"""Plots of a report; needs the extra `plots`.

Figures have no background and one colour for all that is no data, so that as SVG they take the page's.
"""

import io
import itertools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import ColorType

Report = Mapping[str, Any]
Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl

_INK = "#010203"  # stands for the page's own colour
_STYLE: dict = {
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ppow_jax",
}
_FEW = 40  # points; a curve of more is smoothed


def figures(report: Report, rows: Rows) -> dict[str, Figure]:
    """All plots by name; those that there is nothing to draw of are left out.

    Args:
      report: what stands in report.json.
      rows: of metrics.jsonl.
    """
    drafters = report["drafters"]
    lineages = {name: drafter["lineage"] for name, drafter in drafters.items() if "lineage" in drafter}
    objectives = {name: drafter["objective"] for name, drafter in drafters.items() if name in lineages}
    with matplotlib.rc_context(_STYLE):
        found = {
            "acceptance_length": acceptance_length(report),
            "acceptance_by_position": acceptance_by_position(report),
            "differences": differences(report) if report["control"] else None,
            "training_curves": training_curves(rows, lineages, colours(drafters)),
            "training_metrics": training_metrics(rows, objectives, colours(drafters)),
        }
    return {name: figure for name, figure in found.items() if figure}


def colours(names: Sequence[str]) -> dict[str, ColorType]:
    """A colour for every run, by their order; of more than twenty runs some share one."""
    few, many = matplotlib.color_sequences["tab10"], matplotlib.color_sequences["tab20"]
    return dict(zip(names, itertools.cycle(few if len(names) <= len(few) else many), strict=False))


def write_png(figure: Figure, path: pathlib.Path) -> None:
    """Writes a figure on white."""
    figure.savefig(path, dpi=150, facecolor="white")


def svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element to stand in a page, with ids that belong to this name alone."""
    file = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))

    def own(match: re.Match) -> str:
        return f' id="{name}-{match[1]}"' if match[1] in used else ""

    text = re.sub(r'\s+id="([^"]+)"', own, text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", text)
    return text.replace(_INK, "currentColor")


def acceptance_length(report: Report) -> Figure:
    """Bars of tau by benchmark and drafter, with 95% intervals; with a control, below them what each drafter
    differs by from it, with paired intervals."""
    drafters, colour = report["drafters"], colours(report["drafters"])
    names = [*next(iter(drafters.values()))["benchmarks"], "mean"]
    compared = any("difference" in drafter["mean"] for drafter in drafters.values())
    bars = len(names) * len(drafters)
    size = (min(12, 1.5 + 0.5 * bars + 0.4 * len(names)), 5.2 if compared else 3.6)
    figure = Figure(figsize=size, layout="constrained")
    ratios = [2, 1] if compared else [1]
    axes, *below = figure.subplots(len(ratios), squeeze=False, sharex=True, height_ratios=ratios).flat
    width = 0.8 / len(drafters)
    for i, (name, drafter) in enumerate(drafters.items()):
        results = [drafter["mean"] if b == "mean" else drafter["benchmarks"][b] for b in names]
        at = np.arange(len(names)) + (i - (len(drafters) - 1) / 2) * width
        taus, errors = _centred(results, "tau", "tau_ci95")
        look: dict[str, Any] = dict(yerr=errors, capsize=3, color=colour[name])
        drawn = axes.bar(at, taus, width * 0.92, ecolor=_INK, label=name, **look)
        if len(drafters) <= 4:
            axes.bar_label(drawn, fmt="%.2f", padding=2, fontsize=8)
        if "difference" in drafter["mean"]:
            values, look["yerr"] = _centred([r["difference"] for r in results], "tau", "ci95")
            below[0].errorbar(at, values, fmt="o", markersize=5, linewidth=2, **look)
    for panel in (axes, *below):
        panel.set_xticks(range(len(names)), names)
        panel.grid(axis="x", visible=False)
    axes.set_ylim(bottom=1)  # that of decoding without a drafter
    axes.set_ylabel(f"acceptance length (tau), window {report['window']}")
    for panel in below:
        panel.axhline(0, color=_INK, linewidth=0.8)
        panel.set_ylabel(f"difference to {report['control']}")
    figure.legend(ncols=4, loc="outside upper center")
    return figure


def _centred(results: Rows, value: str, interval: str) -> tuple[np.ndarray, np.ndarray]:
    """Values, and how far their intervals reach to either side."""
    values = np.array([result[value] for result in results])
    ends = np.array([result[interval] for result in results]).T
    return values, np.maximum([values - ends[0], ends[1] - values], 0)


def acceptance_by_position(report: Report) -> Figure:
    """Share of rounds that accept the draft at each position of the window, one panel a benchmark."""
    drafters, colour = report["drafters"], colours(report["drafters"])
    names = list(next(iter(drafters.values()))["benchmarks"])
    figure, panels = _grid(len(names), 2.75, 2.1, sharey=True)
    for panel, benchmark in zip(panels, names, strict=True):
        for name, drafter in drafters.items():
            shares = drafter["benchmarks"][benchmark]["accepted_per_position"]
            at = range(1, len(shares) + 1)
            panel.plot(at, shares, marker="o", markersize=3, label=name, color=colour[name])
        panel.set_title(benchmark)
        panel.set_xlabel("position in the window")
        panel.locator_params(axis="x", integer=True)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("rounds that accept it")
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=5, loc="outside upper center")
    return figure


def differences(report: Report) -> Figure | None:
    """Differences of tau to the control with their paired intervals, one row a drafter."""
    compared = {n: d for n, d in report["drafters"].items() if "difference" in d["mean"]}
    if not compared:
        return None
    colour = colours(report["drafters"])
    benchmarks = [*next(iter(compared.values()))["benchmarks"], "mean"]
    figure, panels = _grid(len(benchmarks), 2.75, 0.7 + 0.22 * len(compared), sharey=True)
    for panel, benchmark in zip(panels, benchmarks, strict=True):
        for row, (name, drafter) in enumerate(compared.items()):
            result = drafter["mean"] if benchmark == "mean" else drafter["benchmarks"][benchmark]
            value, (low, high) = result["difference"]["tau"], result["difference"]["ci95"]
            panel.plot([low, high], [row, row], color=colour[name], linewidth=2)
            panel.plot([value], [row], "o", color=colour[name], markersize=5)
        panel.axvline(0, color=_INK, linewidth=0.8)
        panel.set_title(benchmark, fontweight="bold" if benchmark == "mean" else "normal")
        panel.grid(axis="y", visible=False)
        panel.locator_params(axis="x", nbins=4)
    panels[0].set_yticks(range(len(compared)), list(compared))
    panels[0].set_ylim(len(compared) - 0.5, -0.5)
    figure.supxlabel(f"tau minus that of {report['control']}, paired 95% interval", fontsize=9)
    return figure


def training_curves(
    rows: Rows, lineages: Mapping[str, Sequence[str]], colour: Mapping[str, ColorType]
) -> Figure | None:
    """Acceptance on held-out texts (solid) and on training texts (dotted), against steps and against minutes.

    Args:
      rows: of metrics.jsonl.
      lineages: of every run, the runs that it starts from, the first one first, and itself: it is drawn after
        their last steps.
      colour: of every run.
    """
    if not any("holdout_tau" in row for row in rows):
        return None
    figure, panels = _grid(4, 2.75, 2.5)
    before = {
        axis: {name: _spent(rows, lineage[:-1], key) for name, lineage in lineages.items()}
        for axis, key in _AXES.items()
    }
    kinds = {"tau": "acceptance length, greedy", "sampled": "accepted length, sampled"}
    for panel, (key, axis) in zip(panels, itertools.product(kinds, _AXES), strict=True):
        for name in lineages:
            about = (panel, rows, name, axis, before[axis][name], colour[name])
            _curve(*about, f"holdout_{key}", label=name)
            _curve(*about, f"train_{key}", linestyle=":")
        panel.set_ylabel(kinds[key])
        panel.set_xlabel(axis)
    figure.legend(*panels[0].get_legend_handles_labels(), ncols=5, loc="outside upper center")
    return figure


def training_metrics(
    rows: Rows, objectives: Mapping[str, str], colour: Mapping[str, ColorType]
) -> Figure | None:
    """What objectives report of their steps: the loss of each, reward and accepted length where there are."""
    panels: list[tuple[str, str, list[str]]] = []
    for objective in dict.fromkeys(objectives.values()):
        panels.append((f"loss of {objective}", "loss", [n for n in objectives if objectives[n] == objective]))
    for key, title in (("reward", "reward"), ("accepted", "accepted length in training")):
        panels.append((title, key, list(objectives)))
    panels = [p for p in panels if any(row["stage"] in p[2] and p[1] in row for row in rows)]
    if not panels:
        return None
    figure, axes = _grid(len(panels), 3.2, 2.5, columns=4)
    for panel, (title, key, names) in zip(axes, panels, strict=True):
        for name in names:
            _curve(panel, rows, name, "steps", 0, colour[name], key, label=name)
        panel.set_title(title)
        panel.set_xlabel("steps of the run")
        panel.legend()
    return figure


_AXES = {"steps": "step", "minutes": "seconds"}


def _spent(rows: Rows, names: Sequence[str], key: str) -> float:
    """The steps or seconds of runs together."""
    return sum(max((row.get(key, 0) for row in rows if row["stage"] == name), default=0) for name in names)


def _curve(
    panel: Axes,
    rows: Rows,
    name: str,
    axis: str,
    before: float,
    colour: ColorType,
    key: str,
    label: str | None = None,
    linestyle: str = "-",
) -> None:
    """A run's metric from `before` on; one of many points is drawn faint, with its running mean on top."""
    points = [(row[_AXES[axis]], row[key]) for row in rows if row["stage"] == name and key in row]
    if not points:
        return
    at, values = np.array(points, float).T
    at = (at + before) / (60 if axis == "minutes" else 1)
    look: dict[str, Any] = dict(color=colour, linewidth=1.2, linestyle=linestyle)
    if len(values) <= _FEW:
        panel.plot(at, values, marker="o", markersize=3, label=label, **look)
        return
    span = len(values) // 20
    panel.plot(at, values, alpha=0.3, **look)
    smooth = np.convolve(values, np.ones(span) / span, "valid")
    panel.plot(at[span - 1 :], smooth, label=label, **look)


def _grid(count: int, width: float, height: float, columns: int = 4, **how: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, each so large in inches."""
    columns = min(columns, count)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * lines + 0.3), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, **how).flat)
    for spare in panels[count:]:
        spare.set_axis_off()
    return figure, panels[:count]
