"""ppow_jax: train a drafter for speculative decoding, from prompts to a measured speedup.

  python -m ppow_jax.main --config=configs/quickstart.py --workdir=DIR [--config.KEY=VALUE ...]

The stages that the config names run in order; a finished stage is not run again on the same workdir and
an interrupted one resumes. Keys and their meaning: configs/base.py.
"""

import os
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from ppow_jax import console, experiment, settings
from ppow_jax.errors import ConfigError, UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment: a file in configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where everything is written; resumed if it exists.")
_USAGE = 2


def main(argv: list[str]) -> None:
    """Builds the settings, starts JAX's distributed runtime if asked, runs the stages."""
    console.setup()
    if len(argv) > 1:
        raise ConfigError(f"found the argument {argv[1]!r}, expected flags only; see --help")
    if _CONFIG.value is None or not _WORKDIR.value:
        raise ConfigError("expected --config=configs/NAME.py and --workdir=DIR; see --help")
    chosen = settings.from_config(_CONFIG.value)
    if chosen.distributed:
        jax.distributed.initialize()
    experiment.run(chosen, pathlib.Path(_WORKDIR.value))


def _parse(argv: list[str]) -> list[str]:
    """absl's flag parsing, with the many ways in which a config can be wrong as one line."""
    path = next((a.split("=", 1)[1] for a in argv if a.startswith("--config=")), None)
    if path and not os.path.exists(path):
        raise ConfigError(f"--config: no file {path!r}; configs/ holds the ready-made ones")
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        raise ConfigError(str(e)) from e
    except (AttributeError, KeyError) as e:
        key = str(e).strip("\"'")
        flag = next((a for a in argv if a.split("=")[0].endswith(f".{key}")), key)
        raise ConfigError(f"{flag}: unknown key {key!r}; configs/base.py lists the keys") from e
    except (TypeError, ValueError) as e:
        raise ConfigError(f"a --config.KEY=VALUE flag has a wrong type: {e}") from e


def cli() -> None:
    """Runs `main`; a user's mistake ends as one line on stderr."""
    console.setup()
    try:
        argv = sys.argv
        if any(a in ("--help", "-h", "--helpfull", "--helpshort") for a in argv):
            print(__doc__.strip() + "\n\n" + flags.FLAGS.module_help(sys.modules[__name__]))
            return
        app.run(main, argv=argv, flags_parser=_parse)
    except UserError as e:
        print(f"ppow_jax: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(_USAGE if isinstance(e, ConfigError) else 1)


if __name__ == "__main__":
    cli()
