"""Stage `export`: a drafter as a parameters-only checkpoint with a manifest, and as files for a server.

`export/drafter/` is an orbax checkpoint of the parameters; `export/manifest.json` names the target, the
draft vocabulary, the drafter's shape and the run's configuration; `export/<server>/` is what
`interop.eagle3` writes.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import processes
from ppow_jax.console import log
from ppow_jax.data import records
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.interop import checkpoint, eagle3
from ppow_jax.models.drafter import DrafterConfig, abstract_params, config_from
from ppow_jax.stages import training
from ppow_jax.stages.evaluate import params_sha256


def run(experiment: Experiment) -> None:
    """Writes `export/` from the stage that `export.drafter` names."""
    stage = experiment.settings.export.drafter
    state, about = training.load_drafter(experiment, stage)
    directory = experiment.workdir / "export"
    checkpoint.save_params(directory / "drafter", state["params"])
    vocab = processes.host(state["vocab"]).astype(np.int64)
    manifest = {
        "format": 1,
        "stage": stage,
        "target": {
            "fingerprint": experiment.fingerprint,
            "path": experiment.settings.target.path,
            "shape": dataclasses.asdict(experiment.target.config),
        },
        "drafter": about["drafter"],
        # offsets as EAGLE-3 stores them: target id = draft id + d2t[draft id]
        "d2t": (vocab - np.arange(len(vocab))).tolist(),
        "params_sha256": params_sha256(state["params"]),
        "config": dataclasses.asdict(experiment.settings),
    }
    records.write_json(directory / "manifest.json", manifest)
    log.info("export: the %s drafter is in %s", stage, directory)
    chosen = experiment.settings.export
    if chosen.server:
        config, where = config_from(about["drafter"]), directory / chosen.server
        about_target = (experiment.target.config, chosen.server, chosen.dtype, experiment.fingerprint)
        params = processes.host(state["params"])
        if processes.first():
            eagle3.write(where, config, params, vocab, *about_target)
        log.info("export: files for %s are in %s", chosen.server, where)


def load(directory: pathlib.Path, fingerprint: str) -> tuple[DrafterConfig, dict, jax.Array]:
    """Reads what `run` wrote: shape, parameters, draft vocabulary (int32 `[N]` target ids).

    Args:
      directory: of the export.
      fingerprint: of the target that will verify (`Experiment.fingerprint`).

    Raises:
      UserError: no export there, another target, or damaged parameters.
    """
    manifest: dict[str, Any] | None = records.read_json(directory / "manifest.json")
    if manifest is None:
        raise UserError(f"{directory}: no manifest.json; expected what the export stage wrote")
    trained_for = manifest["target"]["fingerprint"]
    if trained_for != fingerprint:
        raise UserError(
            f"{directory}: this drafter belongs to target {trained_for[:12]} "
            f"({manifest['target']['path']}), not to {fingerprint[:12]}; its drafts would be refused"
        )
    config = config_from(manifest["drafter"])
    params = checkpoint.load_params(directory / "drafter", abstract_params(config))
    if params_sha256(params) != manifest["params_sha256"]:
        raise UserError(f"{directory}: the parameters are not those of the manifest; export again")
    offsets = np.asarray(manifest["d2t"], np.int64)
    return config, params, jnp.asarray(np.arange(len(offsets)) + offsets, jnp.int32)
