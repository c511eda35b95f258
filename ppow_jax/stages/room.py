"""Whether disk and memory have room for what the stages will write and hold: asked before the work."""

import math
import pathlib
import sys
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from ppow_jax.drafters.eagle3 import abstract_params
from ppow_jax.experiment import Experiment
from ppow_jax.parallel import files, memory, partition
from ppow_jax.parallel.console import log
from ppow_jax.training import drafters

_SHORTEST = 4  # an answer is counted as this part of what it may be at most
_COMPRESSED = 0.8  # of a checkpoint's arrays, at least
_LEARNER = 3  # arrays of the drafter's size that a checkpoint holds: parameters and two moments
_HELD = 4  # arrays of the size of a batch's logits that an update holds at a time, by XLA's account


def require_for_features(
    experiment: Experiment, directory: pathlib.Path, dtype: str, known: int, answers: int = 0
) -> None:
    """Disk for the features of texts.

    Args:
      experiment: whose target makes them.
      directory: where they will be.
      dtype: of the files.
      known: tokens of texts that are there.
      answers: tokens that the target will add at most.

    Raises:
      UserError: there is clearly too little.
    """
    needed = _feature_bytes(experiment, dtype) * (known + answers // _SHORTEST)
    files.require_room(directory, needed, "the target's features")


def require_for_checkpoints(experiment: Experiment, runs: Iterable[str]) -> None:
    """Disk for the checkpoints of training runs, beside those that are there.

    Raises:
      UserError: there is clearly too little.
    """
    log_settings, needed, largest = experiment.settings.log, 0, 0
    for name in runs:
        directory, steps = drafters.directory(experiment.workdir, name), experiment.settings.train[name].steps
        size = int(_COMPRESSED * _LEARNER * _drafter_bytes(experiment, name))
        saves = -(-steps // log_settings.checkpoint_every_steps) if steps else log_settings.keep_checkpoints
        there = sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
        needed += max(0, min(saves, log_settings.keep_checkpoints) * size - there)
        largest = max(largest, size)
    if needed:  # and while one is being written, the one before it is still there
        directory = experiment.workdir / "checkpoints"
        files.require_room(directory, needed + largest, "as many as config.log.keep_checkpoints of each run")


def warn_of_writing(experiment: Experiment, label: str, tokens: int, dtype: str) -> None:
    """A line in the log if a batch of so many tokens, answers included, is likely to be more than the free
    memory; `dtype` is that of the features that are kept, or empty."""
    needed = tokens * _written_bytes(experiment, dtype)
    _warn(experiment, label, needed, f"config.{label.split()[0]}.batch_size")


def texts_that_fit(experiment: Experiment, length: int, dtype: str) -> int:
    """How many texts of so many tokens may be written at a time in half of the memory that is free, which
    leaves room for what is made on the way: a multiple of 8 where there are more.

    Args:
      experiment: whose target writes.
      length: of a text, its prompt included.
      dtype: of the features that are kept, or empty.
    """
    free = memory.free_bytes()
    if free is None:
        return sys.maxsize
    fitting = free // 2 * _ways(experiment) // (length * _written_bytes(experiment, dtype))
    return max(1, fitting if fitting < 8 else fitting // 8 * 8)


def warn_of_training(experiment: Experiment, run: str) -> None:
    """A line in the log if a step of a run is likely to be more than the memory that is free."""
    settings, method = experiment.settings.train[run], experiment.settings.train[run].method
    shape = drafters.shape_of(experiment, run)
    rows = settings.batch_size // settings.accumulate
    windows = rows * getattr(method, "anchors", 1) * getattr(method, "group", 1) * method.window
    logits = windows * shape.vocab_size * jnp.dtype(shape.dtype).itemsize
    key = f"config.train.{run}.batch_size, or more parts of it (config.train.{run}.accumulate)"
    _warn(experiment, run, _HELD * logits, key, (_LEARNER + 1) * _drafter_bytes(experiment, run))


def _warn(experiment: Experiment, label: str, split: int, key: str, whole: int = 0) -> None:
    """Compares bytes, of which `split` are spread over devices as rows are, with the free ones."""
    needed, free = split // _ways(experiment) + whole, memory.free_bytes()
    if free is not None and needed > free:
        figures = (needed / 1e9, free / 1e9)
        log.warning("%s: about %.3g GB of memory needed, %.3g GB free; lower %s", label, *figures, key)


def _ways(experiment: Experiment) -> int:
    """Over how many memories rows are spread."""
    return 1 if partition.platform() == "cpu" else partition.batch_ways(experiment.mesh)


def _written_bytes(experiment: Experiment, dtype: str) -> int:
    """Of a token of a text that is being written: keys, values and features."""
    c = experiment.target.config
    cache = 2 * c.layers * c.kv_heads * c.head_size * jnp.dtype(c.dtype).itemsize
    return cache + (_feature_bytes(experiment, dtype) if dtype else 0)


def _feature_bytes(experiment: Experiment, dtype: str) -> int:
    """Of a token."""
    c = experiment.target.config
    return (len(c.taps) + 1) * c.width * jnp.dtype(dtype).itemsize


def _drafter_bytes(experiment: Experiment, run: str) -> int:
    """Of the float32 parameters."""
    shapes = abstract_params(drafters.shape_of(experiment, run))
    return sum(math.prod(x.shape) * 4 for x in jax.tree.leaves(shapes))
