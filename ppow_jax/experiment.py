"""What every stage gets: settings, workdir, mesh and target."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ppow_jax.config import from_config
from ppow_jax.data import records
from ppow_jax.decode.sampling import GREEDY, Sampling
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models.target import Target, fingerprint
from ppow_jax.parallel import files, partition
from ppow_jax.settings import Settings
from ppow_jax.targets.load import load
from ppow_jax.targets.tokenizer import Tokenizer

_SMALL = (".json", ".jinja")  # files of a target that are known by their content
# Letters, digits, spaces and scripts that tokenizers treat in different ways.
_TEXT = (
    " Hello, WORLD!  It's 12345.67\n\tdef f(x):\r\n    return x  # \u00e9 e\u0301 \ufb01 \u65e5\u672c \u0645"
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What every stage needs; built once by `build`.

    Attributes:
      settings: the validated configuration.
      workdir: where everything is written.
      mesh: the devices, axes data, fsdp and tensor.
      target: the target's module.
      target_params: its parameters, on the mesh.
      tokenizer: its tokenizer and chat template.
      fingerprint: names the target's weights (see `models.target.fingerprint`).
    """

    settings: Settings
    workdir: pathlib.Path
    mesh: Mesh
    target: Target
    target_params: dict
    tokenizer: Tokenizer
    fingerprint: str

    def key(self, name: str, seed: int = 0) -> jax.Array:
        """The root random key of one purpose; `seed` is added to that of the settings."""
        return jax.random.fold_in(jax.random.key(self.settings.seed + seed), zlib.crc32(name.encode()))

    @property
    def sampling(self) -> Sampling:
        """That of `decode`."""
        given = self.settings.decode.sampling
        return Sampling(**dataclasses.asdict(given)) if given.temperature > 0 else GREEDY

    @functools.cached_property
    def responses(self) -> records.Records:
        """What `respond` wrote."""
        return records.Records(self.workdir / "responses")


def read_settings(workdir: pathlib.Path, where: str = "--workdir") -> Settings:
    """Those that a workdir was made with; `where` names the flag or argument that has it, for the error.

    Raises:
      ConfigError: it is no workdir.
      UserError: its config.json is damaged.
    """
    found = files.read_json(workdir / "config.json")
    if not (isinstance(found, dict) and "stages" in found):
        raise ConfigError(
            f"{where}: found no run in {str(workdir)!r}, expected a workdir (with the config.json of a run)"
        )
    return from_config(found)


def build(settings: Settings, workdir: pathlib.Path) -> Experiment:
    """Loads the target of a workdir onto the mesh.

    Raises:
      UserError: as `load_target`, or a workdir of another target.
    """
    made = load_target(settings, workdir)
    for key, (what, before, now) in changed(made).items():
        raise UserError(
            f"{workdir}: made with another {what} ({key} {before[:12]}, this one is {now[:12]}); use a new "
            "workdir or the old config.target.path"
        )
    return made


def changed(made: Experiment) -> dict[str, tuple[str, str, str]]:
    """What of the target is not as the workdir was made with: its name, what it was and what it is, by the
    key of `target.json`."""
    now, before = _about_target(made), files.read_json(made.workdir / "target.json") or {}
    named = {"fingerprint": "target", "tokenizer": "tokenizer or chat template"}
    return {
        key: (what, before[key], now[key])
        for key, what in named.items()
        if before.get(key, now[key]) != now[key]
    }


def load_target(settings: Settings, workdir: pathlib.Path) -> Experiment:
    """Loads the target onto the mesh; the workdir is not looked at.

    Raises:
      UserError: a missing or broken file, or an impossible mesh.
    """
    mesh = partition.make_mesh(settings.mesh.shape)
    config, params, tokens = load(settings.target, mesh)
    params = partition.shard(params, mesh)
    require_finite(params, f"config.target.path: {settings.target.path!r}")
    return Experiment(settings, workdir, mesh, Target(config), params, tokens, fingerprint(config, params))


def keep_target(made: Experiment) -> None:
    """Notes in the workdir which target it is made with."""
    shape = dataclasses.asdict(made.target.config)
    files.write_json(made.workdir / "target.json", _about_target(made) | {"shape": shape})


def _about_target(made: Experiment) -> dict[str, str]:
    path = made.settings.target.path
    about = {"path": path, "files": target_files(path), "fingerprint": made.fingerprint}
    return about | {"tokenizer": _tokenizer_sha256(made.tokenizer)}


def target_files(path: str) -> str:
    """Names what a look at a target's files tells: the content of small ones, the size of its weights; empty:
    it is no file or directory here."""
    place = files.path_of(path)
    if not place.exists():
        return ""
    found = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
    known = [[p.name, p.stat().st_size, p.suffix in _SMALL and files.sha256(p)] for p in found]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def require_finite(params: dict, where: str) -> None:
    """Raises `UserError` if a parameter holds NaN or infinity; the message begins with `where`."""
    for path, values in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.isfinite(values).all():
            name = partition.path_name(path)
            raise UserError(f"{where}: {name} holds values that are not finite; fetch or convert it again")


def _tokenizer_sha256(tokens: Tokenizer) -> str:
    """Names what turns conversations into ids: the vocabulary, the template, and how a text is cut."""
    vocab = sorted(tokens.core.get_vocab(with_added_tokens=True).items())
    known = [vocab, tokens.encode(_TEXT), tokens.template, dict(tokens.variables), tokens.stop_ids]
    return hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()


def exact(experiment: Experiment) -> Experiment:
    """The experiment with a target that computes in float32, whatever its weights are stored in.

    Passes of any number of tokens then differ by float32 rounding only (`decode.exact`).
    """
    config = dataclasses.replace(experiment.target.config, dtype="float32")
    return dataclasses.replace(experiment, target=Target(config))
