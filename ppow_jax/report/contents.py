"""What stands in report.json."""

import dataclasses
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ppow_jax.parallel import files
from ppow_jax.report import statistics
from ppow_jax.report.statistics import Measured
from ppow_jax.settings import Settings

# by drafter and benchmark
AllMeasured = Mapping[str, Mapping[str, Measured]]


def results(measured: AllMeasured, control: str | None) -> dict[str, dict[str, Any]]:
    """`benchmarks` and `mean` of every drafter, with the differences to the control if there is one."""
    found = {}
    for name, benchmarks in measured.items():
        each = {b: statistics.result(of) for b, of in benchmarks.items()}
        found[name] = {"benchmarks": each, "mean": statistics.mean(list(benchmarks.values()))}
        if control is not None and name != control:
            _compare(found[name], measured, [name], [control])
    return found


def repetitions(
    results: Mapping[str, Mapping[str, Any]],
    measured: AllMeasured,
    groups: Sequence[Sequence[str]],
    control: str | None,
) -> dict[str, dict[str, Any]]:
    """What runs that differ in nothing but their seed say together, by the first one's name.

    Args:
      results: of every drafter.
      measured: what they come from.
      groups: names of drafters, each in one group.
      control: is compared with, and so are its own repetitions.
    """
    controls = next((group for group in groups if control in group), [])
    found = {}
    for group in groups:
        if len(group) < 2:
            continue
        each = {
            b: statistics.spread([results[name]["benchmarks"][b] for name in group])
            for b in measured[group[0]]
        }
        mean = statistics.spread([results[name]["mean"] for name in group])
        found[group[0]] = {"drafters": list(group), "benchmarks": each, "mean": mean}
        if controls and group != controls:
            _compare(found[group[0]], measured, group, controls)
    return found


def _compare(
    result: Mapping[str, Any], measured: AllMeasured, ones: Sequence[str], others: Sequence[str]
) -> None:
    """Adds what drafters differ by to a result's benchmarks and mean."""
    of = lambda names, b: [measured[name][b] for name in names]  # noqa: E731
    pairs = {b: (of(ones, b), of(others, b)) for b in measured[ones[0]]}
    for b, pair in pairs.items():
        result["benchmarks"][b].update(statistics.compared([pair]))
    result["mean"].update(statistics.compared(list(pairs.values())))


def groups(settings: Settings, drafters: Sequence[str]) -> list[list[str]]:
    """The drafters in groups of runs that are the same but for the seed, their own or of what they start
    from.

    A run's own name may differ too, and with an empty `order` the order of its texts, which it decides.
    """
    found: dict[str, dict[tuple[int, ...], list[str]]] = {}
    for name in drafters:
        rest, seeds = _seeds(settings, name)
        found.setdefault(rest, {}).setdefault(seeds, []).append(name)
    # runs of the same seeds, too, are the same: only the first of them tells anything of seeds
    groups = [[names[0] for names in by_seeds.values()] for by_seeds in found.values()]
    return groups + [[again] for by in found.values() for names in by.values() for again in names[1:]]


def _seeds(settings: Settings, name: str) -> tuple[str, tuple[int, ...]]:
    """The settings of a run and of those that it starts from as text, without their seeds, and these."""
    if name not in settings.train:
        return name, ()
    runs = [settings.train[run] for run in settings.lineage(name)]
    rest = [dataclasses.replace(run, seed=0, start="" if at else run.start) for at, run in enumerate(runs)]
    return repr(rest), tuple(run.seed for run in runs)


def stages(workdir: pathlib.Path) -> dict[str, dict[str, float]]:
    """Wall-clock `seconds` and `peak_bytes` of resident memory of finished units, where they were noted."""
    found = {}
    for unit, record in (files.read_json(workdir / "stages.json") or {}).items():
        known = {key: record[key] for key in ("seconds", "peak_bytes") if key in record}
        if known and record["finished"]:
            found[unit] = known
    return found


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
