"""Files that are written whole or not at all, and read with a clear error where they are damaged."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes  # noqa: F401  (lets NumPy, and so safetensors, know bfloat16)
import safetensors

from ppow_jax.errors import UserError
from ppow_jax.parallel import processes


@contextlib.contextmanager
def open_safetensors(file: pathlib.Path, what: str) -> Iterator[safetensors.safe_open]:
    """A reader of NumPy arrays.

    Args:
      file: to read.
      what: is expected there, for the error.

    Raises:
      UserError: it is missing or truncated.
    """
    if not file.is_file():
        raise UserError(f"{file}: not there; expected {what}")
    try:
        with safetensors.safe_open(file, framework="numpy") as reader:
            yield reader
    except (safetensors.SafetensorError, OSError) as e:
        size = file.stat().st_size
        raise UserError(f"{file}: not a complete safetensors file ({size} bytes; {e}); fetch it again") from e


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file in one step; of several processes the first one does."""
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(path.name + ".tmp")
    scratch.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(scratch, path)


def read_json(path: pathlib.Path) -> Any:
    """The value of a JSON file, or None where there is no file.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path}: damaged ({e}); restore it, or delete it and run its stage again") from e
