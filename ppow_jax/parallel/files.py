"""Files that are written whole or not at all, and read with a clear error where they are damaged."""

import json
import os
import pathlib
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.parallel import processes


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
