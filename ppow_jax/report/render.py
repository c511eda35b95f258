"""report.md, the table on the terminal, and all files of a report."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ppow_jax.parallel import files, processes
from ppow_jax.parallel.console import log
from ppow_jax.report import html, tables
from ppow_jax.report.tables import Report, Row, interval
from ppow_jax.training import metrics


def write(workdir: pathlib.Path, report: Report, windows: Mapping[str, Any]) -> None:
    """report.json, report.md, report.html, plots, and the table on the terminal; of several processes the
    first.

    Args:
      workdir: where they are written, and where metrics.jsonl lies.
      report: what stands in report.json.
      windows: `drafter`, and its `samples` as `measure.samples` gives them.
    """
    if not processes.first():
        return
    files.write_json(workdir / "report.json", report)
    (workdir / "report.md").write_text(markdown(report))
    rows = metrics.read(workdir)
    figures = plot(workdir, report, rows)
    (workdir / "report.html").write_text(html.page(report, windows, figures), encoding="utf-8")
    Console().print(table(report))
    log.info("evaluate: %s", workdir / "report.html")


def plot(workdir: pathlib.Path | None, report: Report, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Gives the plots of the page as SVG, by name, and writes all of them as plots/*.png, unless the workdir
    is None; without matplotlib a hint, and none."""
    try:
        from ppow_jax.report import plots
    except ImportError:
        log.info("no plots: matplotlib is missing (`pip install ppow_jax[plots]`)")
        return {}
    figures = plots.figures(report, rows)
    if workdir is not None:
        directory = workdir / "plots"
        directory.mkdir(exist_ok=True)
        for name, figure in figures.items():
            plots.write_png(figure, directory / f"{name}.png")
    return {name: plots.svg(figures[name], name) for name in html.FIGURES if name in figures}


def fragment(workdir: pathlib.Path, report: Report) -> str:
    """What was measured, with its plots, for a notebook; `workdir` has the metrics of training."""
    return html.fragment(html.overview(report, plot(None, report, metrics.read(workdir))))


def one_line(result: Mapping[str, Any]) -> str:
    """A result for the log."""
    tree = f", of trees {result['tau_tree']:.3f}" if "tau_tree" in result else ""
    same = f", {tables.identical(result)} identical" if "identical_outputs" in result else ""
    tau = f"tau {result['tau']:.3f} {interval(result['tau_ci95'])}{tree}"
    return f"{tau}, speedup {result['speedup']:.2f}x{same}"


_NARROW = ("drafter", "benchmark", "tau", "95% interval", "speedup", "identical")  # 80 columns hold these
_NARROW_COMPARED = ("drafter", "benchmark", "tau", "difference", "speedup", "identical")


def table(report: Report) -> Table:
    """For a terminal of 80 columns; with a control its intervals are those of the differences."""
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = _NARROW if report["control"] is None else _NARROW_COMPARED
    for column in columns:
        name = column in ("drafter", "benchmark")
        heading = f"difference to {report['control']}" if column == "difference" else column
        found.add_column(heading, justify="left" if name else "right", overflow="fold", no_wrap=not name)
    for row in tables.cells(report):
        mean = row["benchmark"] == "mean"
        values = (row.get(column, "") for column in columns)
        found.add_row(*values, style="bold" if mean else None, end_section=mean)
    return found


def markdown(report: Report) -> str:
    """report.md."""
    parts = ["# Report", "\n".join(tables.introduction(report))]
    if verdicts := tables.verdicts(report):
        parts.append("\n".join(f"- {line}" for line in verdicts))
    parts.append(_markdown(tables.cells(report)))
    if report["runs"]:
        parts += [tables.REPETITIONS, _markdown(tables.repetition_cells(report))]
    parts.append(_markdown(tables.run_cells(report)))
    if report["stages"]:
        parts.append(_markdown(tables.stage_cells(report)))
    return "\n\n".join(parts) + "\n"


def _markdown(rows: Sequence[Row]) -> str:
    """A table of Markdown."""
    every = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in every)
