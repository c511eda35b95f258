"""Boards that show the numbers of a training run as curves: TensorBoard, and Weights & Biases."""

import hashlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Protocol

from ppow_jax.errors import UserError
from ppow_jax.parallel import files
from ppow_jax.settings import LogSettings


class Board(Protocol):
    """Takes numbers, beside `metrics.jsonl`."""

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a step."""

    def close(self) -> None:
        """Writes what is pending."""


class TensorBoard:
    """Event files in a directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        import tensorboardX

        self._writer = tensorboardX.SummaryWriter(str(directory))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Board`."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        """See `Board`."""
        self._writer.close()


class WeightsAndBiases:
    """A run of a project of Weights & Biases, which goes on where the training run does."""

    def __init__(self, project: str, workdir: pathlib.Path, run: str) -> None:
        """Opens the run.

        Raises:
          UserError: the service or its login is not there.
        """
        import wandb

        identity = hashlib.sha256(str(workdir.absolute() / run).encode()).hexdigest()[:16]
        about = {"project": project, "name": run, "id": identity, "resume": "allow", "dir": str(workdir)}
        about["config"] = files.read_json(workdir / "config.json")
        try:
            self._run = wandb.init(**about, settings=wandb.Settings(console="off", silent=True))
        except Exception as e:  # no network, no login: as many kinds of error
            raise UserError(
                f"config.log.wandb: {project!r} cannot be opened ({e}); run `wandb login`, or set "
                "WANDB_MODE=offline and run `wandb sync` later"
            ) from e

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """See `Board`."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """See `Board`."""
        self._run.finish()


def check(settings: LogSettings) -> None:
    """Whether the packages are there that boards need.

    Raises:
      UserError: a package is missing, with the command that brings it.
    """
    for key, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if getattr(settings, key):
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:  # a mere folder of that name has no origin
                raise UserError(
                    f"config.log.{key}: the package {package} is missing; `pip install {package}`"
                )


def opened(settings: LogSettings, workdir: pathlib.Path, run: str) -> list[Board]:
    """The boards that the settings ask for, for one training run."""
    found: list[Board] = [TensorBoard(workdir / "tensorboard" / run)] if settings.tensorboard else []
    return found + ([WeightsAndBiases(settings.wandb, workdir, run)] if settings.wandb else [])
