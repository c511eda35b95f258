"""The target that a config names, wherever it comes from."""

import dataclasses

from jax.sharding import Mesh

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models.target import TargetConfig, with_taps
from ppow_jax.settings import TargetSettings
from ppow_jax.targets import chat, gguf, huggingface, markov, orbax, tokenizer_files, tokenizer_gguf
from ppow_jax.targets.tokenizer import Tokenizer, with_stops


def load(settings: TargetSettings, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, parameters (on the mesh already, or host arrays) and tokenizer of the target that is named.

    Raises:
      UserError: it is not there, broken, or of two models; or `target.taps` are not among its layers.
    """
    variables = chat.variables(settings.template_variables, "config.target.template_variables")
    config, params, tokens = read(settings.path, settings.dtype, mesh, settings.taps)
    tokens = dataclasses.replace(tokens, variables=dict(tokens.variables) | variables)
    return config, params, with_stops(tokens)


def read(
    path: str, dtype: str, mesh: Mesh, taps: tuple[int, ...] | None = None
) -> tuple[TargetConfig, dict, Tokenizer]:
    """As `load`, without variables of templates; for the taps see `models.target.with_taps`."""
    if path.startswith("markov:"):
        seed = path.removeprefix("markov:")
        if not (seed.isascii() and seed.isdigit()):
            raise ConfigError(f"config.target.path: found {path!r}, expected 'markov:SEED'")
        config, params, tokens = markov.build(int(seed), dtype)
        config = with_taps(config, taps)
    elif directory := orbax.find(path):
        config, params, tokens = orbax.load(directory, dtype, mesh, taps)
    elif directory := huggingface.find(path):
        config, params = huggingface.load(directory, dtype, mesh, taps)
        tokens = tokenizer_files.read(directory)
    else:
        config, params, metadata = gguf.load(path, dtype, taps)
        tokens = tokenizer_gguf.from_gguf(metadata, path)
    return config, params, _fitting(tokens, config.vocab_size, path)


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
    return dataclasses.replace(tokens, rows=rows, model=path)
