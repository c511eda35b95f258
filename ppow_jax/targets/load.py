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
    if settings.path.startswith("markov:"):
        seed = settings.path.removeprefix("markov:")
        if not seed.isdigit():
            raise ConfigError(f"config.target.path: found {settings.path!r}, expected 'markov:SEED'")
        config, params, tokens = markov.build(int(seed), settings.dtype)
    elif directory := orbax.find(settings.path):
        config, params, tokens = orbax.load(directory, settings.dtype, mesh)
    elif directory := huggingface.find(settings.path):
        config, params = huggingface.load(directory, settings.dtype, mesh)
        tokens = huggingface.tokenizer(directory)
    else:
        config, params, metadata = gguf.load(settings.path, settings.dtype)
        tokens = tokenizer.from_gguf(metadata)
    if tokens.size > config.vocab_size:
        raise UserError(
            f"{settings.path}: the tokenizer has {tokens.size} ids, expected at most {config.vocab_size}, "
            "the rows of the embedding; the files are of two models"
        )
    return _with_taps(config, settings.taps), params, tokens


def _with_taps(config: TargetConfig, taps: tuple[int, ...]) -> TargetConfig:
    """The target with other taps; none: its own."""
    if not taps:
        return config
    if list(taps) != sorted(set(taps)) or taps[0] < 0 or taps[-1] > config.layers:
        raise ConfigError(
            f"config.target.taps: found {taps}, expected ascending layers from 0 to {config.layers}, "
            "the number of the target's"
        )
    return dataclasses.replace(config, taps=taps)
