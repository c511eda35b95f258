"""What the doctor looks at: a run of a workdir, the files of its drafter, some held-out texts. Each is read
once, when a check asks for it; what cannot be read is a `UserError`, and the check is not made.

Shape letters: B texts, T positions, C width of the target's taps.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax import experiment as experiments
from ppow_jax.data import texts
from ppow_jax.doctor import file
from ppow_jax.drafters.eagle3 import Drafter, DrafterWeights, weights_of
from ppow_jax.drafters.files import llamacpp
from ppow_jax.drafters.files.reading import Imported
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.experiment import Experiment
from ppow_jax.models.target import Target
from ppow_jax.models.target_outputs import taps_of
from ppow_jax.parallel import files, partition, processes
from ppow_jax.report.measure import Benchmark
from ppow_jax.stages import evaluate, features
from ppow_jax.targets import directories
from ppow_jax.training import drafters

_TEXTS, _WRITTEN = 8, 48  # held-out texts, and how much of their responses is looked at
_ROUNDED, _QUANTISED = 0.02, 0.2  # the most by which storing changes a matrix: bfloat16 by 0.002, q4_0 by 0.1


class Subject(NamedTuple):
    """A drafter as it would be run.

    Attributes:
      name: for findings.
      drafter, weights: it.
      taps: the target's layers whose inputs it reads.
    """

    name: str
    drafter: Drafter
    weights: DrafterWeights
    taps: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Some held-out texts.

    Attributes:
      tokens: int32 `[B, T]`.
      start, end: int32 `[B]`, of the part of the response that is looked at.
      layers: float32 `[B, T, D]`, the inputs of the target's layers by their numbers.
    """

    tokens: np.ndarray
    start: np.ndarray
    end: np.ndarray
    layers: dict[int, jax.Array]

    def has(self, taps: Sequence[int]) -> bool:
        """Whether there are such layers."""
        return all(tap in self.layers for tap in taps)

    def taps(self, taps: Sequence[int]) -> jax.Array:
        """`[B, T, C]`: the inputs of some layers, side by side."""
        return jnp.concatenate([self.layers[tap] for tap in taps], -1)


@dataclasses.dataclass(frozen=True, eq=False)  # one is another's equal only if it is the same
class Case:
    """A drafter beside its target.

    Attributes:
      experiment: with the target that is asked about, also if the workdir was made with another.
      run: the training run whose drafter it is; empty: the workdir has none.
      path: of the drafter's files; None: there are none.
      given: whether the user named these files; else they are the workdir's own export.
    """

    experiment: Experiment
    run: str
    path: pathlib.Path | None
    given: bool

    @functools.cached_property
    def file(self) -> file.File:
        """The drafter's files as they are."""
        if self.path is None:
            raise UserError(
                f"the workdir has no exported files of the run {self.run!r}; export it, or name files with "
                "--drafter"
            )
        return file.look(self.path)

    @functools.cached_property
    def imported(self) -> Imported:
        """The drafter in its files."""
        return self.file.imported(self.experiment.target.config, self.experiment.fingerprint)

    @functools.cached_property
    def about_checkpoint(self) -> dict[str, Any]:
        """What the run's newest checkpoint notes."""
        where = drafters.directory(self.experiment.workdir, self.run)
        if not self.run or not where.exists():  # to open it would make it
            raise UserError(f"{self.experiment.workdir} has no checkpoint of the run {self.run!r}")
        store = drafters.checkpoints(self.experiment, self.run)
        try:
            return drafters.checked(store.about(), where)
        finally:
            store.close()

    @functools.cached_property
    def checkpoint(self) -> drafters.Trained:
        """The drafter that the run has left."""
        assert self.about_checkpoint
        return drafters.load(self.experiment, self.run)

    @functools.cached_property
    def trained(self) -> Subject:
        """The same, ready to run."""
        found, target = self.checkpoint, self.experiment.target.config
        weights = weights_of(found.params, self.experiment.target_params, jnp.asarray(found.vocab))
        return Subject(f"the run {self.run}", found.drafter, weights, target.taps)

    @functools.cached_property
    def served(self) -> Subject:
        """The drafter in its files, ready to run."""
        found = drafters.complete(self.experiment, self.imported, str(self.path))
        weights = weights_of(found.params, self.experiment.target_params, jnp.asarray(found.vocab))
        return Subject(str(self.path), found.drafter, weights, self.imported.taps)

    @property
    def examined(self) -> Subject:
        """The drafter in question: that of the files that the user named, or that of the run."""
        return self.served if self.given else self.trained

    @functools.cached_property
    def distances(self) -> dict[str, float]:
        """How far each parameter of the files is from the checkpoint's, as a share of its norm; infinite
        where one of them has none of that shape."""
        ours, theirs = (_named(params) for params in (self.checkpoint.params, self.imported.params))
        found = dict.fromkeys(sorted(ours | theirs), np.inf)
        for name in ours.keys() & theirs.keys():
            if ours[name].shape == theirs[name].shape:
                norm = max(float(np.linalg.norm(ours[name])), 1e-30)  # of zeros it is 0
                found[name] = float(np.linalg.norm(ours[name] - theirs[name])) / norm
        return found

    @functools.cached_property
    def strange(self) -> list[str]:
        """The parameters of the files that are not the checkpoint's."""
        most = _QUANTISED if self.file.is_gguf else _ROUNDED
        return [name for name, distance in self.distances.items() if not distance <= most]

    @property
    def stored_coarsely(self) -> bool:
        """Whether the files hold their matrices in a quantised type, of which the checkpoint has none."""
        return self.file.is_gguf and bool(np.median(list(self.distances.values())) > _ROUNDED)

    @functools.cached_property
    def kin(self) -> bool:
        """Whether the files are of the run's drafter: most parameters are the checkpoint's."""
        try:
            return len(self.strange) <= len(self.distances) / 2
        except UserError:
            return False

    @functools.cached_property
    def corpus(self) -> texts.Corpus:
        """The run's responses, training and held-out ones."""
        kept = features.opened(self.experiment)
        return texts.corpus(self.experiment.responses, kept, self.experiment.settings.data)

    @functools.cached_property
    def benchmarks(self) -> list[Benchmark]:
        """Those whose answers lie in the workdir."""
        asked = evaluate.prompts.load(
            self.experiment.settings.evaluate.prompts, "evaluate.prompts", warn=False
        )
        found = [evaluate.benchmark_of(self.experiment, name, of) for name, of in asked.items()]
        return [benchmark for benchmark in found if benchmark.directory.exists()]

    def require_own_texts(self) -> None:
        """Raises `UserError` unless the responses are the target's own, written greedily."""
        if "fingerprint" in experiments.changed(self.experiment):
            raise UserError("the responses were written by another target")
        if not self.experiment.settings.respond.greedy:
            raise UserError("the responses are not the target's own at temperature 0")

    def held_items(self) -> list[dict[str, Any]]:
        """Some held-out texts, as in `data.texts.Texts`."""
        held = self.corpus.held
        if not len(held):
            raise UserError("config.data.holdout is 0: no text was held out")
        return [held[i] for i in texts.spread(len(held), _TEXTS)]

    @functools.cached_property
    def held(self) -> Sample:
        """Some held-out texts, with all layers that a check asks for."""
        self.require_own_texts()
        items = self.held_items()
        start, end = np.array([texts.first_span(item["assistant"]) for item in items], np.int32).T
        end = np.minimum(end, start + _WRITTEN)
        tokens_BxT = features.pad_texts(
            [item["tokens"][:e] for item, e in zip(items, end, strict=True)], len(end)
        )
        target = self.experiment.target.config
        taps = set(target.taps)
        with contextlib.suppress(UserError):  # files that are not there, or that cannot be read
            taps |= set(self.imported.taps)
        wanted = {tap + step for tap in taps for step in (-1, 0, 1)}
        layers = tuple(sorted(tap for tap in wanted if 0 <= tap <= target.layers))
        reader = Target(dataclasses.replace(target, taps=layers))
        batch = partition.shard_batch({"tokens": tokens_BxT}, self.experiment.mesh)
        found = jnp.split(taps_of(reader, self.experiment.target_params, batch), len(layers), -1)
        return Sample(tokens_BxT, start, end, dict(zip(layers, found, strict=True)))


def _named(params: dict) -> dict[str, np.ndarray]:
    """Parameters by their paths, in memory."""
    leaves = jax.tree_util.tree_leaves_with_path(processes.host(params))
    return {partition.path_name(path): leaf for path, leaf in leaves}


def find(experiment: Experiment, run: str, drafter: str) -> Case:
    """The case that a user asks about.

    Args:
      experiment: of the workdir.
      run: of its training runs; empty: the one that is exported.
      drafter: files of a drafter; empty: those that the workdir has exported of the run.

    Raises:
      UserError: there is no such run, or there are no such files.
    """
    settings, named = experiment.settings, run or experiment.settings.exported()
    if run and run not in settings.train:
        raise ConfigError(f"--run: found {run!r}, expected one of {', '.join(settings.train)}")
    if drafter:
        place = files.path_of(drafter)
        is_file = drafter.endswith(".gguf") and place.is_file()
        found = place if is_file else directories.find(drafter, "drafter.path")
        if found is None:
            raise ConfigError(f"--drafter: no directory or .gguf file {drafter!r}")
        return Case(experiment, named, found, given=True)
    return Case(experiment, named, _exported(experiment, named), given=False)


def _exported(experiment: Experiment, run: str) -> pathlib.Path | None:
    """The files that the workdir has exported of a run, if it has."""
    manifest = files.read_json(experiment.workdir / "export" / "manifest.json") or {}
    server = experiment.settings.export.server
    place = experiment.workdir / "export" / server
    place = place / llamacpp.FILE if server == llamacpp.NAME else place
    return place if server and manifest.get("run") == run and place.exists() else None
