"""The command line: progress as plain lines on stderr, help, and a user's mistakes as one line."""

import logging
import sys
import types
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from ppow_jax.errors import UserError

log = logging.getLogger("ppow_jax")


def setup() -> None:
    """Shows the package's own messages, and only warnings of the libraries below it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    absl_logging.set_verbosity(absl_logging.WARNING)


def command(main: Callable[[list[str]], None], module: types.ModuleType) -> None:
    """Runs a command of flags; `--help` shows its module's text, a user's mistake is one line on stderr."""
    if any(a in ("--help", "-h") for a in sys.argv):
        print(module.__doc__.strip() + "\n\n" + flags.FLAGS.module_help(module))
        return
    try:
        app.run(main)
    except UserError as e:
        print(f"ppow_jax: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
