"""The target's features of the training texts, kept beside the responses.

On a small machine the target's forward pass over the texts costs more than the drafter's whole training
step. `respond` keeps what the target saw while it wrote; texts from elsewhere are read once. Every shard of
`responses/` has one of the same name, with as many records, in `features/`.
"""

import functools
import pathlib

import jax
import numpy as np

from ppow_jax.data import records
from ppow_jax.data.texts import spread
from ppow_jax.errors import UserError
from ppow_jax.experiment import Experiment
from ppow_jax.models import target_outputs
from ppow_jax.models.target import Target
from ppow_jax.parallel import partition, processes, progress
from ppow_jax.stages import room

_BATCH = 16  # texts a forward pass, or more where that many would not divide over devices
_SAMPLE = 8  # texts of a shard, of which the lengths are read
_BUCKET = 32  # texts are padded to a multiple of this


def directory(experiment: Experiment) -> pathlib.Path:
    """Where a workdir keeps them."""
    return experiment.workdir / "features"


def ensure(experiment: Experiment) -> records.Records:
    """The features of all responses, computing those that `respond` has not kept.

    Raises:
      UserError: a value does not fit into `data.feature_dtype`.
    """
    responses = experiment.workdir / "responses"
    names = records.shards(responses)
    todo = processes.agreed([name for name in names if not _there(experiment, name)])
    texts = {name: records.Records(responses, [name]) for name in todo}
    if todo:
        _require_room(experiment, list(texts.values()))
    loop = progress.Loop("features", sum(map(len, texts.values())), "texts")
    for name in todo:
        _compute(experiment, name, texts[name], loop)
    processes.together("features are written")
    return records.Records(directory(experiment), names)


def _require_room(experiment: Experiment, shards: list[records.Records]) -> None:
    """Asks for disk by the lengths of some texts of each shard."""
    data, tokens = experiment.settings.data, 0
    for shard in shards:
        some = spread(len(shard), _SAMPLE)
        lengths = [min(len(shard[i]["tokens"]), data.length) for i in some]
        tokens += sum(lengths) * len(shard) // len(some)
    room.require_for_features(experiment, directory(experiment), data.feature_dtype, tokens)


def opened(experiment: Experiment) -> records.Records | None:
    """The features of all responses, or None where some are missing or are not kept."""
    names = records.shards(experiment.workdir / "responses")
    if not experiment.settings.data.cache_features or not all(_there(experiment, name) for name in names):
        return None
    return records.Records(directory(experiment), names)


def write(where: pathlib.Path, name: str, rows: list[dict[str, np.ndarray]], dtype: str) -> None:
    """Writes the features of a shard of responses.

    Raises:
      UserError: a value does not fit into the dtype.
    """
    if not all(np.isfinite(values).all() for row in rows for values in row.values()):
        raise UserError(
            f"config.data.feature_dtype: a feature does not fit into {dtype}; use bfloat16 or float32"
        )
    records.write_shard(where, name, rows)


def _there(experiment: Experiment, name: str) -> bool:
    """Whether the features of a shard lie on disk, in the dtype that the settings ask for."""
    where = directory(experiment)
    if name not in records.shards(where):
        return False
    return records.Records(where, [name])[0]["taps"].dtype.name == experiment.settings.data.feature_dtype


@functools.partial(jax.jit, static_argnames=("target", "dtype"))
def _features(target: Target, params: dict, tokens_BxT: jax.Array, dtype: str) -> target_outputs.Features:
    outputs, _ = target_outputs.read(target, params, tokens_BxT)
    return target_outputs.Features(outputs.taps.astype(dtype), outputs.hidden.astype(dtype))


def _compute(experiment: Experiment, name: str, texts: records.Records, loop: progress.Loop) -> None:
    """One shard; texts of like length share a forward pass."""
    data = experiment.settings.data
    tokens = [texts[i]["tokens"][: data.length] for i in range(len(texts))]
    ordered = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    rows: dict[int, dict[str, np.ndarray]] = {}
    ways = partition.batch_ways(experiment.mesh)
    size = -(-_BATCH // ways) * ways
    for at in range(0, len(ordered), size):
        batch = ordered[at : at + size]
        padded = pad_texts([tokens[i] for i in batch], size)
        found = _features(
            experiment.target,
            experiment.target_params,
            partition.shard_batch(padded, experiment.mesh),
            data.feature_dtype,
        )
        arrays = processes.host(found._asdict())
        for row, i in enumerate(batch):
            rows[i] = {k: v[row, : len(tokens[i])] for k, v in arrays.items()}
        loop.add(len(batch))
    write(directory(experiment), name, [rows[i] for i in range(len(tokens))], data.feature_dtype)


def pad_texts(rows: list[np.ndarray], batch_size: int, length: int = 0) -> np.ndarray:
    """int32 `[B, T]`: rows padded with 0 to `length`, or to the next bucket; missing rows are 0."""
    longest = max(len(r) for r in rows)
    padded = np.zeros((batch_size, length or -(-longest // _BUCKET) * _BUCKET), np.int32)
    for row, ids in zip(padded, rows, strict=False):
        row[: len(ids)] = ids
    return padded
