"""Looks for what lowers a drafter's acceptance, cause by cause, and says what to do.

  python -m ppow_jax.doctor --workdir=DIR [--run=NAME] [--target=PATH] [--drafter=PATH]

The drafter is that of a training run (--run; else the one that is exported) with the files that the workdir
has exported of it, or what --drafter names: a directory of EAGLE-3 files or a GGUF file of llama.cpp. The
target is the config's, or --target. Nothing is written into the workdir. What each check means:
docs/troubleshooting.md.

Exit status: 0, nothing is wrong; 1, something is; 2, the command is wrong.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # before the imports below, which take a second or two

import jax
from absl import flags

from ppow_jax import experiment
from ppow_jax.doctor import acceptance, case, data, findings
from ppow_jax.doctor import files as drafter_files
from ppow_jax.doctor.case import Case
from ppow_jax.doctor.findings import Finding
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import console, files, progress
from ppow_jax.parallel.console import log

_WORKDIR = flags.DEFINE_string("workdir", "", "Of a run, finished or not.")
_RUN = flags.DEFINE_string("run", "", "The training run whose drafter it is; empty: the one to be exported.")
_TARGET = flags.DEFINE_string("target", "", "In place of the config's target.path.")
_DRAFTER = flags.DEFINE_string("drafter", "", "Files of a drafter; empty: what the workdir has exported.")

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


def main(argv: list[str]) -> int:
    """Makes the checks and prints what they find; returns the exit status."""
    console.setup()
    if len(argv) > 1 or not _WORKDIR.value:
        raise ConfigError("expected --workdir=DIR of a run, and flags only; see --help")
    workdir = files.path_of(_WORKDIR.value)
    settings = experiment.read_settings(workdir)
    path = _TARGET.value or settings.target.path
    settings = dataclasses.replace(settings, target=dataclasses.replace(settings.target, path=path))
    with files.held(workdir, "--workdir"), progress.followed():
        with progress.during(f"loading the target {path}"):
            made = experiment.load_target(settings, workdir)
        with jax.set_mesh(made.mesh):
            found = examine(case.find(made, _RUN.value, _DRAFTER.value))
    print(findings.shown(found))
    return int(any(finding.verdict == findings.WRONG for finding in found.values()))


if __name__ == "__main__":
    console.command(main, sys.modules[__name__])
