"""Metrics: one step late, so that reading them never stalls the devices.

`metrics.jsonl` has one object a line: `stage` (the name of a training run), `step`, `seconds` (of the run,
across restarts) and the metrics. The terminal gets a line now and then with speed and time left; TensorBoard
on request.
"""

import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.parallel import processes
from ppow_jax.parallel.console import log


class Writer:
    """Writes the metrics of one training run; use as a context manager."""

    def __init__(
        self,
        workdir: pathlib.Path,
        run: str,
        steps: int,
        first_step: int = 0,
        seconds: float = 0.0,
        every: int = 1,
        tensorboard: bool = False,
    ) -> None:
        """Continues a run after `first_step`, dropping lines that were written beyond and never saved."""
        self._path = workdir / "metrics.jsonl"
        self._run, self._steps, self._every = run, steps, every
        self._first, self._began, self._before = first_step, time.monotonic(), seconds
        self._pending: tuple[int, float, Any] | None = None
        _drop_after(self._path, run, first_step)
        self._file = self._path.open("a") if processes.first() else None
        self._board = _tensorboard(workdir / "tensorboard" / run) if tensorboard and self._file else None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self._file:
            self._file.close()
        if self._board:
            self._board.close()

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
        if self._board:
            for key, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)
        if step % self._every == 0 or step == self._steps:
            log.info("%s", self._line(step, seconds, values))
        for key, name in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            if not np.isfinite(values.get(key, 0.0)):
                raise UserError(
                    f"{self._run}: the {name} at step {step} is {values[key]}; the last good checkpoint is "
                    f"kept: go on from it with a lower config.train.{self._run}.optimizer.learning_rate or "
                    "clip_norm"
                )

    def _line(self, step: int, seconds: float, values: Mapping[str, Any]) -> str:
        done = max(1, step - self._first)
        left = (seconds - self._before) / done * (self._steps - step)
        shown = " ".join(f"{k} {v:.4g}" for k, v in values.items() if isinstance(v, int | float))
        return f"{self._run} {step}/{self._steps} {shown} | {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as `1h02m`, `3m05s` or `7s`."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


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
    scratch = path.with_suffix(".tmp")
    scratch.write_text("".join(json.dumps(r) + "\n" for r in kept))
    scratch.replace(path)


def _tensorboard(directory: pathlib.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as e:
        raise UserError("log.tensorboard needs tensorboardX: `pip install -e .[tensorboard]`") from e
    return SummaryWriter(str(directory))
