"""The target's lessons on the training texts, computed once and kept beside the responses.

On a small machine the target's forward pass over the texts costs more than the drafter's whole training
step; the cache pays it once. Record i of `features/` belongs to record i of `responses/`.
"""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import partition, teacher
from ppow_jax.console import log
from ppow_jax.data import records
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.metrics import duration
from ppow_jax.models.target import Target

_SHARD = 128  # texts
_BATCH = 16  # texts a forward pass
_BUCKET = 32  # texts are padded to a multiple of this


def ensure(experiment: Experiment, texts: records.Records) -> records.Records:
    """The lessons of all texts, computing those that are not on disk yet.

    Raises:
      UserError: a value does not fit into `data.feature_dtype`.
    """
    directory = experiment.workdir / "features"
    done = set(records.shards(directory))
    starts = range(0, len(texts), _SHARD)
    todo = [s for s in starts if _name(s) not in done]
    began = time.monotonic()
    for n, start in enumerate(todo, 1):
        _write(experiment, texts, start, directory)
        seconds = time.monotonic() - began
        left = duration(seconds / n * (len(todo) - n))
        log.info("features: shard %d/%d | %s left", len(starts) - len(todo) + n, len(starts), left)
    return records.Records(directory)


def _name(start: int) -> str:
    return f"texts-{start:08}"


@functools.partial(jax.jit, static_argnames=("target", "dtype"))
def _lesson(target: Target, params: dict, tokens_BxT: jax.Array, dtype: str) -> teacher.Lesson:
    lesson, _ = teacher.read(target, params, tokens_BxT)
    return lesson._replace(taps=lesson.taps.astype(dtype), hidden=lesson.hidden.astype(dtype))


def _write(experiment: Experiment, texts: records.Records, start: int, directory: pathlib.Path) -> None:
    """One shard; texts of like length share a forward pass."""
    data = experiment.settings.data
    indices = range(start, min(start + _SHARD, len(texts)))
    tokens = {i: texts[i]["tokens"][: data.length] for i in indices}
    ordered = sorted(indices, key=lambda i: (len(tokens[i]), i))
    rows: dict[int, dict[str, np.ndarray]] = {}
    for at in range(0, len(ordered), _BATCH):
        batch = ordered[at : at + _BATCH]
        padded = pad_texts([tokens[i] for i in batch], _BATCH)
        lesson = _lesson(
            experiment.target,
            experiment.target_params,
            partition.shard_batch(padded, experiment.mesh),
            data.feature_dtype,
        )
        finite = bool(jnp.isfinite(lesson.taps).all() & jnp.isfinite(lesson.hidden).all())
        if not finite:
            raise UserError(
                f"config.data.feature_dtype: a feature does not fit into {data.feature_dtype}; "
                "use bfloat16 or float32"
            )
        arrays = {k: np.asarray(v) for k, v in lesson._asdict().items()}
        for row, i in enumerate(batch):
            rows[i] = {k: v[row, : len(tokens[i])] for k, v in arrays.items()}
    records.write_shard(directory, _name(start), (rows[i] for i in indices))


def pad_texts(rows: list[np.ndarray], batch_size: int, length: int = 0) -> np.ndarray:
    """int32 `[B, T]`: rows padded with 0 to `length`, or to the next bucket; missing rows are 0."""
    longest = max(len(r) for r in rows)
    padded = np.zeros((batch_size, length or -(-longest // _BUCKET) * _BUCKET), np.int32)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = ids
    return padded
