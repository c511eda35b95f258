"""ppow_jax: train a drafter for speculative decoding, from prompts to a measured speedup.

  python -m ppow_jax.main --config=quickstart --workdir=DIR [--config.KEY=VALUE ...]

The stages that the config names run in order; a finished stage is not run again on the same workdir and
an interrupted one resumes. `python -m ppow_jax.config_help` lists all keys, with defaults and meaning.

Exit status: 0, done; 2, the command or the config is wrong; 1, another mistake that can be mended; 75, asked
to end (SIGTERM), to be started again; 130, interrupted.
"""

import pathlib
import sys

from ppow_jax.parallel import memory

if __name__ == "__main__":
    memory.restart_with_tunables()  # before the imports below, which take a second or two

import jax
from absl import flags
from ml_collections import config_flags

from ppow_jax import config, run
from ppow_jax.errors import ConfigError
from ppow_jax.parallel import console, preemption

_CONFIG = config_flags.DEFINE_config_file("config", None, "A ready-made config by its name, or a file.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; resumed if it exists.")


def main(argv: list[str]) -> None:
    """Builds the settings, starts JAX's distributed runtime if asked, runs the stages."""
    console.setup()
    if len(argv) > 1:
        raise ConfigError(f"found the argument {argv[1]!r}, expected flags only; see --help")
    if _CONFIG.value is None or not _WORKDIR.value:
        raise ConfigError("expected --config=NAME or a file, and --workdir=DIR; see --help")
    settings = config.from_config(_CONFIG.value)
    if settings.distributed:
        jax.distributed.initialize()
        console.only_the_first_speaks()
    preemption.install()
    run.run(settings, pathlib.Path(_WORKDIR.value))


def cli() -> None:
    """Runs `main`; a user's mistake ends as one line on stderr."""
    console.setup()
    console.command(main, sys.modules[__name__], console.parse_with_config)


if __name__ == "__main__":
    cli()
