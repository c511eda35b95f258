"""The drafters of a workdir: what training runs begin with, and what they have left."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.data import texts
from ppow_jax.drafters import induction
from ppow_jax.drafters.eagle3 import (
    Drafter,
    DrafterConfig,
    abstract_params,
    config_from,
    drafter_config,
    drafter_of,
    init_params,
    weights_of,
)
from ppow_jax.drafters.files import llamacpp, reading
from ppow_jax.errors import ConfigError, UnfinishedError, UserError
from ppow_jax.experiment import Experiment, require_finite
from ppow_jax.models.fields import Fields
from ppow_jax.models.target import TargetConfig, head_matrix
from ppow_jax.models.target_outputs import taps_of
from ppow_jax.parallel import files, partition
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.parallel.console import log
from ppow_jax.settings import FRESH, IMPORTED, DrafterSettings
from ppow_jax.targets import directories

_INDUCTION_TEXTS, _INDUCTION_BATCH = 256, 16  # what the relation of features to tokens is read from


class Trained(NamedTuple):
    """A drafter with what is noted about it.

    Attributes:
      drafter: its module.
      params: float32 parameters, on the mesh.
      vocab: int32 `[N]`, target ids of the draft ids.
      steps, seconds: of the run that made it.
    """

    drafter: Drafter
    params: dict
    vocab: Any
    steps: int = 0
    seconds: float = 0.0


def checkpoints(experiment: Experiment, run: str) -> Checkpoints:
    """The checkpoints of a training run."""
    return Checkpoints(directory(experiment.workdir, run), experiment.settings.log.keep_checkpoints)


def directory(workdir: pathlib.Path, run: str) -> pathlib.Path:
    """Where they lie."""
    return workdir / "checkpoints" / run


def begin(experiment: Experiment, run: str, corpus: texts.Corpus) -> Trained:
    """What a training run begins with: see `TrainSettings.start`.

    Raises:
      UserError: the run or the files that it starts from cannot be read.
    """
    settings = experiment.settings.train[run]
    if settings.start in experiment.settings.train:
        return load(experiment, settings.start)
    if settings.start != FRESH:
        return _from_files(experiment, settings.start, f"train.{run}.start")
    if experiment.settings.drafter.path:
        return load(experiment, IMPORTED)
    size, V = experiment.settings.drafter.vocab_size, experiment.target.config.vocab_size
    vocab, coverage = texts.draft_vocabulary(experiment.responses, corpus.indices, size, V)
    log.info("%s: %d texts; draft vocabulary %d covers %.4f", run, len(corpus.train), size, coverage)
    return fresh(experiment, vocab, corpus, settings.seed)


def fresh(experiment: Experiment, vocab: np.ndarray, corpus: texts.Corpus | None, seed: int = 0) -> Trained:
    """A new drafter; with a corpus and if the settings say so, with induction heads."""
    settings, target = experiment.settings.drafter, experiment.target.config
    drafter = drafter_of(shape_by(settings, target))
    ids, random = jnp.asarray(vocab), experiment.key("drafter", seed)
    params = init_params(drafter.config, target, experiment.target_params, ids, random)
    params = partition.shard(params, experiment.mesh)
    if corpus and settings.induction:
        embedding = weights_of(params, experiment.target_params, ids).embedding
        about = (embedding, head_matrix(target, experiment.target_params))
        params = induction.begin(drafter, params, *about, _for_induction(experiment, corpus))
        params = partition.shard(params, experiment.mesh)
    return Trained(drafter, params, vocab)


def _for_induction(
    experiment: Experiment, corpus: texts.Corpus
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """Taps `[B, T, C]`, tokens `[B, T]` and where there is text, bool `[B, T]`, of evenly spread texts."""
    chosen = texts.spread(len(corpus.train), _INDUCTION_TEXTS)
    for at in range(0, len(chosen), _INDUCTION_BATCH):
        items = [corpus.train[i] for i in chosen[at : at + _INDUCTION_BATCH]]
        batch = partition.shard_batch(texts.stack(items), experiment.mesh)
        real = jax.lax.cummax(batch["assistant"].astype(jnp.int32), axis=1, reverse=True) > 0
        yield taps_of(experiment.target, experiment.target_params, batch), batch["tokens"], real


def shape_by(settings: DrafterSettings, target: TargetConfig) -> DrafterConfig:
    """A new drafter's shape by the settings."""
    s = settings
    shape = (s.vocab_size, s.mlp_hidden, s.dtype, s.kv_heads, s.layers, s.width, s.module)
    return drafter_config(target, *shape)


def shape_of(experiment: Experiment, run: str) -> DrafterConfig:
    """The shape that the drafter of a run has, or will have.

    Raises:
      UserError: the files that it or what it starts from begins with cannot be read, or a key does not fit
        the target.
    """
    settings = experiment.settings
    first = settings.lineage(run)[0]
    start = settings.train[first].start
    path, key = (settings.drafter.path, "drafter.path") if start == FRESH else (start, f"train.{first}.start")
    if path:
        return imported(path, experiment.target.config, experiment.fingerprint, key).config
    return drafter_of(shape_by(settings.drafter, experiment.target.config)).config


def load(experiment: Experiment, run: str) -> Trained:
    """The drafter that a finished run left, or the one that was read from files (`IMPORTED`).

    Raises:
      UnfinishedError: the run was stopped before its last step.
      UserError: the run has left nothing, or its checkpoint belongs to another target.
    """
    if run == IMPORTED:
        return _from_files(experiment, experiment.settings.drafter.path, "drafter.path")
    store = checkpoints(experiment, run)
    try:
        if store.latest is None:
            raise UserError(f"{experiment.workdir}: no checkpoint of the run {run!r}; train it first")
        about = checked(store.about(), directory(experiment.workdir, run))
        if about["target"] != experiment.fingerprint:
            raise UserError(
                f"{directory(experiment.workdir, run)}: drafter of target {about['target'][:12]}, this "
                f"target is {experiment.fingerprint[:12]}; use the target that it was trained for"
            )
        if store.latest < about["steps"]:
            raise UnfinishedError(
                f"{experiment.workdir}: the run {run!r} is at step {store.latest} of {about['steps']}; train "
                "it to its end"
            )
        module = experiment.settings.drafter.module
        drafter = drafter_of(config_from(about["drafter"], str(directory(experiment.workdir, run)), module))
        _, state, _ = store.restore_part(shapes(experiment, drafter))
    finally:
        store.close()
    return Trained(drafter, state["params"], state["vocab"], about["steps"], about["seconds"])


def checked(about: Any, where: pathlib.Path) -> dict[str, Any]:
    """What a checkpoint notes about a drafter.

    Raises:
      UserError: something is missing, or of another type.
    """
    c = Fields(about, str(where), of="a drafter's checkpoint")
    c.text("target")
    c.whole("steps")
    c.number("seconds", zero=True)
    c.part("drafter")
    return about


def shapes(experiment: Experiment, drafter: Drafter) -> dict[str, Any]:
    """Shapes of a drafter's parameters and vocabulary with their places on the mesh."""
    whole = partition.replicated(experiment.mesh)
    return {
        "params": partition.laid_out(abstract_params(drafter.config), experiment.mesh),
        "vocab": jax.ShapeDtypeStruct((drafter.config.vocab_size,), np.int32, sharding=whole),
    }


def _from_files(experiment: Experiment, path: str, key: str) -> Trained:
    """A drafter from EAGLE-3 files, computing in the dtype of the settings."""
    found = imported(path, experiment.target.config, experiment.fingerprint, key)
    return complete(experiment, found, f"config.{key}: {path!r}")


def complete(experiment: Experiment, found: reading.Imported, where: str) -> Trained:
    """What was read from files, with a head of its own, on the mesh.

    Raises:
      UserError: a parameter is not finite; the message begins with `where`.
    """
    config = dataclasses.replace(found.config, dtype=experiment.settings.drafter.dtype)
    params, target = found.params, experiment.target_params
    if found.head:
        tied = found.head == "embedding"
        matrix = target["embedding"]["embedding"] if tied else head_matrix(experiment.target.config, target)
        params = params | {"head": {"weight": jnp.array(matrix, jnp.float32)}}  # a copy, which is trained
    params = partition.shard(params, experiment.mesh)
    require_finite(params, where)
    return Trained(Drafter(config), params, found.vocab)


@functools.cache
def imported(
    path: str, target: TargetConfig, fingerprint: str, key: str = "drafter.path"
) -> reading.Imported:
    """The drafter that a path means, a directory or a name of the hub, as a server reads it.

    Raises:
      UserError: it cannot be read, is of another target, or reads other layers of it than `target.taps`.
    """
    file = files.path_of(path)
    directory = directories.find(path, key)
    if directory is None and path and file.is_file():
        found = llamacpp.read(file, target, fingerprint)
    elif directory is None:
        raise ConfigError(
            f"config.{key}: no directory {path!r}; expected one of EAGLE-3 files (config.json, "
            "model.safetensors), a GGUF file, or a name of the Hugging Face hub (ORGANISATION/MODEL)"
        )
    else:
        found = reading.read(directory, target, fingerprint)
    if found.taps != target.taps:
        raise ConfigError(
            f"config.target.taps: found {target.taps}, expected {found.taps}, "
            f"which the drafter in {path} sees"
        )
    return found
