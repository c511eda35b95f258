"""The stages of a run, in order: what is done, what changed, what is still to do.

`respond`, a unit `train/NAME` for each training run, `evaluate` and `export`.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from ppow_jax import experiment
from ppow_jax.config import to_dict, training_run
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import files, memory, partition, processes, progress
from ppow_jax.parallel.console import log
from ppow_jax.settings import Settings
from ppow_jax.stages import evaluate, export, inputs, respond, train

_STAGES = {"respond": respond, "train": train, "evaluate": evaluate, "export": export}
# The sections of the settings that decide what a stage writes; of training runs see `_relevant`.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "respond": ("seed", "target", "respond"),
    "train": ("seed", "target", "respond", "data", "drafter"),
    "evaluate": ("seed", "target", "respond", "data", "drafter", "decode", "evaluate"),
    "export": ("target", "drafter", "export"),
}
# What tells that it was written; a unit is done again where that is gone.
_LEAVES = {"evaluate": ("evaluate", "report.json"), "export": ("export/manifest.json",)}
# Directories that a stage writes to.
_WRITES = {
    "respond": ("responses", "features"),
    "train": ("checkpoints", "train"),
    "evaluate": ("evaluate", "plots"),
    "export": ("export",),
}
_REPEATABLE = ("evaluate", "export")  # cheap and harmless to do again with other settings
_HOW = (
    "respond.concurrency",
    "respond.timeout",
    "respond.compared",
)  # of asking a server, not what it writes
_MAY_CHANGE = ("optimizer", "accumulate")  # of a run that is not finished: it may go on more carefully


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """Runs the stages that are not finished, each from where it was stopped.

    Raises:
      UserError: anything that the user can mend.
    """
    workdir = files.directory(workdir, "--workdir")
    with files.held(workdir, "--workdir"), progress.followed():
        _keep_programs(workdir)
        todo = processes.agreed(plan(settings, workdir))
        known = files.read_json(workdir / "target.json") or {}
        path = settings.target.path
        now = {"path": path, "files": experiment.target_files(path)}
        moved = any(known.get(key, value) != value for key, value in now.items())
        if todo or moved:
            made = _prepared(settings, workdir, todo)
        if not todo:
            log.info("every stage is finished; nothing to do in %s", workdir)
            return
        with jax.set_mesh(made.mesh):
            for unit in todo:
                log.info("stage %s", unit)
                with progress.during(unit):
                    _do(made, unit)


def _prepared(settings: Settings, workdir: pathlib.Path, todo: list[str]) -> Experiment:
    """The experiment, when all that can be known of the stages before they begin has been looked at."""
    require_place(workdir, todo)
    check(settings, todo)
    check_starts(settings, todo, workdir)
    with progress.during(f"loading the target {settings.target.path}"):
        made = experiment.build(settings, workdir)
    check_target(made, todo)
    experiment.keep_target(made)
    files.write_json(workdir / "config.json", to_dict(settings))
    return made


def _do(made: Experiment, unit: str) -> None:
    """Does a unit, and notes how far it is and what it takes."""
    settings, workdir = made.settings, made.workdir
    about: dict[str, Any] = {"read": inputs.read(settings, unit, workdir)}
    _mark(settings, workdir, unit, finished=False, **about)
    began, before = time.monotonic(), _seconds(workdir, unit)
    memory.drop_programs()  # those of the stage before
    memory.forget_peak()
    try:
        _run(made, unit)
    finally:  # a run that is stopped has taken its time too
        about["seconds"] = round(before + time.monotonic() - began, 1)
        _mark(settings, workdir, unit, finished=False, **about)
    processes.together(f"{unit} is finished")
    _mark(settings, workdir, unit, finished=True, **about, peak_bytes=memory.peak_bytes())


def require_place(workdir: pathlib.Path, todo: list[str]) -> None:
    """A workdir that is a run's, or new, and that can be written wherever the stages will write.

    Raises:
      UserError: it is something else's, or cannot be written.
    """
    config = files.read_json(workdir / "config.json")
    if config is not None and not (isinstance(config, dict) and "stages" in config):
        raise UserError(
            f"--workdir: {str(workdir)!r} holds a config.json of something else; name a directory of its own"
        )
    for name in ("", *dict.fromkeys(name for unit in todo for name in _WRITES[_stage(unit)])):
        if (workdir / name).exists():
            files.require_writable(workdir / name, "--workdir")


def check(settings: Settings, todo: list[str]) -> None:
    """All that the stages can know before a target is loaded.

    Raises:
      UserError: a stage of the run could not be done.
    """
    for stage in settings.stages:
        if any(_stage(unit) == stage for unit in todo):
            _STAGES[stage].check(settings)


def check_target(made: Experiment, todo: list[str]) -> None:
    """All that the stages can know once the target is there.

    Raises:
      UserError: a stage of the run could not be done.
    """
    for name, stage in _STAGES.items():
        if any(_stage(unit) == name for unit in todo):
            stage.check_target(made)


def check_starts(settings: Settings, todo: list[str], workdir: pathlib.Path) -> None:
    """The runs that others begin with, or that are exported, are trained before.

    Raises:
      ConfigError: one is neither finished nor to do.
    """
    begun = _begun(workdir)
    wanted = [("export.drafter", settings.exported())] if "export" in todo else []
    for unit in todo:
        stage, _, name = unit.partition("/")
        if stage == "train" and settings.train[name].start in settings.train:
            wanted.append((f"train.{name}.start", settings.train[name].start))
    for key, run in wanted:
        record, left = begun.get(f"train/{run}"), (workdir / "checkpoints" / run).exists()
        if f"train/{run}" not in todo and not (record["finished"] if record else left):
            raise ConfigError(
                f"config.{key}: the run {run!r} is neither finished in {workdir} nor among those to train; "
                "name it in config.runs too"
            )


def _run(made: Experiment, unit: str) -> None:
    stage, _, name = unit.partition("/")
    if name:
        _STAGES[stage].run(made, name)
    else:
        _STAGES[stage].run(made)


def _stage(unit: str) -> str:
    return unit.partition("/")[0]


def _keep_programs(workdir: pathlib.Path) -> None:
    """A run that goes on finds its compiled programs in the workdir, unless JAX was given another place.

    On accelerators alone, where a large target's steps take minutes each to compile; a CPU's program may end
    the process on another kind of CPU.
    """
    if partition.platform() != "cpu" and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))


def units(settings: Settings) -> list[str]:
    """What the settings ask for, in order."""
    found = []
    for stage in settings.stages:
        found += [f"train/{name}" for name in settings.chosen()] if stage == "train" else [stage]
    return found


def plan(settings: Settings, workdir: pathlib.Path) -> list[str]:
    """Units still to do.

    Raises:
      ConfigError: one was begun in this workdir with other settings.
    """
    begun, todo = _standing(_begun(workdir), workdir), []
    for unit in units(settings):
        record, changed = begun.get(unit), _changed(settings, workdir, unit, begun)
        fatal = [] if unit in _REPEATABLE else changed
        if record and not record["finished"]:
            own = tuple(f"train.{unit.partition('/')[2]}.{key}" for key in _MAY_CHANGE)
            fatal = [c for c in fatal if not c[0].startswith(own)]
        if fatal:
            key, why = fatal[0]
            raise ConfigError(f"config.{key}: {why}, or use a new workdir")
        gone = not all((workdir / name).exists() for name in _LEAVES.get(unit, ()))
        if record is None or changed or not record["finished"] or gone:
            todo.append(unit)
    if any(_stage(unit) == "train" for unit in todo):
        todo += [s for s in settings.stages if s in _REPEATABLE and s not in todo]
    return todo


def _standing(begun: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """The records without those of units that were stopped before they had left anything."""

    def left(unit: str) -> bool:
        stage, _, run = unit.partition("/")
        place = workdir / {"respond": "responses", "train": f"checkpoints/{run}"}.get(stage, "")
        settled = (workdir / "train" / f"{run}.json").exists()  # the steps of a run of so many minutes
        return settled or (place.is_dir() and any(place.iterdir()))

    return {unit: record for unit, record in begun.items() if record["finished"] or left(unit)}


def _begun(workdir: pathlib.Path) -> dict[str, Any]:
    """The records of stages.json by unit.

    Raises:
      UserError: the file is damaged.
    """
    path = workdir / "stages.json"
    found = files.read_json(path) if path.exists() else {}
    if not isinstance(found, dict) or not all(
        isinstance(record, dict) and {"finished", "settings"} <= record.keys() for record in found.values()
    ):
        raise UserError(f"{path}: damaged; restore it, or delete it: what is missing is then done again")
    return found


def _changed(
    settings: Settings, workdir: pathlib.Path, unit: str, begun: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """(key, what is wrong) of all that is not as when a unit was begun. Files are compared by their content,
    and so is the target, by `experiment.build`."""
    record, read = begun.get(unit), inputs.read(settings, unit, workdir)
    # what a new training run would read on is what `respond` has read
    before = begun.get("respond", {}).get("read", {}) | (record or {}).get("read", {})
    known = {key: before[key] == now for key, now in read.items() if now and before.get(key)}
    known |= {"target.path": True} if (workdir / "target.json").exists() else {}
    changed = _differences(_completed(record["settings"]), _relevant(settings, unit)) if record else []
    found = {
        key: f"found {new!r}, but stage {unit!r} was begun in {workdir} with {old!r}; use that"
        for key, old, new in changed
        if not known.get(key) and key not in _HOW
    }
    for key in known:
        if not known[key] and key not in found:
            found[key] = f"what it names is not what the stages in {workdir} have read there; put that back"
    return list(found.items())


def _relevant(settings: Settings, unit: str) -> dict[str, Any]:
    """The settings that decide what a unit writes; of a run also those of the runs that it starts from."""
    values = to_dict(settings)
    stage, _, name = unit.partition("/")
    found = {key: values[key] for key in _DEPENDS[stage]}
    if name:
        found["train"] = {run: values["train"][run] for run in settings.lineage(name)}
    elif stage == "evaluate":
        found["drafters"] = list(settings.chosen())
    elif stage == "export":
        found["drafter of"] = settings.exported()
    return json.loads(json.dumps(found))


def _completed(old: dict[str, Any]) -> dict[str, Any]:
    """Settings as they were noted, with the defaults of keys that there were none of at that time."""
    values = to_dict(Settings())
    defaults = {name: values.get(name) for name in old}
    if "train" in old:
        defaults["train"] = {
            name: training_run(run["objective"]).to_dict() for name, run in old["train"].items()
        }
    return _overlaid(json.loads(json.dumps(defaults)), old)


def _overlaid(under: Any, over: Any) -> Any:
    if not (isinstance(under, dict) and isinstance(over, dict)):
        return over
    return under | {key: _overlaid(under.get(key), value) for key, value in over.items()}


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))]
    return [] if old == new else [(path, old, new)]


def _mark(settings: Settings, workdir: pathlib.Path, unit: str, finished: bool, **about: Any) -> None:
    """Notes how far a unit is, the settings that it depends on, and its seconds and peak memory."""
    stages = _begun(workdir)
    kept = {"seconds": _seconds(workdir, unit)} | about
    stages[unit] = {"finished": finished, "settings": _relevant(settings, unit)} | kept
    files.write_json(workdir / "stages.json", stages)


def _seconds(workdir: pathlib.Path, unit: str) -> float:
    """What an unfinished unit has taken so far."""
    record = _begun(workdir).get(unit, {})
    return 0.0 if record.get("finished") else record.get("seconds", 0.0)
