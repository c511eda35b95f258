"""The rows of a file: JSON Lines, an array of JSON, both also in gzip, or Parquet.

A file's first bytes say which of them it is, not its name.
"""

import gzip
import io
import json
import stat
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ppow_jax.errors import UserError
from ppow_jax.parallel.files import path_of

FORMATS = "JSON Lines or a JSON array (both may be gzipped) or Parquet"
_SMALL, _RATIO = 2**26, 50  # bytes out of any file of gzip; bytes out of one byte
_GZIP, _PARQUET, _BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One object of a source.

    Attributes:
      place: where it stands, for messages: FILE:LINE, or FILE: row NUMBER where there are no lines.
      number: its own, counted from 1 over all rows.
      values: its fields.
    """

    place: str
    number: int
    values: dict[str, Any]


def read(path: str, key: str) -> list[Row]:
    """The rows of a file.

    Args:
      path: of the file; `~` is one's home.
      key: the config key that the path came from, for messages.

    Raises:
      UserError: no such file, one that cannot be read, or one that is not all objects; naming the line.
    """
    data = _bytes(path, key)
    if data.startswith(_GZIP):
        data = _unzipped(path, data)
    if data.startswith(_PARQUET):
        return list(_parquet(path, data))
    if data.removeprefix(_BOM).lstrip().startswith(b"["):
        return list(_array(path, data))
    return list(_lines(path, data))


def _bytes(path: str, key: str) -> bytes:
    try:
        file = path_of(path)
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "a pipe or a device, which can be read once only"
            raise UserError(f"{key}: {path!r} is {kind}; expected a file, {FORMATS}")
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{key}: no file {path!r}; expected {FORMATS}") from e
    except OSError as e:
        raise UserError(f"{key}: {path!r} cannot be read ({e.strerror}); mend its path or its rights") from e
    except ValueError as e:  # a NUL in the path
        raise UserError(f"{key}: {path!r} is no path ({e})") from e


def _unzipped(path: str, data: bytes) -> bytes:
    most = max(_SMALL, _RATIO * len(data))
    try:
        found = gzip.GzipFile(fileobj=io.BytesIO(data)).read(most + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise UserError(f"{path}: not a whole gzip file ({e}); write or fetch it again") from e
    if len(found) > most:
        raise UserError(
            f"{path}: found more than {most} bytes in {len(data)} of gzip, expected text, which shrinks "
            "less; unzip it, if it is to be trusted"
        )
    return found


def _lines(path: str, data: bytes) -> Iterator[Row]:
    number = 0
    for at, line in enumerate(io.BytesIO(data), 1):
        line = line.removeprefix(_BOM)  # also in the middle, where files were joined
        if line.strip():
            number += 1
            place = f"{path}:{at}"
            yield Row(place, number, _object(place, _value(line, path, at, place)))


def _array(path: str, data: bytes) -> Iterator[Row]:
    for number, value in enumerate(_value(data.removeprefix(_BOM), path, 1, path), 1):
        place = f"{path}: row {number}"
        yield Row(place, number, _object(place, value))


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {type(value).__name__}, expected an object")
    return value


def _value(data: bytes, path: str, line: int, place: str) -> Any:
    """The JSON that begins on a line; `place` is for errors that do not say where in it they are."""
    try:
        return json.loads(data.decode().rstrip(), object_pairs_hook=_fields)
    except UnicodeDecodeError as e:
        at = line + data.count(b"\n", 0, e.start)
        raise UserError(f"{path}:{at}: not UTF-8 text ({e.reason}); expected {FORMATS}, in UTF-8") from e
    except json.JSONDecodeError as e:
        where = f"{path}:{line + e.lineno - 1}: not JSON ({e.msg}: column {e.colno})"
        raise UserError(f"{where}; expected one object a line, or one array of objects") from e
    except RecursionError as e:
        raise UserError(f"{place}: brackets nested too deeply to be read; take the row out") from e
    except ValueError as e:  # a key twice; an integer of more digits than Python reads
        raise UserError(f"{place}: {str(e).partition(';')[0]}; mend the row or take it out") from e


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice in one object")
    return found


def _parquet(path: str, data: bytes) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as e:
        raise UserError(f"{path}: Parquet is read by pyarrow, which is missing; `pip install pyarrow`") from e
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(io.BytesIO(data)).iter_batches():
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{path}: row {number}", number, values)
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"{path}: not a whole Parquet file ({reason}); write or fetch it again") from e
