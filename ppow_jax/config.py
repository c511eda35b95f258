"""Configs: ConfigDicts that the files in `configs/` make, and `Settings`, which all else sees.

`defaults` gives every key of `settings` as a ConfigDict, which the files in `configs/` change and
`--config.KEY=VALUE` overrides; `from_config` turns it into `Settings` and names the key of anything unknown,
of a wrong type or beyond its limits.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ppow_jax import keys
from ppow_jax.errors import ConfigError
from ppow_jax.settings import OBJECTIVES, RESERVED, STAGES, Settings, TrainSettings


def defaults() -> ConfigDict:
    """All keys but those of training runs, with their defaults; `train` is empty."""
    return _config_dict(to_dict(Settings()))


def training_run(objective: str | type, **changes: Any) -> ConfigDict:
    """The section of a training run with its defaults and the given changes.

    Args:
      objective: a name of `OBJECTIVES`, `module:Class`, or the class itself: one of a module or of a
        notebook's cell, which is known by its name.
      changes: values of keys; of a section in it (`optimizer`), a dict of those that change.

    Raises:
      ConfigError: an objective that there is not.
    """
    if isinstance(objective, type):
        objective = f"{objective.__module__}:{objective.__qualname__}"
    run = _config_dict(_flat(TrainSettings(objective=objective, method=objective_class(objective)())))
    try:
        run.update(_config_dict(changes))
    except (TypeError, KeyError) as e:
        raise ConfigError(f"a training run of {objective!r}: {e}") from e
    return run


def objective_class(name: str, where: str = "objective") -> type:
    """The class of an objective.

    Raises:
      ConfigError: it cannot be imported, or is none.
    """
    expected = f"expected {', '.join(OBJECTIVES)}, or module:Class of a frozen dataclass"
    taken = {field.name for field in dataclasses.fields(TrainSettings)}
    complaint = f"{where}: found {name!r}, {expected}"
    found = keys.section_class(OBJECTIVES.get(name, name), complaint, taken)
    methods = ("check", "rounds", "init", "signal", "prepare", "inputs", "observe", "summarise", "loss")
    missing = [m for m in methods if not callable(getattr(found, m, None))]
    missing += [] if any(f.name == "window" for f in dataclasses.fields(found)) else ["window"]
    if missing:
        raise ConfigError(
            f"{where}: {name!r} has no {', '.join(missing)}; expected a subclass of objectives.base.Objective"
        )
    return found


def to_dict(settings: Settings) -> dict[str, Any]:
    """Settings as nested dicts, as a ConfigDict has them; `from_config` takes them back."""
    return keys.to_dict(settings) | {"train": {name: _flat(run) for name, run in settings.train.items()}}


def _flat(run: TrainSettings) -> dict[str, Any]:
    """A training run with its objective's keys beside its own."""
    values = keys.to_dict(run)
    return values | values.pop("method")


def _config_dict(values: Mapping[str, Any]) -> ConfigDict:
    """A ConfigDict in the order of the values, however deep."""
    made = ConfigDict(sort_keys=False)
    for name, value in values.items():
        made[name] = _config_dict(value) if isinstance(value, Mapping) else value
    return made


def from_config(config: Mapping[str, Any]) -> Settings:
    """Validated settings from a ConfigDict (or any nested mapping); what is missing has its default.

    Raises:
      ConfigError: naming the key, what was found and what was expected.
    """
    settings = keys.build(Settings, config, "config", named=_build_run)
    _check(settings)
    return settings


def _build_run(values: Mapping[str, Any], path: str) -> TrainSettings:
    """A training run from its own keys and its objective's, which stand side by side."""
    name = path.rpartition(".")[-1]
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"{path}: found this name of a run, expected a letter, then letters, digits or _")
    if name in RESERVED:
        raise ConfigError(f"{path}: found the name {name!r}, expected one that means nothing else yet")
    if not hasattr(values, "keys"):
        raise ConfigError(f"{path}: found {values!r}, expected a group of keys")
    values = {name: values[name] for name in values}
    names = {f.name for f in dataclasses.fields(TrainSettings)} - {"method"}
    run = keys.build(TrainSettings, {k: v for k, v in values.items() if k in names}, path)
    cls = objective_class(run.objective, f"{path}.objective")
    own = {k: v for k, v in values.items() if k not in names}
    beside = f" (the objective {run.objective!r}), {', '.join(sorted(names))}"
    return dataclasses.replace(run, method=keys.build(cls, own, path, beside))


def _check(s: Settings) -> None:
    """Keys of several sections that do not go together; the stages check what is theirs (`run.check`)."""

    def require(holds: bool, where: str, found: Any, expected: str) -> None:
        if not holds:
            raise ConfigError(f"config.{where}: found {found!r}, expected {expected}")

    order = [STAGES.index(x) for x in s.stages if x in STAGES]
    in_order = len(order) == len(s.stages) > 0 and order == sorted(set(order))
    require(in_order, "stages", s.stages, f"a subset, in order, of {', '.join(STAGES)}")
    names = list(s.train)
    for name in s.runs:
        require(name in names, "runs", name, f"some of {', '.join(names)}")
    for where, name in (("export.drafter", s.export.drafter), ("evaluate.control", s.evaluate.control)):
        require(name in ("", *names), where, name, f"one of {', '.join(names)}, or empty")
    for at, (name, run) in enumerate(s.train.items()):
        here = f"train.{name}"
        lengths = f"steps {run.steps} and minutes {run.minutes:g}"
        require((run.steps > 0) != (run.minutes > 0), f"{here}.steps", lengths, "one of them, the other 0")
        require(run.batch_size % run.accumulate == 0, f"{here}.accumulate", run.accumulate,
                f"a divisor of {here}.batch_size")  # fmt: skip
        later = names[at:]
        require(run.start not in later, f"{here}.start", run.start, "fresh, an earlier run, or a directory")
    require(not (s.drafter.width and s.drafter.induction), "drafter.induction", s.drafter.induction,
            "False for a drafter of a width of its own: the heads read the target's embedding")  # fmt: skip
