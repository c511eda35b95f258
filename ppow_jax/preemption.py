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
from jax.experimental import multihost_utils

STATUS = 75  # of the process: "try again later" in sysexits.h
_steps = False  # within `at_steps`
_asked = False
_questions = 0  # that this process has asked JAX's service


class Stopped(Exception):
    """The run ends here, saved, to be started again."""


def install() -> None:
    """Takes SIGTERM. Of several processes JAX's own service takes it, and tells the others."""
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, _on_signal)


def _on_signal(number: int, frame: types.FrameType | None) -> None:
    global _asked
    _asked = True
    if not _steps:
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
    if _asked:
        raise Stopped("a stage is saved after its last step")


def asked() -> bool:
    """Whether the run is to end here; of several processes, which ask equally often, all get the same answer.

    JAX's service lets them end together at the number of a question that none of them has come to yet.
    """
    global _questions
    if jax.process_count() == 1:
        return _asked
    _questions += 1
    return multihost_utils.reached_preemption_sync_point(_questions)


def leave(done: str) -> None:
    """Between two pieces of work, outside of steps, that are on disk each: ends here if asked to.

    Raises:
      Stopped: it was; with what is done.
    """
    if asked():
        raise Stopped(done)
