"""Checkpoints: the only module that knows orbax.

A training checkpoint is one orbax directory a step with the items `state` (parameters, optimiser, draft
vocabulary, ADAW scores), `data` (the Grain iterator) and `about` (JSON: target, seconds, shapes). Orbax
writes into a temporary name and renames, so a kill leaves the step before it intact.
"""

import pathlib
from typing import Any

import jax
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
                reason = str(e).strip().split("\n")[0][:200]
                log.error("%s: step %d cannot be read (%s)", self._directory, step, reason)
                continue
            return step, found["state"], found["about"]
        raise UserError(
            f"{self._directory}: none of the checkpoints {steps} can be read; they may be damaged, or "
            "of another model. Delete the directory to start the stage again"
        )

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
                reason = str(e).strip().split("\n")[0][:200]
                raise UserError(f"{self._directory}: step {step} cannot be read ({reason})") from e
        return step, found["state"], found["about"]

    def about(self) -> dict[str, Any]:
        """The JSON item of the newest step alone."""
        found = self._checkpointer.load_checkpointables(None, {"about": None})
        return found["about"]

    def wait(self) -> None:
        """Returns when every save is on disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits, then releases resources."""
        self._checkpointer.close()


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
        reason = str(e).strip().split("\n")[0][:200]
        raise UserError(f"{directory}: the parameters cannot be read ({reason})") from e
