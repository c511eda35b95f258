"""Metrics: one step late, so that reading them never stalls the devices.

`metrics.jsonl` has one object a line: `stage` (the name of a training run), `step`, `seconds` (of the run,
across restarts) and the metrics. The log gets a line now and then, with what matters most, speed and time
left; boards (`training.boards`) get all numbers.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.parallel import files, processes
from ppow_jax.parallel.console import log
from ppow_jax.parallel.progress import duration, rate, width
from ppow_jax.settings import LogSettings
from ppow_jax.training import boards

_SECONDS = 10.0  # between lines of the log, at most
# What a line of the log shows beside the loss, if it is there; of "/" the first.
_SHOWN = ("accepted/accuracy_0/reward", "holdout_tau")


class Writer:
    """Writes the metrics of one training run; use as a context manager."""

    def __init__(
        self,
        workdir: pathlib.Path,
        run: str,
        steps: int,
        first_step: int = 0,
        seconds: float = 0.0,
        settings: LogSettings | None = None,
    ) -> None:
        """Continues a run after `first_step`, dropping lines that were written beyond and never saved."""
        self._path = workdir / "metrics.jsonl"
        settings = settings or LogSettings()
        self._run, self._steps, self._every = run, steps, settings.every_steps
        self._began, self._before = time.monotonic(), seconds
        self._pending: tuple[int, float, Any] | None = None
        _drop_after(self._path, run, first_step)
        self._file = self._path.open("a") if processes.first() else None
        self._boards = boards.opened(settings, workdir, run) if self._file else []
        self._shown = self._began  # when the log had its last line
        self._compiled: tuple[int, float] | None = None  # the step that compiled, and when it ended

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file:
            self._file.close()
        for board in self._boards:
            board.close()

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of this run, across restarts."""
        return self._before + time.monotonic() - self._began

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a step (device arrays welcome) and writes those of the one before.

        Raises:
          UserError: the loss of the earlier step was not finite.
        """
        self.flush()
        self._pending = (step, self.seconds, dict(metrics))

    def flush(self) -> None:
        """Writes what is pending."""
        if self._pending is None:
            return
        (step, seconds, metrics), self._pending = self._pending, None
        values = {k: np.asarray(v).tolist() for k, v in metrics.items()}
        if self._file:
            row = {"stage": self._run, "step": step, "seconds": round(seconds, 3)} | values
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
        for board in self._boards:
            board.add(step, numbers)
        self._compiled = self._compiled or (step, seconds)
        now = time.monotonic()
        if step % self._every == 0 or step == self._steps or now - self._shown >= _SECONDS:
            self._shown = now
            log.info("%s", self._line(step, seconds, numbers, *self._compiled))
        for key, name in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not np.isfinite(values.get(key, 0.0)):
                raise UserError(
                    f"{self._run}: the {name} at step {step} is {values[key]}; the last good checkpoint is "
                    f"kept: go on from it with a lower config.train.{self._run}.optimizer.learning_rate or "
                    "clip_norm"
                )

    def _line(
        self, step: int, seconds: float, values: Mapping[str, float], compiled: int, since: float
    ) -> str:
        """What matters most, as much of it as fits; the speed is that after the step with the compilation."""
        begin = f"{self._run} {step}/{self._steps}"
        if step > compiled:
            done, spent = step - compiled, seconds - since
            end = f"| {rate(done, spent, 'steps')} | {duration(spent / done * (self._steps - step))} left"
        else:
            end = f"| the first step, with what it compiled, {duration(seconds - self._before)}"
        names = [next((n for n in of.split("/") if n in values), "") for of in ("loss", *_SHOWN)]
        shown = [f"{name} {values[name]:.4g}" for name in names if name]
        while shown and len(" ".join((begin, *shown, end))) > width():
            shown.pop()
        return " ".join((begin, *shown, end))[: width()]


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """All complete lines of `metrics.jsonl`."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().split("\n")[:-1] if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # cut short by a kill
            continue
    return rows


def _drop_after(path: pathlib.Path, run: str, step: int) -> None:
    """Removes a run's lines beyond `step`: the process that wrote them never saved that far."""
    if not (processes.first() and path.exists()):
        return
    rows = read(path.parent)
    kept = [r for r in rows if r["stage"] != run or r["step"] <= step]
    with files.replacing(path) as scratch:
        scratch.write_text("".join(json.dumps(r) + "\n" for r in kept))
