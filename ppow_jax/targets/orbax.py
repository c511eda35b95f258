"""Targets as orbax checkpoints: every process of a mesh reads what it holds, without any conversion."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ppow_jax.models import fields
from ppow_jax.models.fields import Fields
from ppow_jax.models.layers import ACTIVATIONS
from ppow_jax.models.target import TargetConfig, abstract_params, with_taps
from ppow_jax.parallel import checkpoint, files, partition
from ppow_jax.targets.families import MOST_LAYERS
from ppow_jax.targets.tokenizer import Tokenizer
from ppow_jax.targets.tokenizer_files import read_core

WRITTEN = _MANIFEST, _TOKENIZER, _PARAMS = "target_manifest.json", "tokenizer.json", "params"


def save(directory: pathlib.Path, config: TargetConfig, params: dict, tokens: Tokenizer) -> None:
    """Writes shape, parameters and tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint.save_params(directory / _PARAMS, jax.tree.map(jnp.asarray, params))
    tokens.core.save(str(directory / _TOKENIZER))
    kept = {key: getattr(tokens, key) for key in ("template", "stop_ids", "variables")}
    files.write_json(
        directory / _MANIFEST, {"format": 1, "shape": dataclasses.asdict(config), "tokenizer": kept}
    )


def find(path: str) -> pathlib.Path | None:
    """The directory that `save` wrote, also by the name of its manifest, or None."""
    try:
        found = files.path_of(path)
        directory = found.parent if found.name == _MANIFEST else found
        return directory if (directory / _MANIFEST).is_file() else None
    except (OSError, ValueError):  # said where the path is looked for next
        return None


def load(
    directory: pathlib.Path, dtype: str, mesh: Mesh, taps: tuple[int, ...] | None = None
) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, with the taps of `with_taps`, parameters on the mesh, and tokenizer.

    Raises:
      UserError: damaged, or made by another version.
    """
    manifest = fields.read(directory / _MANIFEST, "what `python -m ppow_jax.convert` wrote")
    manifest.of = "a converted target"
    if manifest.whole("format") != 1:
        raise manifest.wrong("format", "1; convert again")
    config = with_taps(_shape(manifest.part("shape"), dtype), taps)
    like = partition.laid_out(abstract_params(config), mesh)
    params = checkpoint.load_params(directory / _PARAMS, like)
    return config, params, _tokenizer(directory, manifest.part("tokenizer"))


def _shape(c: Fields, dtype: str) -> TargetConfig:
    """The decoder's shape, whose every field is of its type."""
    readers: dict[Any, Callable] = {
        int: lambda key, default: c.whole(key, default, least=0),
        float: lambda key, default: c.number(key, default, zero=True),
        bool: c.flag,
        str: c.text,
        tuple[int, ...]: lambda key, default: c.listed(key, int, default=default),
        tuple[float, ...]: lambda key, default: c.listed(key, float, default=default),
    }
    found = {}
    for field in dataclasses.fields(TargetConfig):
        default = fields.REQUIRED if field.default is dataclasses.MISSING else field.default
        found[field.name] = readers[field.type](field.name, default)
    c.rest(lambda key: False)
    config = TargetConfig(**found | {"dtype": dtype})
    fits = {
        **{
            key: found[key] > 0
            for key in ("vocab_size", "width", "heads", "kv_heads", "mlp_hidden", "context")
        },
        "layers": 0 < config.layers <= MOST_LAYERS,
        "head_size": config.head_size > 0 and config.head_size % 2 == 0,
        "spans": len(config.spans) in (0, config.layers),
        "rope_divisors": len(config.rope_divisors) in (0, config.head_size // 2),
        "activation": config.activation in ACTIVATIONS,
    }
    for key, fit in fits.items():
        if not fit:
            raise c.wrong(key, "what fits the rest of the shape; convert again")
    if config.heads % config.kv_heads:
        raise c.wrong("kv_heads", f"a divisor of heads, {config.heads}; convert again")
    return config


def _tokenizer(directory: pathlib.Path, kept: Fields) -> Tokenizer:
    core, _ = read_core(directory / _TOKENIZER)
    if kept.given("variables"):
        variables = kept.part("variables").values
    else:  # of an older version
        variables = {f"{name}_token": text for name in ("bos", "eos") if (text := kept.text(name, ""))}
    return Tokenizer(core, kept.text("template"), kept.listed("stop_ids", int), variables)
