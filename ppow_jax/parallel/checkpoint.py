"""Checkpoints: the only module that knows orbax.

A training checkpoint is one orbax directory a step with the items `state` (parameters, optimiser, draft
vocabulary, the objective's memory) and `about` (JSON: target, seconds, shapes, where the Grain iterator
stands, which is the same for every process: a run may go on with another number of them). Orbax writes into
a temporary name and renames, so a kill leaves the step before it intact. It writes while the run goes on; a
save that fails, as on a full disk, is reported, and the one before it stays.
"""

import atexit
import functools
import logging
import os
import pathlib
import re
import shutil
import tempfile
import warnings
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from ppow_jax.errors import UserError
from ppow_jax.parallel import processes
from ppow_jax.parallel.console import log

# What fails is told in one line here; orbax's threads and tasks would add their tracebacks to it.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)
logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
_ELSEWHERE = OSError("another process says why")


class _UnreadableError(Exception):
    """A step cannot be read, by one process at least; with the reason."""


class Checkpoints:
    """The checkpoints of one training run."""

    def __init__(self, directory: pathlib.Path, keep: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory, self._keep = directory, keep
        self._checkpointer = self._open()
        self._pending: tuple[int, Any] | None = None  # the save that is being written, or why it is not
        self._saved = self.latest

    def _open(self) -> ocp.training.Checkpointer:
        _require_files(self._directory)
        try:
            return ocp.training.Checkpointer(
                _plain(self._directory),
                save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
                preservation_policy=ocp.training.preservation_policies.LatestN(self._keep),
                cleanup_tmp_directories=True,
            )
        except Exception as e:  # what is damaged surfaces as many kinds of error
            raise UserError(
                f"{self._directory}: the checkpoints cannot be listed ({_reason(e)}); restore them from a "
                "copy, or take the newest step away"
            ) from e

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    def save(self, step: int, state: Any, data: Any, about: dict[str, Any]) -> None:
        """Begins to save a step: arrays, the Grain iterator (or None) and plain JSON values.

        All of them may change as soon as it returns.
        """
        self.settle()
        place = {"data": data.get_state()} if data is not None else {}
        items = {"state": state, "about": about | place}
        try:
            self._pending = step, self._checkpointer.save_checkpointables_async(step, items)
        except Exception as e:  # a disk that is full surfaces as many kinds of error
            self._pending = step, e

    def settle(self) -> None:
        """Waits for the save that is being written; reports it if it fails, on whatever process."""
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        error = response if isinstance(response, Exception) else None
        try:
            if error is None:
                response.result()
        except Exception as e:  # a disk that is full surfaces as many kinds of error
            error = e
        if processes.anywhere(error is not None):
            self._failed(step, error or _ELSEWHERE)
        else:
            self._saved = step

    def _failed(self, step: int, error: Exception) -> None:
        log.error(
            "%s: step %d could not be saved (%s); the newest one saved is %s",
            self._directory,
            step,
            _reason(error),
            "none" if self._saved is None else f"step {self._saved}",
        )
        self._checkpointer = self._open()  # the old one would raise the error again at every later save

    def require(self, step: int) -> None:
        """Returns when `step` is on disk.

        Raises:
          UserError: it could not be saved.
        """
        self.settle()
        if self._saved != step:
            raise UserError(
                f"{self._directory}: step {step} could not be saved, see above; make room on the disk and "
                f"run again: it goes on from {'the start' if self._saved is None else f'step {self._saved}'}"
            )

    def restore(self, state: Any, data: Any = None) -> tuple[int, Any, dict[str, Any]]:
        """The newest step that can be read; `data` is set to where it was.

        Args:
          state: shapes, dtypes and shardings to restore to (`jax.ShapeDtypeStruct` leaves).
          data: the Grain iterator to set, or None.

        Raises:
          UserError: no step can be read.
        """
        step, found = self._newest({"state": state, "about": None})
        self._set_aside([s for s in self._steps() if s > step])
        self._saved = step
        if data is not None:
            data.set_state(found["about"]["data"])
        return step, found["state"], found["about"]

    def _steps(self) -> list[int]:
        """All complete steps, the newest first."""
        return sorted((c.step for c in self._checkpointer.checkpoints), reverse=True)

    def _newest(self, items: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The newest step whose items can be read, and these.

        Raises:
          UserError: there is none.
        """
        self.settle()
        steps = self._steps()
        for step in steps:
            try:
                return step, self._load(step, items)
            except _UnreadableError as e:
                log.error("%s: step %d cannot be read (%s)", self._directory, step, e)
        raise UserError(
            f"{self._directory}: none of the checkpoints {steps} can be read; they may be damaged, or "
            "of another model. Delete the directory to start the run again"
        )

    def _load(self, step: int | None, items: dict[str, Any], partial: bool = False) -> dict[str, Any]:
        """Items of a step (None: the newest) that all processes could read.

        Each reads by itself, and they compare notes: orbax would have those that met no damage wait for those
        that did, for minutes, and then fail everywhere.
        """
        me, error = jax.process_index(), None
        found: dict[str, Any] = {}
        context = ocp.Context()
        context.pytree.loading.partial_load = partial
        context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
        context.multiprocessing.barrier_sync_key_prefix = f"process_{me}"
        with context:
            try:
                found = self._checkpointer.load_checkpointables(step, items)
            except Exception as e:  # a damaged step surfaces as many kinds of error
                error = e
        if processes.anywhere(error is not None):
            raise _UnreadableError(_reason(error or _ELSEWHERE)) from error
        return found

    def _set_aside(self, steps: list[int]) -> None:
        """Renames steps that cannot be read: they would be in the way of saving those steps again."""
        if not steps:
            return
        if processes.first():
            for step in steps:
                aside = self._directory / f"damaged-{step}"
                if aside.exists():
                    shutil.rmtree(aside)
                (self._directory / str(step)).rename(aside)
                log.error("%s: what is left of step %d is now in %s", self._directory, step, aside.name)
        processes.together("damaged checkpoints are set aside")
        self._checkpointer.reload()

    def restore_part(self, state: Any) -> tuple[int | None, Any, dict[str, Any]]:
        """Like `restore`, for some of the state's entries; the others are not read.

        Raises:
          UserError: the newest step cannot be read.
        """
        self.settle()
        step = self.latest
        try:
            found = self._load(step, {"state": state, "about": None}, partial=True)
        except _UnreadableError as e:
            raise self._unreadable(step, e) from e
        return step, found["state"], found["about"]

    def readable_about(self) -> dict[str, Any]:
        """The JSON item of the newest step of which it can be read; `restore` goes on from such a step too.

        Raises:
          UserError: no step's can be read.
        """
        return self._newest({"about": None})[1]["about"]

    def about(self) -> dict[str, Any]:
        """The JSON item of the newest step alone.

        Raises:
          UserError: it cannot be read.
        """
        self.settle()
        try:
            return self._load(None, {"about": None})["about"]
        except _UnreadableError as e:
            raise self._unreadable(self.latest, e) from e

    def _unreadable(self, step: int | None, error: Exception) -> UserError:
        return UserError(
            f"{self._directory}: step {step} cannot be read ({error}); restore it from a copy, or "
            "train again in a new workdir"
        )

    def close(self) -> None:
        """Waits, then releases resources."""
        self.settle()
        self._checkpointer.close()


def _reason(error: BaseException) -> str:
    """The first line of an error, or of what it came from, not too long."""
    while error.__cause__:
        error = error.__cause__
    if full := re.search("No space left on device|Disk quota exceeded|File too large", str(error)):
        return full[0]  # TensorStore says a long path first
    return str(error).strip("\"' \n").split("\n")[0].split("\\n")[0][:200]


def _require_files(directory: pathlib.Path) -> None:
    """Raises `UserError` if there is a device or a pipe below a directory, which may be read without end."""
    for folder, _, names in os.walk(directory):
        for path in (pathlib.Path(folder, name) for name in names):
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise UserError(
                    f"{path}: found a device or a pipe, expected a file of a checkpoint; remove it"
                )


def _plain(directory: pathlib.Path) -> pathlib.Path:
    """A directory under a name that orbax and TensorStore take as it is.

    They read a path with brackets or stars as a pattern, one with backslashes or "gs:/" as another path, and
    then do not find what they have written. So where it is not plain they get a link to its parent.
    """
    path = directory.absolute()
    plain = re.fullmatch(r"[\w./+=,@-]+", str(path), re.ASCII)
    return path if plain else _link(path.parent) / path.name


@functools.cache
def _link(directory: pathlib.Path) -> pathlib.Path:
    """A symbolic link to a directory, for as long as this process lives."""
    link = pathlib.Path(tempfile.mkdtemp(prefix="ppow_jax_")) / "directory"
    link.symlink_to(directory, target_is_directory=True)
    atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
    return link


def save_params(directory: pathlib.Path, params: dict) -> None:
    """Writes a parameters-only checkpoint; what is there is replaced when the new one is whole.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    new = directory.with_name(directory.name + ".new")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        ocp.save_pytree(_plain(new), params, overwrite=True)
        if processes.first():
            shutil.rmtree(directory, ignore_errors=True)
            new.rename(directory)
    except Exception as e:  # a disk that is full surfaces as many kinds of error
        raise UserError(
            f"{directory}: the parameters cannot be written ({_reason(e)}); make room and run the same "
            "command again"
        ) from e
    processes.together("parameters are written")


def load_params(directory: pathlib.Path, like: dict) -> dict:
    """Reads a parameters-only checkpoint.

    Args:
      directory: where `save_params` wrote it.
      like: shapes and dtypes.

    Raises:
      UserError: missing, damaged, or of another shape.
    """
    _require_files(directory)
    try:
        return ocp.load_pytree(_plain(directory), like)
    except Exception as e:  # a damaged checkpoint surfaces as many kinds of error
        raise UserError(f"{directory}: the parameters cannot be read ({_reason(e)})") from e
