"""Stage `export`: a drafter as a parameters-only checkpoint with a manifest, and as files for a server.

`export/drafter/` is an orbax checkpoint of the parameters; `export/manifest.json` names the target, the
draft vocabulary, the drafter's shape and the run's configuration; `export/<server>/` is what
`drafters.files.writing` writes.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from ppow_jax.config import to_dict
from ppow_jax.drafters.eagle3 import EAGLE3, DrafterConfig, abstract_params, config_from
from ppow_jax.drafters.files import dialects, llamacpp, writing
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.models.fields import Fields
from ppow_jax.parallel import checkpoint, files, processes
from ppow_jax.parallel.console import log
from ppow_jax.report.measure import params_sha256
from ppow_jax.settings import STORED_DTYPES, Settings
from ppow_jax.targets import tokenizer_gguf
from ppow_jax.training import drafters


def check(settings: Settings) -> None:
    """A drafter, and a server that there is.

    Raises:
      ConfigError: naming the key.
    """
    if not settings.exported():
        raise ConfigError("config.train: found no run, expected one whose drafter is exported")
    server, dtype = settings.export.server, settings.export.dtype
    known = {name: STORED_DTYPES for name in dialects.SERVERS} | {llamacpp.NAME: llamacpp.DTYPES}
    if server and server not in known:
        raise ConfigError(f"config.export.server: found {server!r}, expected {', '.join(known)}, or empty")
    if server and dtype not in known[server]:
        expected = " or ".join(known[server])
        raise ConfigError(f"config.export.dtype: found {dtype!r}, expected {expected} for {server}")


def check_target(experiment: Experiment) -> None:
    """A server that reads drafters of this shape.

    Raises:
      UserError: what the server would silently ignore.
    """
    settings = experiment.settings
    if not settings.export.server:
        return
    shape = drafters.shape_of(experiment, settings.exported())
    if settings.export.server == llamacpp.NAME:
        llamacpp.check(shape, experiment.target.config)
        target = experiment.target.config
        tokenizer_gguf.of_target(settings.target.path, experiment.tokenizer, target.vocab_size)
    else:
        dialects.check(shape, experiment.target.config, settings.export.server)


def run(experiment: Experiment) -> None:
    """Writes `export/` from the run that `export.drafter` names."""
    name = experiment.settings.exported()
    trained = drafters.load(experiment, name)
    config = trained.drafter.config
    directory = experiment.workdir / "export"
    checkpoint.save_params(directory / "drafter", trained.params)
    vocab = processes.host(trained.vocab).astype(np.int64)
    manifest = {
        "format": 1,
        "run": name,
        "target": {
            "fingerprint": experiment.fingerprint,
            "path": experiment.settings.target.path,
            "shape": dataclasses.asdict(experiment.target.config),
        },
        "drafter": dataclasses.asdict(config),
        # offsets as EAGLE-3 stores them: target id = draft id + d2t[draft id]
        "d2t": (vocab - np.arange(len(vocab))).tolist(),
        "params_sha256": params_sha256(trained.params),
        "config": to_dict(experiment.settings),
    }
    files.write_json(directory / "manifest.json", manifest)
    log.info("export: the drafter of %s is in %s", name, directory)
    chosen = experiment.settings.export
    if chosen.server:
        where = directory / chosen.server
        params = processes.host(trained.params)
        if processes.first():
            scratch = where.with_name(f"{where.name}.new")
            try:
                _write_for(experiment, scratch, config, params, vocab)
            except (safetensors.SafetensorError, OSError) as e:  # as on a full disk
                raise UserError(f"{where}: cannot be written ({e}); make room and run again") from e
            where.mkdir(exist_ok=True)
            for file in scratch.iterdir():
                file.replace(where / file.name)
            scratch.rmdir()
        log.info("export: files for %s are in %s", chosen.server, where)


def _write_for(
    experiment: Experiment, directory: pathlib.Path, config: DrafterConfig, params: dict, vocab: np.ndarray
) -> None:
    """Writes the files of the server that the settings name."""
    server, dtype = experiment.settings.export.server, experiment.settings.export.dtype
    target, about = experiment.target.config, (config, params, vocab)
    if server != llamacpp.NAME:
        writing.write(directory, *about, target, server, dtype, experiment.fingerprint)
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = experiment.settings.target.path
    tokenizer = tokenizer_gguf.of_target(path, experiment.tokenizer, target.vocab_size)
    file = directory / llamacpp.FILE
    llamacpp.write(file, *about, target, tokenizer, dtype, experiment.fingerprint)


def load(
    directory: pathlib.Path, fingerprint: str, module: str = EAGLE3
) -> tuple[DrafterConfig, dict, jax.Array]:
    """Reads what `run` wrote: shape, parameters, draft vocabulary (int32 `[N]` target ids).

    Args:
      directory: of the export.
      fingerprint: of the target that will verify (`Experiment.fingerprint`).
      module: the class that it may name, see `config_from`.

    Raises:
      UserError: no export there, another target or class, or damaged parameters.
    """
    manifest = files.read_json(directory / "manifest.json")
    if manifest is None:
        raise UserError(f"{directory}: no manifest.json; expected what the export stage wrote")
    about = Fields(manifest, str(directory / "manifest.json"), of="an export")
    target = about.part("target")
    trained_for = target.text("fingerprint")
    if trained_for != fingerprint:
        raise UserError(
            f"{directory}: this drafter belongs to target {trained_for[:12]} "
            f"({target.text('path', '')}), not to {fingerprint[:12]}; its drafts would be refused"
        )
    config = config_from(about.part("drafter").values, about.where, module)
    params = checkpoint.load_params(directory / "drafter", abstract_params(config))
    if params_sha256(params) != about.text("params_sha256"):
        raise UserError(f"{directory}: the parameters are not those of the manifest; export again")
    offsets = np.asarray(about.listed("d2t", int, config.vocab_size), np.int64)
    return config, params, jnp.asarray(np.arange(len(offsets)) + offsets, jnp.int32)
