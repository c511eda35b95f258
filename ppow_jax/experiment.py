"""What every stage gets: settings, workdir, mesh and target."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import zlib

import jax
from jax.sharding import Mesh

from ppow_jax.data import records
from ppow_jax.errors import UserError
from ppow_jax.models.target import Target, fingerprint
from ppow_jax.parallel import files, partition
from ppow_jax.settings import Settings
from ppow_jax.targets.load import load
from ppow_jax.targets.tokenizer import Tokenizer

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

    @functools.cached_property
    def responses(self) -> records.Records:
        """What `respond` wrote."""
        return records.Records(self.workdir / "responses")


def build(settings: Settings, workdir: pathlib.Path) -> Experiment:
    """Loads the target onto the mesh.

    Raises:
      UserError: a missing or broken file, an impossible mesh, or a workdir of another target.
    """
    mesh = partition.make_mesh(settings.mesh.shape)
    config, params, tokens = load(settings.target, mesh)
    params = partition.shard(params, mesh)
    name = fingerprint(config, params)
    about = {"path": settings.target.path, "fingerprint": name, "tokenizer": _tokenizer_sha256(tokens)}
    before = files.read_json(workdir / "target.json") or {}
    for key, what in (("fingerprint", "target"), ("tokenizer", "tokenizer or chat template")):
        if before.get(key, about[key]) != about[key]:
            raise UserError(
                f"{workdir}: made with another {what} ({key} {before[key][:12]}, this one is "
                f"{about[key][:12]}); use a new workdir or the old config.target.path"
            )
    files.write_json(workdir / "target.json", about | {"shape": dataclasses.asdict(config)})
    return Experiment(settings, workdir, mesh, Target(config), params, tokens, name)


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
