"""Whatever takes long says so in the log: what it is, how far, how fast, and how long it will still take.

A loop counts with `Loop`; anything else is named with `during`. While `followed`, JAX's compilations are
named by themselves, and a log that has been silent for five seconds gets a line about what is being done;
for thirty, if its last line told the time left.
"""

import contextlib
import dataclasses
import logging
import shutil
import sys
import threading
import time
from collections.abc import Iterator

import jax.monitoring

from ppow_jax.parallel.console import log

_QUIET, _QUIET_AT_MOST = 5.0, 60.0  # seconds without a line; the silence doubles while one thing goes on
_QUIET_AFTER_TIME_LEFT = 30.0  # who has read that is in no hurry for another line
_LOOK = 0.5  # seconds between looks at it
_PLAIN_WIDTH = 120  # of a line of training where the log is no terminal
_CLOCK = len("00:00:00 ")  # what stands before each line
# What JAX tells when it begins and when it has ended.
_COMPILATION = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


@dataclasses.dataclass(eq=False)
class _Task:
    """Something that is being done, and whether the log has had a line about it."""

    what: str
    began: float
    told: bool = False


_tasks: list[_Task] = []  # the innermost is the last
_line, _wait = 0.0, _QUIET  # when the log had its last line, and how long it may be silent now


@contextlib.contextmanager
def during(what: str) -> Iterator[None]:
    """Names what is done within, for the log to tell if it takes long."""
    task = _Task(what, time.monotonic())
    _tasks.append(task)
    try:
        yield
    finally:
        _tasks.remove(task)


def _compilation_begins(event: str, value: float, **about: str | int) -> None:
    if event in _COMPILATION:
        _tasks.append(_Task(_compilation(event, **about), time.monotonic()))


def _compilation_ends(event: str, duration_secs: float, **about: str | int) -> None:
    what = _compilation(event, **about) if event in _COMPILATION else None
    for task in [task for task in _tasks if task.what == what][-1:]:
        _tasks.remove(task)
        if task.told:
            log.info("%s: done in %s", what, duration(duration_secs))


def _compilation(event: str, fun_name: str | int = "a program", **_: str | int) -> str:
    return f"{_COMPILATION[event]} {fun_name}"


def _hears(record: logging.LogRecord) -> bool:
    """A filter of the log that lets all through, and knows when it was."""
    global _line, _wait
    said = record.getMessage()
    told = said.endswith(" left") and not said.endswith(" 0s left")
    _line, _wait = time.monotonic(), _QUIET_AFTER_TIME_LEFT if told else _QUIET
    return True


def _tell() -> None:
    """Writes a line about what is being done, if the log has had none for long."""
    global _wait
    now = time.monotonic()
    long = [task for task in list(_tasks) if now - task.began >= _QUIET]
    if not long or now - _line < _wait:
        return
    longer = min(2 * _wait, _QUIET_AT_MOST)
    long[-1].told = True
    log.info("%s: %s so far", long[-1].what, duration(now - long[-1].began))
    _wait = longer


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Within it the log is never silent for long while something is being done."""
    global _line
    ended, _line = threading.Event(), time.monotonic()

    def watch() -> None:
        while not ended.wait(_LOOK):
            _tell()

    watching = threading.Thread(target=watch, daemon=True)
    log.addFilter(_hears)
    jax.monitoring.register_scalar_listener(_compilation_begins)
    jax.monitoring.register_event_duration_secs_listener(_compilation_ends)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()
        jax.monitoring.unregister_event_duration_listener(_compilation_ends)
        jax.monitoring.unregister_scalar_listener(_compilation_begins)
        log.removeFilter(_hears)


class Loop:
    """How far a loop is: a line every five seconds at most, and none at all if it ends before that."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        """Begins to count: `what` has `total` of `unit` (a plural) to do."""
        self._what, self._total, self._unit = what, total, unit
        self._count, self._began = 0, time.monotonic()
        self._told = self._began

    def add(self, count: int) -> None:
        """So many more are done."""
        self._count += count
        now, ends = time.monotonic(), self._count == self._total and self._told > self._began
        if now - self._told < _QUIET and not ends:
            return
        self._told, seconds = now, now - self._began
        left = duration(seconds / self._count * (self._total - self._count))
        fast = rate(self._count, seconds, self._unit)
        log.info("%s: %d/%d %s, %s | %s left", self._what, self._count, self._total, self._unit, fast, left)


def rate(count: float, seconds: float, unit: str) -> str:
    """How fast: `12 texts/s`, or `3.1 s each` of what takes longer than a second."""
    each = max(seconds, 1e-3) / max(count, 1)
    return f"{each:.3g} s each" if each > 1 else f"{1 / each:.3g} {unit}/s"


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m05s` or `7s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


def width() -> int:
    """Characters that a line of the log may have: what a terminal shows, less the time of day."""
    return shutil.get_terminal_size().columns - _CLOCK if sys.stderr.isatty() else _PLAIN_WIDTH
