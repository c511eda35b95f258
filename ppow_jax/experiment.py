"""One run: settings, mesh, target, workdir, and the stages in order."""

import dataclasses
import functools
import importlib
import json
import pathlib
import zlib
from typing import Any

import jax
from jax.sharding import Mesh

from ppow_jax import partition, processes
from ppow_jax.console import log
from ppow_jax.data import prompts, records
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.interop import gguf, huggingface, target_checkpoint
from ppow_jax.models import markov, tokenizer
from ppow_jax.models.target import Target, TargetConfig, fingerprint
from ppow_jax.models.tokenizer import Tokenizer
from ppow_jax.settings import Settings, TargetSettings

# The sections of the settings that decide what a stage writes.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "respond": ("seed", "target", "respond"),
    "supervise": ("seed", "target", "respond", "data", "drafter", "supervise"),
    "cst": ("seed", "target", "respond", "data", "drafter", "supervise", "cst", "ppow"),
    "ppow": ("seed", "target", "respond", "data", "drafter", "supervise", "ppow"),
    "evaluate": ("seed", "target", "decode", "evaluate", "ppow"),
    "export": ("target", "export"),
}
_REPEATABLE = ("evaluate", "export")  # cheap and harmless to do again with other settings


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every stage needs; built once by `build`.

    Attributes:
      settings: the validated configuration.
      workdir: where everything is written.
      mesh: the devices, axes data, fsdp and tensor.
      target: the target's module.
      target_params: its parameters, on the mesh.
      tokenizer: its tokenizer and chat template.
      fingerprint: names the target's weights (see `models.target.fingerprint`).
    """

    settings: Settings
    workdir: pathlib.Path
    mesh: Mesh
    target: Target
    target_params: dict
    tokenizer: Tokenizer
    fingerprint: str

    def key(self, name: str) -> jax.Array:
        """The root random key of one purpose."""
        return jax.random.fold_in(jax.random.key(self.settings.seed), zlib.crc32(name.encode()))

    @functools.cached_property
    def responses(self) -> records.Records:
        """What `respond` wrote."""
        return records.Records(self.workdir / "responses")


def run(settings: Settings, workdir: pathlib.Path) -> None:
    """Runs the stages that are not finished, each from where it was stopped.

    Raises:
      UserError: anything that the user can mend.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--workdir: {str(workdir)!r} cannot be made ({e.strerror})") from e
    _keep_programs(workdir)
    todo = processes.agreed(_plan(settings, workdir))
    if not todo:
        log.info("every stage is finished; nothing to do in %s", workdir)
        return
    if "evaluate" in todo:
        prompts.load(settings.evaluate.prompts, "evaluate.prompts")  # a missing file shows before training
    records.write_json(workdir / "config.json", dataclasses.asdict(settings))
    experiment = build(settings, workdir)
    with jax.set_mesh(experiment.mesh):
        for stage in todo:
            log.info("stage %s", stage)
            _mark(settings, workdir, stage, finished=False)
            importlib.import_module(f"ppow_jax.stages.{stage}").run(experiment)
            processes.together(f"{stage} is finished")
            _mark(settings, workdir, stage, finished=True)


def _keep_programs(workdir: pathlib.Path) -> None:
    """A run that goes on finds its compiled programs in the workdir, unless JAX was given another place.

    On accelerators alone, where a large target's steps take minutes each to compile; a CPU's program may end
    the process on another kind of CPU.
    """
    if partition.platform() != "cpu" and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(workdir / "compiled"))


def build(settings: Settings, workdir: pathlib.Path) -> Experiment:
    """Loads the target onto the mesh.

    Raises:
      UserError: a missing or broken file, an impossible mesh, or a workdir of another target.
    """
    mesh = partition.make_mesh(settings.mesh)
    config, params, tokens = load_target(settings.target, mesh)
    config = _with_taps(config, settings.target.taps)
    params = partition.shard(params, mesh)
    name = fingerprint(config, params)
    about = records.read_json(workdir / "target.json")
    if about and about["fingerprint"] != name:
        raise UserError(
            f"{workdir}: made with another target (fingerprint {about['fingerprint'][:12]}, this one "
            f"is {name[:12]}); use a new workdir or the old config.target.path"
        )
    shape = dataclasses.asdict(config)
    records.write_json(
        workdir / "target.json", {"path": settings.target.path, "fingerprint": name, "shape": shape}
    )
    return Experiment(settings, workdir, mesh, Target(config), params, tokens, name)


def exact(experiment: Experiment) -> Experiment:
    """The experiment with a target that computes in float32, whatever its weights are stored in.

    Passes of any number of tokens then differ by float32 rounding only (`decode.exact`).
    """
    config = dataclasses.replace(experiment.target.config, dtype="float32")
    return dataclasses.replace(experiment, target=Target(config))


def load_target(settings: TargetSettings, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, parameters (on the mesh already, or host arrays) and tokenizer of the target that is named."""
    if settings.path.startswith("markov:"):
        seed = settings.path.removeprefix("markov:")
        if not seed.isdigit():
            raise ConfigError(f"config.target.path: found {settings.path!r}, expected 'markov:SEED'")
        return markov.build(int(seed), settings.dtype)
    if directory := target_checkpoint.find(settings.path):
        config, params, tokens = target_checkpoint.load(directory, settings.dtype, mesh)
    elif directory := huggingface.find(settings.path):
        config, params = huggingface.load(directory, settings.dtype, mesh)
        tokens = huggingface.tokenizer(directory)
    else:
        config, params, metadata = gguf.load(settings.path, settings.dtype)
        tokens = tokenizer.from_gguf(metadata)
    if tokens.size > config.vocab_size:
        raise UserError(
            f"{settings.path}: the tokenizer has {tokens.size} ids, expected at most {config.vocab_size}, "
            "the rows of the embedding; the files are of two models"
        )
    return config, params, tokens


def _with_taps(config: TargetConfig, taps: tuple[int, ...]) -> TargetConfig:
    """The target with other taps; none: its own."""
    if not taps:
        return config
    if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] > config.layers:
        raise ConfigError(
            f"config.target.taps: found {taps}, expected ascending layers from 0 to {config.layers}, "
            "the number of the target's"
        )
    return dataclasses.replace(config, taps=taps)


def _plan(settings: Settings, workdir: pathlib.Path) -> list[str]:
    """Stages still to run.

    Raises:
      ConfigError: a stage was begun in this workdir with other settings.
    """
    begun = records.read_json(workdir / "stages.json") or {}
    todo = []
    for stage in settings.stages:
        record = begun.get(stage)
        changed = _differences(record["settings"], _relevant(settings, stage)) if record else []
        fatal = [] if stage in _REPEATABLE else changed
        if record and not record["finished"]:  # a run whose loss was lost may go on more carefully
            fatal = [c for c in fatal if not c[0].startswith(f"{stage}.optimizer.")]
        if fatal:
            key, old, new = fatal[0]
            raise ConfigError(
                f"config.{key}: found {new!r}, but stage {stage!r} was begun in {workdir} with "
                f"{old!r}; use that, or a new workdir"
            )
        if record is None or changed or not record["finished"]:
            todo.append(stage)
    if any(stage in todo for stage in ("supervise", "cst", "ppow")):
        todo += [s for s in settings.stages if s in _REPEATABLE and s not in todo]
    return todo


def _relevant(settings: Settings, stage: str) -> dict[str, Any]:
    values = dataclasses.asdict(settings)
    return json.loads(json.dumps({k: values[k] for k in _DEPENDS[stage]}))


def _differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))]
    return [] if old == new else [(path, old, new)]


def _mark(settings: Settings, workdir: pathlib.Path, stage: str, finished: bool) -> None:
    path = workdir / "stages.json"
    stages = records.read_json(path) or {}
    stages[stage] = {"finished": finished, "settings": _relevant(settings, stage)}
    records.write_json(path, stages)
