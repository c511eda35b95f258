"""Looks for what lowers a drafter's acceptance, cause by cause, and says what to do.

  python -m ppow_jax.doctor --workdir=DIR [--run=NAME] [--target=PATH] [--drafter=PATH]

The drafter is that of a training run (--run; else the one that is exported) with the files that the workdir
has exported of it, or what --drafter names: a directory of EAGLE-3 files or a GGUF file of llama.cpp. The
target is the config's, or --target. Nothing is written into the workdir. What each check means:
docs/troubleshooting.md.

Exit status: 0, nothing is wrong; 1, something is; 2, the command is wrong.
"""

import sys

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # before the imports below, which take a second or two

from absl import flags

from ppow_jax.doctor import checks, findings
from ppow_jax.errors import ConfigError
from ppow_jax.parallel import console, files

_WORKDIR = flags.DEFINE_string("workdir", "", "Of a run, finished or not.")
_RUN = flags.DEFINE_string("run", "", "The training run whose drafter it is; empty: the one to be exported.")
_TARGET = flags.DEFINE_string("target", "", "In place of the config's target.path.")
_DRAFTER = flags.DEFINE_string("drafter", "", "Files of a drafter; empty: what the workdir has exported.")


def main(argv: list[str]) -> int:
    """Makes the checks and prints what they find; returns the exit status."""
    console.setup()
    if len(argv) > 1 or not _WORKDIR.value:
        raise ConfigError("expected --workdir=DIR of a run, and flags only; see --help")
    found = checks.doctor(files.path_of(_WORKDIR.value), _RUN.value, _TARGET.value, _DRAFTER.value)
    print(findings.shown(found))
    return findings.status(found)


if __name__ == "__main__":
    console.command(main, sys.modules[__name__])
