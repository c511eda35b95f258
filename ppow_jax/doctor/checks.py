"""All checks, in turn."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import jax

from ppow_jax import experiment
from ppow_jax.doctor import acceptance, case, data, findings
from ppow_jax.doctor import files as drafter_files
from ppow_jax.doctor.case import Case
from ppow_jax.doctor.findings import Finding
from ppow_jax.errors import UserError
from ppow_jax.parallel import files, progress
from ppow_jax.parallel.console import log

CHECKS: Mapping[str, Callable[[Case], Finding]] = {
    "target": drafter_files.target,
    "template": data.template,
    "masks": data.masks,
    "vocabulary": data.coverage,
    "lengths": data.lengths,
    "inputs": data.stale,
    "features": data.features,
    "d2t": drafter_files.vocabulary_map,
    "taps": drafter_files.taps,
    "rotary": drafter_files.rotary_base,
    "parameters": drafter_files.parameters,
    "export": acceptance.exported,
    "conventions": acceptance.conventions,
    "decoding": acceptance.decoding,
    "positions": acceptance.positions,
    "overfitting": acceptance.overfitting,
}


def examine(examined: Case) -> dict[str, Finding]:
    """Makes all checks, in turn; one that cannot be made says why."""
    found = {}
    for number, (name, check) in enumerate(CHECKS.items(), 1):
        with progress.during(f"doctor: {name}"):
            try:
                found[name] = check(examined)
            except UserError as e:
                found[name] = Finding(findings.NOT_CHECKED, str(e))
        log.info("doctor: %d/%d %s: %s", number, len(CHECKS), name, found[name].verdict)
    return found


def doctor(workdir: pathlib.Path, run: str = "", target: str = "", drafter: str = "") -> dict[str, Finding]:
    """Makes all checks of a drafter of a workdir.

    Args:
      workdir: of a run, finished or not.
      run: the training run whose drafter it is; empty: the one to be exported.
      target: in place of the config's `target.path`, if not empty.
      drafter: files of a drafter; empty: what the workdir has exported.

    Returns:
      What was found, by the check's name.

    Raises:
      UserError: it is no workdir, the target cannot be loaded, or there is no such run or file.
    """
    settings = experiment.read_settings(workdir)
    path = target or settings.target.path
    settings = dataclasses.replace(settings, target=dataclasses.replace(settings.target, path=path))
    with files.held(workdir, "--workdir"), progress.followed():
        with progress.during(f"loading the target {path}"):
            made = experiment.load_target(settings, workdir)
        with jax.set_mesh(made.mesh):
            return examine(case.find(made, run, drafter))
