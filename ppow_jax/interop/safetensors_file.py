"""Safetensors files: opened, or said what is wrong with them."""

import contextlib
import pathlib
from collections.abc import Iterator

import ml_dtypes  # noqa: F401  (lets NumPy, and so safetensors, know bfloat16)
import safetensors

from ppow_jax.errors import UserError


@contextlib.contextmanager
def opened(file: pathlib.Path, what: str) -> Iterator[safetensors.safe_open]:
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
