"""The directory that a path means, of a target or a drafter: here, or fetched from the Hugging Face hub."""

import pathlib
import re

from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel.files import path_of
from ppow_jax.targets import weights

CONFIG = "config.json"
_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")


def find(path: str, key: str) -> pathlib.Path | None:
    """The directory of Hugging Face files that a path means.

    Args:
      path: a directory, its config.json or weights, or `ORGANISATION/MODEL` of the hub; what lies here goes
        first.
      key: of the config that names it, for errors.

    Returns:
      The directory; None: it is another file, or nothing.

    Raises:
      UserError: a directory of something else, a file that cannot be read, or the hub does not give it.
    """
    try:
        found = path_of(path)
        if found.is_dir() and path:
            return _checked(found, path, key)
        if found.is_file():
            return _of_file(found, key)
        here = found.exists()
    except (OSError, ValueError) as e:  # no permission, a name too long
        reason = getattr(e, "strerror", None) or e
        raise ConfigError(f"config.{key}: cannot be read ({reason}): {path!r}; name another") from e
    named = re.fullmatch(r"\w[\w.-]*/[\w.-]+", path) and not path.endswith((".gguf", ".safetensors", ".json"))
    return _download(path, key) if named and not here else None


def _checked(directory: pathlib.Path, path: str, key: str) -> pathlib.Path:
    """The directory, if it holds a model.

    Raises:
      UserError: it does not; or it holds an adapter beside it.
    """
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"config.{key}: {path!r} holds a LoRA adapter (adapter_config.json), which is not applied; merge "
            "it into its model, or remove it"
        )
    if (directory / CONFIG).is_file():
        return directory
    expected = "expected a directory of Hugging Face files"
    if any((directory / name).exists() for name in _ORBAX):
        remedy = "name the directory of a server's files, such as WORKDIR/export/sglang"
        if key == "target.path":
            remedy = (
                "`python -m ppow_jax.convert` makes one with a target_manifest.json from the model's files"
            )
        raise UserError(
            f"config.{key}: {path!r} is an orbax checkpoint of something else, {expected}; {remedy}"
        )
    inside = sorted(p for p in directory.iterdir() if (p / CONFIG).is_file() or p.suffix == ".gguf")
    hint = f"; name {inside[0]}" if inside else ""
    raise UserError(f"config.{key}: {path!r} has no {CONFIG}; {expected}{hint}")


def _of_file(file: pathlib.Path, key: str) -> pathlib.Path | None:
    """The directory of a file that is part of one; None: it is none.

    Raises:
      UserError: the directory's weights are other files.
    """
    directory, name = file.parent, file.name
    if name in (CONFIG, weights.INDEX):
        return _checked(directory, str(directory), key)
    if file.suffix == ".safetensors":
        _checked(directory, str(directory), key)
        if name in weights.names(directory):
            return directory
        if not any((directory / known).is_file() for known in weights.names(directory)):
            raise ConfigError(f"config.{key}: {weights.instead(directory, 'weights')}")
        raise ConfigError(
            f"config.{key}: found {str(file)!r}, but the weights of that directory are "
            f"{', '.join(weights.names(directory)[:3])}; name the directory, or rename the file"
        )
    if weights.is_pickle(file):
        raise ConfigError(f"config.{key}: {weights.instead(directory, 'weights')}")
    return None


def _download(name: str, key: str) -> pathlib.Path:
    """The directory of a model of the Hugging Face hub.

    Raises:
      UserError: huggingface_hub is not installed, or the model cannot be fetched.
    """
    try:
        import huggingface_hub
    except ImportError as e:
        raise UserError(
            f"config.{key}: {name!r} is no directory here, and to fetch it from the Hugging Face hub wants "
            "`pip install 'ppow_jax[hub]'`"
        ) from e
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    try:
        fetched = pathlib.Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except Exception as e:  # no network, no such model, no access: as many kinds of error
        reason = str(e).strip().split("\n")[0]
        raise UserError(
            f"config.{key}: {name!r} cannot be fetched from the Hugging Face hub ({reason}); a local "
            "directory with the same files will do"
        ) from e
    return _checked(fetched, name, key)
