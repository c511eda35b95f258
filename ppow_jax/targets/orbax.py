"""Targets as orbax checkpoints: every process of a mesh reads what it holds, without any conversion."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers
from jax.sharding import Mesh

from ppow_jax.errors import UserError
from ppow_jax.models.target import TargetConfig, abstract_params
from ppow_jax.parallel import checkpoint, files, partition
from ppow_jax.targets.tokenizer import Tokenizer

_MANIFEST, _TOKENIZER, _PARAMS = "target_manifest.json", "tokenizer.json", "params"


def save(directory: pathlib.Path, config: TargetConfig, params: dict, tokens: Tokenizer) -> None:
    """Writes shape, parameters and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.save_params(directory / _PARAMS, jax.tree.map(jnp.asarray, params))
    tokens.core.save(str(directory / _TOKENIZER))
    kept = {key: getattr(tokens, key) for key in ("template", "stop_ids", "bos", "eos")}
    files.write_json(
        directory / _MANIFEST, {"format": 1, "shape": dataclasses.asdict(config), "tokenizer": kept}
    )


def find(path: str) -> pathlib.Path | None:
    """The directory that `save` wrote, or None."""
    directory = pathlib.Path(path).expanduser()
    return directory if (directory / _MANIFEST).is_file() else None


def load(directory: pathlib.Path, dtype: str, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, parameters on the mesh, and tokenizer.

    Raises:
      UserError: damaged, or made by another version.
    """
    manifest = files.read_json(directory / _MANIFEST)
    if manifest.get("format") != 1:
        raise UserError(f"{directory}: found format {manifest.get('format')!r}, expected 1; convert again")
    shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["shape"].items()}
    config = TargetConfig(**shape | {"dtype": dtype})
    like = partition.laid_out(abstract_params(config), mesh)
    params = checkpoint.load_params(directory / _PARAMS, like)
    kept = manifest["tokenizer"]
    core = tokenizers.Tokenizer.from_file(str(directory / _TOKENIZER))
    return (
        config,
        params,
        Tokenizer(core, kept["template"], tuple(kept["stop_ids"]), kept["bos"], kept["eos"]),
    )
