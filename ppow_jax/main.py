"""ppow_jax: train a drafter for speculative decoding, from prompts to a measured speedup.

  python -m ppow_jax.main --config=configs/quickstart.py --workdir=DIR [--config.KEY=VALUE ...]

The stages that the config names run in order; a finished stage is not run again on the same workdir and
an interrupted one resumes. Keys and their meaning: configs/base.py.
"""

import itertools
import os
import pathlib
import re
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from ppow_jax import console, experiment, memory, settings
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
    path = _config_path(argv)
    if path is not None and not os.path.isfile(path):
        raise ConfigError(f"--config: no file {path!r}; configs/ holds the ready-made ones")
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        # The library puts a whole traceback into the message where the file itself fails.
        lines = str(e).strip().splitlines()
        raise ConfigError(lines[0] if len(lines) == 1 else f"--config={path}: {lines[-1]}") from e
    except (AttributeError, KeyError) as e:
        # e.g. '\'stepz\'\nDid you mean "steps" instead of "stepz"?'
        key, close = (re.search(pattern, str(e)) for pattern in (r"'(\w+)\\?'", r'Did you mean "(\w+)"'))
        if key is None or "get_config" in str(e):
            raise ConfigError(f"--config={path}: {e}; expected a file with get_config()") from e
        names = (a.split("=")[0].lstrip("-") for a in argv)
        where = next((n for n in names if key[1] in n.split(".")), f"--config={path}")
        hint = f" (did you mean {close[1]!r}?)" if close else ""
        raise ConfigError(f"{where}: unknown key {key[1]!r}{hint}; configs/base.py lists the keys") from e
    except (TypeError, ValueError) as e:
        raise ConfigError(f"a --config.KEY=VALUE flag has a wrong type: {e}") from e
    except Exception as e:  # a config file is code: it can fail in any way
        raise ConfigError(f"--config={path}: cannot be loaded ({type(e).__name__}: {e})") from e


def _config_path(argv: list[str]) -> str | None:
    """The value of --config=PATH or --config PATH."""
    for flag, following in itertools.zip_longest(argv, argv[1:]):
        name, _, value = flag.partition("=")
        if name in ("--config", "-config"):
            return value or following
    return None


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
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        print(
            f"ppow_jax: {str(e).splitlines()[0]}; lower the stage's batch_size or data.length, or leave out "
            "very long prompts; what is finished is kept",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    memory.restart_with_tunables()
    cli()
