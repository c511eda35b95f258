"""A report's sentences and tables as text, for Markdown, HTML and the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ppow_jax.training import metrics

Report = Mapping[str, Any]  # what stands in report.json
Row = dict[str, str]  # text by column

REPETITIONS = (
    "Runs that differ in nothing but their seeds, together: mean and standard deviation over seeds; the "
    "interval of the difference is that of other prompts."
)


def interval(ends: Sequence[float], form: str = ".3f") -> str:
    """`[low, high]`."""
    low, high = ends
    return f"[{low:{form}}, {high:{form}}]"


def cells(report: Report) -> list[Row]:
    """The report's table as text by column, a row for every drafter and benchmark and its mean.

    Columns that the report has nothing for are not there.
    """
    rows = []
    for name, drafter in report["drafters"].items():
        for benchmark, result in (*drafter["benchmarks"].items(), ("mean", drafter["mean"])):
            rows.append({"drafter": name, "benchmark": benchmark} | _cells(result))
    used = [column for column in rows[0] if any(row[column] for row in rows)]
    return [{column: row[column] for column in used} for row in rows]


def _cells(result: Mapping[str, Any]) -> dict[str, str]:
    """What is known of a benchmark or of the mean; the rest is empty."""

    def shown(key: str, form: str = ".3f", unit: str = "") -> str:
        return f"{result[key]:{form}}{unit}" if key in result else ""

    def bounds(key: str) -> str:
        return interval(result[key]) if key in result else ""

    def change(key: str, what: str, ends: str, form: str = "+.3f") -> str:
        of = result.get(key)
        return f"{of[what]:{form}} {interval(of[ends], form)}" if of else ""

    return {
        "tau": shown("tau"),
        "95% interval": bounds("tau_ci95"),
        "difference": change("difference", "tau", "ci95"),
        "tree tau": shown("tau_tree"),
        "tree 95% interval": bounds("tau_tree_ci95"),
        "tree difference": change("difference_tree", "tau", "ci95"),
        "rounds": shown("rounds", "d"),
        "decoded tau": shown("decode_tau"),
        "tokens/s": shown("tokens_per_s", ".1f"),
        "autoregressive": shown("tokens_per_s_autoregressive", ".1f"),
        "speedup": shown("speedup", ".2f", "x"),
        "speedup difference": change("difference", "speedup", "speedup_ci95", "+.2f"),
        "identical": identical(result) if "identical_outputs" in result else "",
    }


def identical(result: Mapping[str, Any]) -> str:
    """How many of the decoded texts are those of autoregressive decoding."""
    return f"{result['identical_outputs']}/{result['prompts']}"


def introduction(report: Report) -> list[str]:
    """What was measured, where and how, in sentences."""
    device, how = report["device"], report["decode_sampling"]
    temperature = how["temperature"]
    warped = "".join(f", {k} {how[k]}" for k in ("top_k", "top_p") if temperature and how[k] not in (0, 1))
    at = f"temperature {temperature:g}{warped}"
    trees = f"; of trees, {report['tree']}" if report["tree"] else ""
    against = report["control"]
    paired = ", with 95% intervals of a bootstrap over the prompts that both drafters share"
    compared = f" Differences are to {against}{paired}." if against else ""
    return [
        f"Target `{report['target']['path']}` ({report['target']['dtype']}) on {device['kind']}, "
        f"{device['cores']} cores, {device['count']} {device['platform']} device(s), jax {device['jax']}.",
        f"tau: tokens a verification pass at {at}, simulated exactly on all prompts, window "
        f"{report['window']}{trees}. Speed: decoded for real at {at}, {report['decode_shape']}, against "
        f"autoregressive decoding of the same prompts in "
        f"turn.{_predicted(report)} Measured gamma {report['gamma_measured']:.3f}.{compared}",
        *_left_out(report),
    ]


_LEFT_OUT = {
    "beyond_context": "prompts beyond the target's context",
    "beyond_data_length": "prompts beyond data.length",
    "turns_not_asked": "later turns beyond the target's context",
    "imported_cut": "imported texts cut to the target's context",
    "other_ids": "prompts whose text by a server is another one when it is encoded",
}


def _left_out(report: Report) -> Iterator[str]:
    """What is missing from the training texts and from the benchmarks, a sentence each."""
    counts = report.get("left_out") or {}
    for name, found in (("training texts", counts.get("respond")), *counts.get("evaluate", {}).items()):
        missing = [f"{n} {_LEFT_OUT[what]}" for what, n in (found or {}).items() if n]
        if missing:
            yield f"Not in {name}: {', '.join(missing)}."


def _predicted(report: Report) -> str:
    """What `decode.shape: auto` expected, to be read beside what was measured."""
    expected = report.get("prediction")
    if not expected:
        return ""
    name = expected["drafter"]
    measured = report["drafters"][name]["mean"]["speedup"]
    return (
        f" The shape was chosen for {name}: predicted from measured costs and held-out texts tau "
        f"{expected['tau']:.3f} and speedup {expected['speedup']:.2f}x (reading the prompt not counted), "
        f"measured {measured:.2f}x in the mean."
    )


def verdicts(report: Report) -> list[str]:
    """What the comparison with the control says of each drafter's mean, a line each."""
    lines = []
    for name, drafter in report["drafters"].items():
        mean, base = drafter["mean"], report["control"]
        if "difference" not in mean:
            continue
        found = mean["difference"]
        low, high = found["ci95"]
        side = "above the control" if low > 0 else "below the control" if high < 0 else "cannot be told apart"
        share = found["tau"] / report["drafters"][base]["mean"]["tau"]
        trees = ""
        if tree := mean.get("difference_tree"):
            trees = f" Trees: {tree['tau']:+.3f} {interval(tree['ci95'], '+.3f')}."
        lines.append(
            f"{name} against {base}: tau {found['tau']:+.3f} {interval(found['ci95'], '+.3f')} "
            f"({share:+.1%}) in the mean over benchmarks: {side}.{trees}"
        )
    return lines


def repetition_cells(report: Report) -> list[Row]:
    """Rows of the runs that are repeated with other seeds."""
    rows = []
    for name, group in report["runs"].items():
        for benchmark, result in (*group["benchmarks"].items(), ("mean", group["mean"])):
            row = {"run": name, "seeds": str(len(group["drafters"])), "benchmark": benchmark}
            row |= _repeated(result, "tau", "tau", "difference")
            row["speedup"] = f"{result['speedup']:.2f}x ± {result['speedup_std']:.2f}"
            if "tau_tree" in result:
                row |= _repeated(result, "tau_tree", "tau, trees", "difference_tree")
            rows.append(row)
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column, "") for column in columns} for row in rows]


def _repeated(result: Mapping[str, Any], key: str, title: str, compared: str) -> Row:
    """Mean and standard deviation over seeds, and the difference to the control if there is one."""
    found = result.get(compared)
    change = f"{found['tau']:+.3f} {interval(found['ci95'], '+.3f')}" if found else ""
    return {title: f"{result[key]:.3f} ± {result[f'{key}_std']:.3f}", f"difference of {title}": change}


def run_cells(report: Report) -> list[Row]:
    """Rows about where the drafters come from."""
    return [
        {
            "drafter": name,
            "objective": drafter.get("objective", "read from files"),
            "start": drafter.get("start", ""),
            "seed": str(drafter.get("seed", "")),
            "steps": str(drafter["steps"]),
            "texts a step": str(drafter.get("batch_size", "")),
            "training time": metrics.duration(drafter["seconds"]),
            "parameters": drafter["params_sha256"][:12],
        }
        for name, drafter in report["drafters"].items()
    ]


def stage_cells(report: Report) -> list[Row]:
    """Rows about what the stages took."""
    return [
        {
            "stage": unit,
            "wall-clock": metrics.duration(record["seconds"]) if "seconds" in record else "",
            "peak memory": f"{record['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in record else "",
        }
        for unit, record in report["stages"].items()
    ]
