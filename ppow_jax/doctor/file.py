"""A drafter's files as they are, also where they are wrong: what they say, before it is made sense of."""

import contextlib
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ppow_jax.drafters.files import dialects, llamacpp, reading
from ppow_jax.drafters.files.reading import Imported
from ppow_jax.errors import UserError
from ppow_jax.models import fields
from ppow_jax.models.target import TargetConfig, default_taps
from ppow_jax.targets import gguf_files, weights

_ANY = re.compile("")  # of names: tensors of any dtype may be looked at


class File(NamedTuple):
    """What the files of a drafter hold.

    Attributes:
      path: a directory of `config.json` and safetensors, or a GGUF file.
      is_gguf: which of them.
      values: the keys of `config.json`, or the metadata of the GGUF file.
      tensors: the shapes of all tensors, by their names.
      d2t: whole numbers `[N]` as they stand there; None: there are none.
      t2d: bool `[V]`, the mask of the draft vocabulary; None: there is none.
      fingerprint: of the target that it says it was trained with; empty: it does not say.
    """

    path: pathlib.Path
    is_gguf: bool
    values: Mapping[str, Any]
    tensors: Mapping[str, tuple[int, ...]]
    d2t: np.ndarray | None
    t2d: np.ndarray | None
    fingerprint: str

    def imported(self, target: TargetConfig, fingerprint: str) -> Imported:
        """The drafter, of whatever target the file says it is.

        Raises:
          UserError: it cannot be read.
        """
        read = llamacpp.read if self.is_gguf else reading.read
        return read(self.path, target, self.fingerprint or fingerprint)

    def taps(self, layers: int) -> dict[str, tuple[int, ...]]:
        """The target's layers whose inputs are read, by each server that loads files of these names.

        Args:
          layers: of the target.
        """
        if self.is_gguf:
            return {llamacpp.NAME: _numbers(self.values.get(f"{llamacpp.ARCHITECTURE}.target_layers"))}
        nested = self.values.get("eagle_config")
        outputs = _numbers(nested.get(dialects.IDS) if isinstance(nested, Mapping) else None)
        named = {
            "inputs": _numbers(self.values.get(dialects.IDS)),
            "outputs": tuple(layer + 1 for layer in outputs),
        }
        return {
            name: named.get(dialects.SERVERS[name].ids) or default_taps(layers) for name in self._servers()
        }

    @property
    def draft_tokens(self) -> int | None:
        """Rows of the head: how many draft ids there are. None: it has no head of its own."""
        shape = self.tensors.get("output.weight" if self.is_gguf else dialects.HEAD)
        return shape[0] if shape else None

    def _servers(self) -> list[str]:
        """The servers that know its names; by its layer alone where none knows its architecture."""
        layer = dialects.server_of(self.tensors).layer
        known = [name for name, server in dialects.SERVERS.items() if server.layer == layer]
        architectures = self.values.get("architectures") or []
        return [name for name in known if dialects.SERVERS[name].architecture in architectures] or known


def _numbers(value: Any) -> tuple[int, ...]:
    """A list of whole numbers; empty if it is none."""
    whole = isinstance(value, list | tuple) and all(type(v) is int for v in value)
    return tuple(value) if whole else ()


def look(path: pathlib.Path) -> File:
    """What the files of a drafter hold.

    Raises:
      UserError: they are not there, or damaged.
    """
    if path.suffix == ".gguf":
        metadata, tensors = gguf_files.read(path)
        d2t = np.asarray(tensors["d2t"].data).reshape(-1) if "d2t" in tensors else None
        shapes = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in tensors.items()}
        return File(path, True, metadata, shapes, d2t, None, metadata.get(llamacpp.FINGERPRINT, ""))
    if not path.is_dir():
        raise UserError(f"{path}: not there, expected a directory of EAGLE-3 files or a GGUF file")
    values = fields.read(path / "config.json", "an EAGLE-3 drafter's").values
    with contextlib.ExitStack() as stack:
        stored = weights.open_all(path, "the drafter's weights", stack, _ANY)
        lists = {
            name: stored[name].reader.get_tensor(name).reshape(-1) if name in stored else None
            for name in ("d2t", "t2d")
        }
        about = [(tensor.reader.metadata() or {}).get(dialects.FINGERPRINT) for tensor in stored.values()]
        shapes = {name: tuple(tensor.slices().get_shape()) for name, tensor in stored.items()}
    fingerprint = next(filter(None, about), "")
    return File(path, False, values, shapes, lists["d2t"], lists["t2d"], fingerprint)
