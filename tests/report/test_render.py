"""report.md, the table on the terminal, and the files of a report."""

import builtins
import io
import json

import pytest
import reports
from rich.console import Console

from ppow_jax.report import render, tables

PNG = b"\x89PNG"
REPEATED = {
    "ppow": {
        "drafters": ["ppow", "ppow_1"],
        "benchmarks": {
            "chat": {
                "tau": 2.5, "tau_std": 0.25, "speedup": 1.5, "speedup_std": 0.125, "difference": reports.GAIN,
            },
        },
        "mean": {"tau": 2.5, "tau_std": 0.25, "speedup": 1.5, "speedup_std": 0.125},
    }
}  # fmt: skip


def test_markdown_has_a_row_a_benchmark_and_a_mean_row():
    text = render.markdown(reports.report()).splitlines()
    for name, objective, start in (("supervise", "supervised", "fresh"), ("ppow", "ppow", "supervise")):
        at = text.index(
            f"| {name} | chat | 2.250 | [2.000, 2.500] | 40 | 1.750 | 30.0 | 20.0 | 1.50x | 7/8 |"
        )
        assert text[at + 1].startswith(f"| {name} | maths | 3.250 |")
        assert text[at + 2] == f"| {name} | mean | 2.750 | [2.500, 3.000] |  |  |  |  | 2.00x |  |"
        assert f"| {name} | {objective} | {start} | 0 | 30 | 4 | 1m15s | 0123456789ab |" in text
    assert any("Measured gamma 0.123" in line for line in text)
    assert any("at temperature 0.7, top_p 0.9, chain:2, against" in line for line in text)
    assert not any("difference" in line.lower() for line in text)  # there is no control
    table = [line.count("|") for line in text if line.startswith("|")]
    assert table == [11] * 8 + [9] * 4  # headings, rules and rows are as wide


def test_markdown_compares_with_the_control():
    text = render.markdown(reports.report("supervise"))
    assert "Differences are to supervise" in text
    assert "+0.125 [+0.025, +0.250]" in text and "-0.062 [-0.250, +0.125]" in text
    assert "-0.50 [-0.75, +0.25]" in text  # of the speedup
    # +0.125 of 2.75
    assert (
        "\n- ppow against supervise: tau +0.125 [+0.025, +0.250] (+4.5%) in the mean over benchmarks: above "
        "the control.\n"
    ) in text
    assert text.count("against supervise:") == 1


@pytest.mark.parametrize(
    ("ci95", "verdict"),
    [([0.01, 0.2], "above the control"), ([-0.2, -0.01], "below the control"), ([-0.1, 0.1], "told apart")],
)
def test_a_verdict_looks_at_the_interval(ci95, verdict):
    made = reports.report("supervise")
    made["drafters"]["ppow"]["mean"]["difference"]["ci95"] = ci95
    (line,) = tables.verdicts(made)
    assert verdict in line


def test_trees_repetitions_and_stages_have_columns_where_there_are_some():
    made = reports.report("supervise", tree="tree:6x2x3", runs=REPEATED)
    made["stages"] = {"train/ppow": {"seconds": 75.0, "peak_bytes": 3 * 2**29}, "respond": {"seconds": 3.0}}
    made["drafters"]["ppow"]["benchmarks"]["chat"] |= {
        "tau_tree": 4.5, "tau_tree_ci95": [4.0, 5.0], "difference_tree": {"tau": 0.5, "ci95": [0.25, 0.75]},
    }  # fmt: skip
    made["runs"]["ppow"]["benchmarks"]["chat"] |= {
        "tau_tree": 3.5, "tau_tree_std": 0.125, "difference_tree": {"tau": -0.5, "ci95": [-0.75, -0.25]},
    }  # fmt: skip
    text = render.markdown(made)
    assert "; of trees, tree:6x2x3." in text
    assert "| 4.500 | [4.000, 5.000] | +0.500 [+0.250, +0.750] |" in text
    assert "| benchmark | tau | difference of tau | speedup | tau, trees | difference of tau, trees |" in text
    trees = "3.500 ± 0.125 | -0.500 [-0.750, -0.250]"
    chain = "2.500 ± 0.250 | +0.125 [+0.025, +0.250]"
    assert f"| ppow | 2 | chat | {chain} | 1.50x ± 0.12 | {trees} |" in text
    assert "| ppow | 2 | mean | 2.500 ± 0.250 |  | 1.50x ± 0.12 |  |  |" in text
    assert "| train/ppow | 1m15s | 1.50 GiB |" in text and "| respond | 3s |  |" in text


def test_a_drafter_from_files_has_no_run():
    made = reports.report()
    about = made["drafters"]["ppow"]
    for key in ("objective", "start", "seed", "batch_size", "lineage"):
        del about[key]
    assert "| ppow | read from files |  |  | 30 |  | 1m15s |" in render.markdown(made)


def test_what_the_shape_was_chosen_for_stands_beside_what_was_measured():
    prediction = {"drafter": "ppow", "tau": 2.5, "speedup": 1.25}
    text = render.markdown(reports.report(prediction=prediction))
    assert "tau 2.500 and speedup 1.25x" in text and "measured 2.00x in the mean" in text


def test_what_is_left_out_is_said_where_there_is_any():
    nothing = {"beyond_context": 0, "turns_not_asked": 0}
    left_out = {
        "respond": {"beyond_context": 0, "beyond_data_length": 3, "turns_not_asked": 0, "imported_cut": 2},
        "evaluate": {"chat": nothing, "maths": nothing | {"beyond_context": 1, "turns_not_asked": 4}},
    }
    text = render.markdown(reports.report(left_out=left_out))
    assert (
        "Not in training texts: 3 prompts beyond data.length, 2 imported texts cut to the target's context.\n"
        "Not in maths: 1 prompts beyond the target's context, 4 later turns beyond the target's context.\n"
    ) in text
    for none in (left_out | {"respond": None, "evaluate": {"chat": nothing}}, {}):
        assert "Not in" not in render.markdown(reports.report(left_out=none))


@pytest.mark.parametrize("control", [None, "supervise"])
def test_the_terminals_table_fits_80_columns(control):
    made = reports.report(control)
    long = "supervise_with_a_long_name"
    made["drafters"] = {"supervise": made["drafters"]["supervise"], long: made["drafters"]["ppow"]}
    shown = io.StringIO()
    Console(file=shown, width=80, force_terminal=False).print(render.table(made))
    lines = shown.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in shown.getvalue()
    wanted = {"3.250", "7/8", "mean", "2.50x"}
    wanted |= {"+0.125 [+0.025, +0.250]"} if control else {"[2.000, 2.500]"}
    for text in wanted:
        assert text in shown.getvalue()


@pytest.fixture
def metrics(tmp_path):
    rows = [
        {"stage": s, "step": n, "seconds": n / 4, k: 1 / n, "holdout_tau": n, "train_tau": n + 1}
        for s, k in {"supervise": "loss", "ppow": "reward"}.items()
        for n in range(1, 60)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_write_puts_report_page_and_plots_in_place(tmp_path, metrics, capsys):
    made = reports.report("supervise")
    render.write(tmp_path, made, reports.windows())
    assert json.loads((tmp_path / "report.json").read_text()) == made
    assert (tmp_path / "report.md").read_text() == render.markdown(made)
    assert sorted(p.stem for p in (tmp_path / "plots").iterdir()) == [
        "acceptance_by_position", "acceptance_length", "differences", "training_curves", "training_metrics",
    ]  # fmt: skip
    for path in (tmp_path / "plots").iterdir():
        assert path.read_bytes().startswith(PNG) and path.stat().st_size > 5000
    assert "maths" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 3 and "four five" in page


def test_without_matplotlib_there_are_no_plots_but_all_else(tmp_path, metrics, monkeypatch):
    found = builtins.__import__

    def imported(name, *rest, **how):
        if name.split(".")[0] == "matplotlib" or (name == "ppow_jax.report" and "plots" in (rest[2] or ())):
            raise ImportError(name)
        return found(name, *rest, **how)

    monkeypatch.setattr(builtins, "__import__", imported)
    render.write(tmp_path, reports.report("supervise"), reports.windows())
    assert not (tmp_path / "plots").exists()
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in page and "four five" in page and "+0.125 [+0.025, +0.250]" in page
