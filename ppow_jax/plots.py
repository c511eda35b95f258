"""Plots of a report; needs the extra `plots`."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {"supervise": "tab:blue", "cst": "tab:orange", "ppow": "tab:green"}


def acceptance_length(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Bars of tau by benchmark and drafter, with 95% intervals."""
    drafters = report["drafters"]
    names = list(next(iter(drafters.values()))["benchmarks"])
    figure, axes = plt.subplots(figsize=(1.5 + 1.8 * len(names), 3.6), layout="constrained")
    width = 0.8 / len(drafters)
    for i, (stage, drafter) in enumerate(drafters.items()):
        taus = np.array([drafter["benchmarks"][n]["tau"] for n in names])
        low, high = np.array([drafter["benchmarks"][n]["tau_ci95"] for n in names]).T
        at = np.arange(len(names)) + (i - (len(drafters) - 1) / 2) * width
        bars = axes.bar(
            at,
            taus,
            width * 0.92,
            yerr=[np.maximum(taus - low, 0), np.maximum(high - taus, 0)],
            capsize=3,
            label=stage,
            color=_COLOURS.get(stage),
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(f"acceptance length, window {report['window']}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.legend(ncols=3, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.14), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def acceptance_by_position(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """Share of rounds that accept the draft at each position of the window, one panel a benchmark."""
    drafters = report["drafters"]
    names = list(next(iter(drafters.values()))["benchmarks"])
    figure, panels = plt.subplots(
        1,
        len(names),
        figsize=(3.2 * len(names), 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, name in zip(panels[0], names, strict=True):
        for stage, drafter in drafters.items():
            shares = drafter["benchmarks"][name]["accepted_per_position"]
            at = range(1, len(shares) + 1)
            panel.plot(at, shares, marker="o", markersize=3, label=stage, color=_COLOURS.get(stage))
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("position in the window")
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("share of rounds that accept it")
    panels[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def training_curves(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """Greedy and sampled acceptance on held-out texts (solid) and training texts (dotted), supervised
    loss, PPOW's reward."""
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    stages = ("supervise", "cst", "ppow")
    # cst and ppow both start where supervise ends
    end = max((r["step"] for r in rows if r["stage"] == "supervise"), default=0)
    offset = {"supervise": 0, "cst": end, "ppow": end}
    for panel, key, title in (
        (panels[0], "tau", "acceptance length (greedy)"),
        (panels[1], "sampled", "accepted length of sampled windows"),
    ):
        for stage in stages:
            _curve(panel, rows, stage, f"holdout_{key}", offset[stage], stage)
            _curve(panel, rows, stage, f"train_{key}", offset[stage], None, linestyle=":")
        panel.set_title(f"{title}\nheld-out, dotted: training texts", fontsize=9)
    for stage in ("supervise", "cst"):
        _curve(panels[2], rows, stage, "loss", offset[stage], stage)
    panels[2].set_title("supervised loss", fontsize=9)
    _curve(panels[3], rows, "ppow", "reward", 0, "ppow")
    panels[3].set_title("reward of rollouts", fontsize=9)
    for panel in panels:
        panel.set_xlabel("step")
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curve(
    panel: Any,
    rows: Sequence[Mapping[str, Any]],
    stage: str,
    key: str,
    offset: int,
    label: str | None,
    **style: Any,
) -> None:
    """A stage's metric against its steps; a long one faint, with its running mean on top."""
    points = [(r["step"] + offset, r[key]) for r in rows if r["stage"] == stage and key in r]
    if not points:
        return
    steps, values = np.array(points, float).T
    look = dict(color=_COLOURS[stage], linewidth=1) | style
    if len(values) <= 40:
        panel.plot(steps, values, marker="o", markersize=3, label=label, **look)
        return
    span = len(values) // 20
    panel.plot(steps, values, alpha=0.3, **look)
    smooth = np.convolve(values, np.ones(span) / span, "valid")
    panel.plot(steps[span - 1 :], smooth, label=label, **look)
