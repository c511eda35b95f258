"""SIGTERM, with which schedulers take machines back: save what there is and end, soon.

Work that saves itself step by step runs within `at_steps` and asks `asked` after each. Anywhere else what is
finished is on disk: a process that is alone ends at once, and several, which must end together, wherever they
ask `leave`.
"""

import contextlib
import signal
import sys
import types
from collections.abc import Iterator

import jax

from ppow_jax.parallel import processes

STATUS = 75  # of the process: "try again later" in sysexits.h
_steps = False  # within `at_steps`
_asked = False


class Stopped(Exception):
    """The run ends here, saved, to be started again."""


def install() -> None:
    """Takes SIGTERM, from JAX's own service too, which of several processes sometimes tells none."""
    signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(number: int, frame: types.FrameType | None) -> None:
    global _asked
    again, _asked = _asked, True
    if again and not _steps:  # it is ending already
        return
    if not _steps and jax.process_count() == 1:
        sys.exit(STATUS)


@contextlib.contextmanager
def at_steps() -> Iterator[None]:
    """Within it SIGTERM waits until `asked` is called, or for the end.

    Raises:
      Stopped: it came after the last step had asked.
    """
    global _steps
    _steps = True
    try:
        yield
    finally:
        _steps = False
    if _asked and jax.process_count() == 1:
        raise Stopped("a stage is saved after its last step")


def asked() -> bool:
    """Whether the run is to end here. Of several processes, which ask equally often, one that was asked is
    enough, and all get the same answer."""
    return processes.anywhere(_asked)


def leave(done: str) -> None:
    """Between two pieces of work, outside of steps, that are on disk each: ends here if asked to.

    Raises:
      Stopped: it was; with what is done.
    """
    if asked():
        raise Stopped(done)
