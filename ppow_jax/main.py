"""ppow_jax: train a drafter for speculative decoding, from prompts to a measured speedup.

  python -m ppow_jax.main --config=configs/quickstart.py --workdir=DIR [--config.KEY=VALUE ...]

The stages that the config names run in order; a finished stage is not run again on the same workdir and
an interrupted one resumes. Keys and their meaning: configs/base.py.
"""

import errno
import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from ppow_jax import console, experiment, memory, preemption, settings
from ppow_jax.errors import ConfigError, UserError, out_of_memory

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
        console.only_the_first_speaks()
    preemption.install()
    experiment.run(chosen, pathlib.Path(_WORKDIR.value))


def cli() -> None:
    """Runs `main`; a user's mistake ends as one line on stderr."""
    console.setup()
    try:
        argv = sys.argv
        if any(a in ("--help", "-h", "--helpfull", "--helpshort") for a in argv):
            print(__doc__.strip() + "\n\n" + flags.FLAGS.module_help(sys.modules[__name__]))
            return
        app.run(main, argv=argv, flags_parser=console.parse_with_config)
    except UserError as e:
        print(f"ppow_jax: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(_USAGE if isinstance(e, ConfigError) else 1)
    except preemption.Stopped as e:
        print(f"ppow_jax: asked to end: {e}; the same command goes on from there", file=sys.stderr)
        sys.exit(preemption.STATUS)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"ppow_jax: no room on the disk ({e}); what is finished is kept: make room and run the same "
            "command again",
            file=sys.stderr,
        )
        sys.exit(1)
    except jax.errors.JaxRuntimeError as e:
        if not out_of_memory(e):
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
