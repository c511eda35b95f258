"""Records in ArrayRecord shards: written whole or not at all, read at random."""

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import grain
from array_record.python import array_record_module
from flax import serialization

from ppow_jax.errors import UserError
from ppow_jax.parallel import files, processes

_SUFFIX = ".arrayrecord"


def write_shard(directory: pathlib.Path, name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows (dicts of arrays and plain values) as shard `name`; a kill leaves no half shard.

    Of several processes the first one writes.

    Raises:
      UserError: it cannot be written, as on a full disk.
    """
    if not processes.first():
        return
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}{_SUFFIX}"
    try:
        with files.replacing(path) as scratch:
            writer = array_record_module.ArrayRecordWriter(str(scratch), "group_size:1")
            for row in rows:
                writer.write(serialization.msgpack_serialize(row))
            writer.close()
    except RuntimeError as e:  # the library raises nothing more specific
        raise UserError(
            f"{path}: cannot be written ({str(e).split(';')[0]}); what is finished is kept: make room and "
            "run the same command again"
        ) from e


def shards(directory: pathlib.Path) -> list[str]:
    """Names of the complete shards, sorted."""
    return sorted(p.name.removesuffix(_SUFFIX) for p in directory.glob(f"*{_SUFFIX}"))


class Records:
    """All records of a directory, in the order of shard names."""

    def __init__(self, directory: pathlib.Path, names: Sequence[str] = ()) -> None:
        """Opens the shards, or only those named.

        Raises:
          UserError: there are none, or one is damaged.
        """
        self._paths = [str(directory / f"{name}{_SUFFIX}") for name in names or shards(directory)]
        if not self._paths:
            raise UserError(f"{directory}: no {_SUFFIX} files; run the stage that writes them first")
        try:
            self._source = grain.sources.ArrayRecordDataSource(self._paths)
        except RuntimeError as e:
            raise self._damaged(e) from e

    def __len__(self) -> int:
        return len(self._source)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        try:
            return serialization.msgpack_restore(self._source[index])
        except (RuntimeError, ValueError) as e:
            raise self._damaged(e) from e

    def _damaged(self, error: Exception) -> UserError:
        """Names the first shard that cannot be read."""
        for path in self._paths:
            try:
                source = grain.sources.ArrayRecordDataSource([path])
                for index in range(len(source)):
                    serialization.msgpack_restore(source[index])
            except (RuntimeError, ValueError):
                return UserError(
                    f"{path}: damaged; delete it, and the entry of the stage that wrote it in stages.json, "
                    "and run again: what is missing is made again"
                )
        return UserError(f"{self._paths[0]} and its like cannot be read: {error}")
