"""Checkpoints: the only module that knows orbax.

A training checkpoint is one orbax directory a step with the items `state` (parameters, optimiser, draft
vocabulary, ADAW scores), `data` (the Grain iterator) and `about` (JSON: target, seconds, shapes). Orbax
writes into a temporary name and renames, so a kill leaves the step before it intact.
"""

import pathlib
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ppow_jax.console import log
from ppow_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one stage."""

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, data: Any, about: dict[str, Any]) -> None:
        """Saves a step: arrays, the Grain iterator (or None) and plain JSON values."""
        items = {"state": state, "about": about} | ({"data": data} if data is not None else {})
        self._checkpointer.save_checkpointables(step, items)

    def restore(self, state: Any, data: Any = None) -> tuple[int, Any, dict[str, Any]]:
        """The newest step that can be read; `data` is set to where it was.

        Args:
          state: shapes, dtypes and shardings to restore to (`jax.ShapeDtypeStruct` leaves).
          data: the Grain iterator to set, or None.

        Raises:
          UserError: no step can be read.
        """
        items = {"state": state, "about": None} | ({"data": data} if data is not None else {})
        steps = sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)
        for step in steps:
            try:
                found = self._checkpointer.load_checkpointables(step, items)
            except Exception as e:  # a damaged step surfaces as many kinds of error
                log.error("%s: step %d cannot be read (%s)", self._directory, step, _reason(e))
                continue
            self._set_aside([s for s in steps if s > step])
            return step, found["state"], found["about"]
        raise UserError(
            f"{self._directory}: none of the checkpoints {steps} can be read; they may be damaged, or "
            "of another model. Delete the directory to start the stage again"
        )

    def _set_aside(self, steps: list[int]) -> None:
        """Renames steps that cannot be read: they would be in the way of saving those steps again."""
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                aside = self._directory / f"damaged-{step}"
                if aside.exists():
                    shutil.rmtree(aside)
                (self._directory / str(step)).rename(aside)
                log.error("%s: what is left of step %d is now in %s", self._directory, step, aside.name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._checkpointer.reload()

    def restore_part(self, state: Any) -> tuple[int, Any, dict[str, Any]]:
        """Like `restore`, for some of the state's entries; the others are not read.

        Raises:
          UserError: the newest step cannot be read.
        """
        step = self.latest
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            try:
                found = self._checkpointer.load_checkpointables(step, {"state": state, "about": None})
            except Exception as e:  # a damaged step surfaces as many kinds of error
                raise self._unreadable(step, e) from e
        return step, found["state"], found["about"]

    def about(self) -> dict[str, Any]:
        """The JSON item of the newest step alone.

        Raises:
          UserError: it cannot be read.
        """
        try:
            return self._checkpointer.load_checkpointables(None, {"about": None})["about"]
        except Exception as e:  # a damaged step surfaces as many kinds of error
            raise self._unreadable(self.latest, e) from e

    def _unreadable(self, step: int | None, error: Exception) -> UserError:
        return UserError(
            f"{self._directory}: step {step} cannot be read ({_reason(error)}); restore it from a copy, or "
            "train again in a new workdir"
        )

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then releases resources."""
        self._checkpointer.close()


def _reason(error: Exception) -> str:
    """The first line of an error, not too long."""
    return str(error).strip("\"' \n").split("\n")[0].split("\\n")[0][:200]


def abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree of device arrays."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def save_params(directory: pathlib.Path, params: dict) -> None:
    """Writes a parameters-only checkpoint, replacing what is there."""
    ocp.save_pytree(directory.absolute(), params, overwrite=True)


def load_params(directory: pathlib.Path, like: dict) -> dict:
    """Reads a parameters-only checkpoint.

    Args:
      directory: where `save_params` wrote it.
      like: shapes and dtypes.

    Raises:
      UserError: missing, damaged, or of another shape.
    """
    try:
        return ocp.load_pytree(directory.absolute(), like)
    except Exception as e:  # a damaged checkpoint surfaces as many kinds of error
        raise UserError(f"{directory}: the parameters cannot be read ({_reason(e)})") from e
