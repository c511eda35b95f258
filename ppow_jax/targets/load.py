"""The target that a config names, wherever it comes from."""

import dataclasses

from jax.sharding import Mesh

from ppow_jax.config import TargetSettings
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models.target import TargetConfig
from ppow_jax.targets import gguf, huggingface, markov, orbax, tokenizer
from ppow_jax.targets.tokenizer import Tokenizer


def load(settings: TargetSettings, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, parameters (on the mesh already, or host arrays) and tokenizer of the target that is named.

    Raises:
      UserError: it is not there, broken, or of two models; or `target.taps` are not among its layers.
    """
    config, params, tokens = read(settings.path, settings.dtype, mesh)
    return _with_taps(config, settings.taps), params, tokens


def read(path: str, dtype: str, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """As `load`, with the taps that the files name or that are usual; (): the target has too few layers.

    Raises:
      UserError: it is not there, broken, or of two models.
    """
    if path.startswith("markov:"):
        seed = path.removeprefix("markov:")
        if not (seed.isascii() and seed.isdigit()):
            raise ConfigError(f"config.target.path: found {path!r}, expected 'markov:SEED'")
        config, params, tokens = markov.build(int(seed), dtype)
    elif directory := orbax.find(path):
        config, params, tokens = orbax.load(directory, dtype, mesh)
    elif directory := huggingface.find(path):
        config, params = huggingface.load(directory, dtype, mesh)
        tokens = huggingface.tokenizer(directory)
    else:
        config, params, metadata = gguf.load(path, dtype)
        tokens = tokenizer.from_gguf(metadata)
    if tokens.size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokens.size} ids, expected at most {config.vocab_size}, "
            "the rows of the embedding; the files are of two models"
        )
    return config, params, tokens


def _with_taps(config: TargetConfig, taps: tuple[int, ...]) -> TargetConfig:
    """The target with other taps; none: its own."""
    n, taps = config.layers, taps or config.taps
    if not taps:
        raise ConfigError(
            f"config.target.taps: found none, expected some: a target of {n} layers is too shallow for the "
            f"usual (2, n // 2, n - 3); name them, ascending from 0 to {n}, such as "
            f"{tuple(sorted({0, n // 2, n}))}"
        )
    if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] > n:
        raise ConfigError(
            f"config.target.taps: found {taps}, expected ascending layers from 0 to {n}, "
            "the number of the target's"
        )
    return dataclasses.replace(config, taps=taps)
