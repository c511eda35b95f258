"""Where progress goes: one logger, plain lines on stderr."""

import logging

from absl import logging as absl_logging

log = logging.getLogger("ppow_jax")


def setup() -> None:
    """Shows the package's own messages, and only warnings of the libraries below it."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    absl_logging.set_verbosity(absl_logging.WARNING)
