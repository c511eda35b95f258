"""The target that a config names, wherever it comes from."""

import dataclasses

from jax.sharding import Mesh

from ppow_jax.config import TargetSettings
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models.target import TargetConfig
from ppow_jax.targets import chat, gguf, huggingface, markov, orbax, tokenizer_files, tokenizer_gguf
from ppow_jax.targets.tokenizer import Tokenizer, with_stops


def load(settings: TargetSettings, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, parameters (on the mesh already, or host arrays) and tokenizer of the target that is named.

    Raises:
      UserError: it is not there, broken, or of two models; or `target.taps` are not among its layers.
    """
    variables = chat.variables(settings.template_variables, "config.target.template_variables")
    if settings.path.startswith("markov:"):
        seed = settings.path.removeprefix("markov:")
        if not seed.isdigit():
            raise ConfigError(f"config.target.path: found {settings.path!r}, expected 'markov:SEED'")
        config, params, tokens = markov.build(int(seed), settings.dtype)
    elif directory := orbax.find(settings.path):
        config, params, tokens = orbax.load(directory, settings.dtype, mesh)
    elif directory := huggingface.find(settings.path):
        config, params = huggingface.load(directory, settings.dtype, mesh)
        tokens = tokenizer_files.read(directory)
    else:
        config, params, metadata = gguf.load(settings.path, settings.dtype)
        tokens = tokenizer_gguf.from_gguf(metadata, settings.path)
    tokens = _fitting(tokens, config.vocab_size, settings.path)
    tokens = with_stops(dataclasses.replace(tokens, variables=dict(tokens.variables) | variables))
    return _with_taps(config, settings.taps), params, tokens


def _fitting(tokens: Tokenizer, rows: int, path: str) -> Tokenizer:
    """The tokenizer for an embedding of so many rows.

    Added tokens may have ids beyond it, as long as no text has one.

    Raises:
      UserError: other tokens have.
    """
    added = tokens.core.get_added_tokens_decoder()
    ids = tokens.core.get_vocab(with_added_tokens=False).values()
    highest = max((i for i in ids if i not in added), default=0)
    if highest >= rows:
        raise UserError(
            f"{path}: the tokenizer has the id {highest}, expected ids below {rows}, the rows of the "
            "embedding; the files are of two models"
        )
    return dataclasses.replace(tokens, rows=rows)


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
