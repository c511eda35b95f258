"""What a run found: statistics, report.json, report.md, plots."""

import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from ppow_jax import metrics, processes
from ppow_jax.console import log
from ppow_jax.data import records

_RESAMPLES = 2000


class TurnRounds(NamedTuple):
    """Verification passes of one response: tokens emitted, drafts accepted, drafts comparable."""

    emitted: np.ndarray
    accepted: np.ndarray
    offered: np.ndarray


class TurnDecoded(NamedTuple):
    """One response decoded for real: its prompt's id, ids, tokens by round, seconds."""

    prompt: str
    tokens: np.ndarray
    emitted: np.ndarray
    seconds: float


def acceptance(owners: Sequence[str], rounds: Sequence[TurnRounds], window: int) -> dict[str, Any]:
    """tau with its bootstrap interval over prompts, and acceptance by position in the window.

    tau = tokens emitted / verification passes, over all rounds (micro-average). The interval is the
    2.5th to 97.5th percentile of 2,000 resamples of the prompts.
    """
    names = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    tokens, passes = np.zeros(len(names)), np.zeros(len(names))
    for owner, r in zip(owners, rounds, strict=True):
        tokens[names[owner]] += r.emitted.sum()
        passes[names[owner]] += len(r.emitted)
    picks = np.random.default_rng(0).integers(0, len(names), (_RESAMPLES, len(names)))
    taus = tokens[picks].sum(1) / np.maximum(passes[picks].sum(1), 1)
    accepted = np.concatenate([r.accepted for r in rounds])
    offered = np.concatenate([r.offered for r in rounds])
    by_position = [float((accepted > j).sum() / max(1, (offered > j).sum())) for j in range(window)]
    return {
        "tau": float(tokens.sum() / passes.sum()),
        "tau_ci95": np.percentile(taus, [2.5, 97.5]).tolist(),
        "accepted_per_position": by_position,
        "rounds": int(passes.sum()),
        "tokens": int(tokens.sum()),
    }


def speed(
    plain: Sequence[TurnDecoded], drafted: Sequence[TurnDecoded], expected: Sequence[np.ndarray] | None
) -> dict[str, Any]:
    """Speedup and identity of really decoded responses.

    Args:
      plain: autoregressive decoding of the turns.
      drafted: the same turns with a drafter.
      expected: emitted tokens by round, by simulation, of the same turns; None: the turns were sampled, and
        there is nothing to compare their rounds with.
    """
    seconds = lambda turns: sum(t.seconds for t in turns)  # noqa: E731
    count = lambda turns: sum(len(t.tokens) for t in turns)  # noqa: E731
    prompts = list(dict.fromkeys(t.prompt for t in plain))
    same = {p: True for p in prompts}
    agree = {p: True for p in prompts}
    for a, b, rounds in zip(plain, drafted, expected or [None] * len(plain), strict=True):
        same[a.prompt] &= np.array_equal(a.tokens, b.tokens)
        agree[a.prompt] &= rounds is None or np.array_equal(b.emitted, rounds)
    fast, slow = count(drafted) / seconds(drafted), count(plain) / seconds(plain)
    return {
        "tokens_per_s": fast,
        "tokens_per_s_autoregressive": slow,
        "speedup": fast / slow,
        "decode_tau": sum(int(t.emitted.sum()) for t in drafted)
        / max(1, sum(len(t.emitted) for t in drafted)),
        "identical_outputs": sum(same.values()),
        "prompts": len(prompts),
    } | ({"same_rounds_as_simulated": sum(agree.values())} if expected is not None else {})


def mean(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Macro-averages over the benchmarks."""
    return {key: float(np.mean([b[key] for b in benchmarks.values()])) for key in ("tau", "speedup")}


def one_line(result: Mapping[str, Any]) -> str:
    """A result for the log."""
    low, high = result["tau_ci95"]
    return (
        f"tau {result['tau']:.3f} [{low:.3f}, {high:.3f}], speedup {result['speedup']:.2f}x, "
        f"{result['identical_outputs']}/{result['prompts']} identical"
    )


def device() -> dict[str, Any]:
    """The machine that measured."""
    kind = jax.devices()[0].device_kind
    return {
        "platform": jax.default_backend(),
        "kind": _processor() if kind == "cpu" else kind,
        "count": jax.device_count(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().split("\n"):
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write(workdir: pathlib.Path, report: dict[str, Any]) -> None:
    """report.json, report.md, plots, and the table on the terminal; by the first of several processes."""
    if not processes.first():
        return
    records.write_json(workdir / "report.json", report)
    (workdir / "report.md").write_text(markdown(report))
    Console().print(_table(report))
    plot(workdir, report)
    log.info("evaluate: %s", workdir / "report.md")


_COLUMNS = (
    "drafter", "benchmark", "tau", "95% interval", "rounds", "decoded tau", "tokens/s", "autoregressive",
    "speedup", "identical",
)  # fmt: skip
_NARROW = ("drafter", "benchmark", "tau", "95% interval", "speedup", "identical")  # 80 columns hold these


def rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The report's table as text cells."""
    out = []
    for stage, drafter in report["drafters"].items():
        for name, b in drafter["benchmarks"].items():
            low, high = b["tau_ci95"]
            out.append(
                (
                    stage,
                    name,
                    f"{b['tau']:.3f}",
                    f"[{low:.3f}, {high:.3f}]",
                    str(b["rounds"]),
                    f"{b['decode_tau']:.3f}",
                    f"{b['tokens_per_s']:.1f}",
                    f"{b['tokens_per_s_autoregressive']:.1f}",
                    f"{b['speedup']:.2f}x",
                    f"{b['identical_outputs']}/{b['prompts']}",
                )
            )
        m = drafter["mean"]
        out.append((stage, "mean", f"{m['tau']:.3f}", "", "", "", "", "", f"{m['speedup']:.2f}x", ""))
    return out


def markdown(report: Mapping[str, Any]) -> str:
    """report.md."""
    d, how = report["device"], report["decode_sampling"]
    warped = "".join(
        f", {k} {how[k]}" for k in ("top_k", "top_p") if how["temperature"] and how[k] not in (0, 1)
    )
    lines = [
        "# Report",
        "",
        f"Target `{report['target']['path']}` ({report['target']['dtype']}) on {d['kind']}, "
        f"{d['cores']} cores, {d['count']} {d['platform']} device(s), jax {d['jax']}.",
        f"tau: simulated exactly on all prompts, window {report['window']}. Speed: decoded for real, "
        f"{report['decode_shape']}, temperature {how['temperature']:g}{warped}, against autoregressive "
        f"decoding of the same prompts in turn.{_predicted(report)} "
        f"Measured gamma {report['gamma_measured']:.3f}.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|" + "---|" * len(_COLUMNS),
        *("| " + " | ".join(row) + " |" for row in rows(report)),
        "",
        "| drafter | steps | training time | parameters |",
        "|---|---|---|---|",
    ]
    for stage, drafter in report["drafters"].items():
        took = metrics.duration(drafter["seconds"])
        sha = drafter["params_sha256"][:12]
        lines.append(f"| {stage} | {drafter['steps']} | {took} | `{sha}` |")
    return "\n".join(lines) + "\n"


def _predicted(report: Mapping[str, Any]) -> str:
    """What `decode.shape: auto` expected, to be read beside what was measured."""
    expected = report.get("prediction")
    if not expected:
        return ""
    stage = expected["drafter"]
    measured = report["drafters"][stage]["mean"]["speedup"]
    return (
        f" The shape was chosen for {stage}: predicted from measured costs and held-out texts tau "
        f"{expected['tau']:.3f} and speedup {expected['speedup']:.2f}x (reading the prompt not counted), "
        f"measured {measured:.2f}x in the mean."
    )


def _table(report: Mapping[str, Any]) -> Table:
    table = Table(*_NARROW)
    shown = [_COLUMNS.index(name) for name in _NARROW]
    for row in rows(report):
        table.add_row(*(row[i] for i in shown), style="bold" if row[1] == "mean" else None)
    return table


def plot(workdir: pathlib.Path, report: Mapping[str, Any]) -> None:
    """plots/*.png; without matplotlib a hint instead."""
    try:
        from ppow_jax import plots
    except ImportError:
        log.info("no plots: matplotlib is missing (`pip install ppow_jax[plots]`)")
        return
    directory = workdir / "plots"
    directory.mkdir(exist_ok=True)
    plots.acceptance_length(report, directory / "acceptance_length.png")
    plots.acceptance_by_position(report, directory / "acceptance_by_position.png")
    plots.training_curves(metrics.read(workdir), directory / "training_curves.png")
