"""The target that a config names, wherever it comes from."""

from jax.sharding import Mesh

from ppow_jax.config import TargetSettings
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.models.target import TargetConfig, with_taps
from ppow_jax.targets import gguf, huggingface, markov, orbax, tokenizer
from ppow_jax.targets.tokenizer import Tokenizer


def load(settings: TargetSettings, mesh: Mesh) -> tuple[TargetConfig, dict, Tokenizer]:
    """Shape, parameters (on the mesh already, or host arrays) and tokenizer of the target that is named.

    Raises:
      UserError: it is not there, broken, or of two models; or `target.taps` are not among its layers.
    """
    return read(settings.path, settings.dtype, mesh, settings.taps)


def read(
    path: str, dtype: str, mesh: Mesh, taps: tuple[int, ...] | None = None
) -> tuple[TargetConfig, dict, Tokenizer]:
    """As `load`; for the taps see `models.target.with_taps`."""
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
        tokens = huggingface.tokenizer(directory)
    else:
        config, params, metadata = gguf.load(path, dtype, taps)
        tokens = tokenizer.from_gguf(metadata)
    if tokens.size > config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {tokens.size} ids, expected at most {config.vocab_size}, "
            "the rows of the embedding; the files are of two models"
        )
    return config, params, tokens
