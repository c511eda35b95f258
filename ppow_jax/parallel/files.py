"""Directories as users name them, and files that are written whole or not at all and read with a clear error
where they are damaged."""

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.parallel import processes


def path_of(name: str) -> pathlib.Path:
    """A path as a user wrote it: `~` is the home directory."""
    return pathlib.Path(os.path.expanduser(name))  # pathlib's own raises an error where there is no such user


def directory(name: str | pathlib.Path, where: str) -> pathlib.Path:
    """A directory to write to, made if need be; `~` is the home directory.

    Args:
      name: as a user gave it.
      where: the flag or key that has it, for the error.

    Raises:
      UserError: it is a URL, a file, no text, or cannot be made.
    """
    name = str(name)
    if re.match(r"[A-Za-z][\w+.-]+:/", name):
        raise UserError(
            f"{where}: found the URL {name!r}, expected a directory; mount the storage and name where"
        )
    path = path_of(name)
    try:
        name.encode()
        path.mkdir(parents=True, exist_ok=True)
    except UnicodeEncodeError as e:
        raise UserError(f"{where}: found the name {name!r}, expected one in UTF-8; rename it") from e
    except OSError as e:
        is_file = path.is_file() if isinstance(e, FileExistsError) else False
        why = "it is a file, expected a directory" if is_file else f"it cannot be made: {e.strerror}"
        raise UserError(f"{where}: {name!r}: {why}; name another directory") from e
    return path


@contextlib.contextmanager
def held(path: pathlib.Path, where: str) -> Iterator[None]:
    """Keeps another run of this machine out of a directory; of several processes the first one does.

    Raises:
      UserError: one is at work there.
    """
    if not processes.first():
        yield
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(handle)
        raise UserError(
            f"{where}: another run is at work in {str(path)!r}; wait for its end, or name another one"
        ) from e
    except OSError:
        pass  # some file systems know no locks
    try:
        yield
    finally:
        os.close(handle)


def require_writable(path: pathlib.Path, where: str) -> None:
    """Tries whether files can be written in a directory.

    Args:
      path: the directory.
      where: the flag or key that has it, for the error.

    Raises:
      UserError: they cannot.
    """
    try:
        with tempfile.TemporaryFile(dir=path) as scratch:
            scratch.write(bytes(4096))
    except OSError as e:
        raise UserError(
            f"{where}: {str(path)!r} cannot be written ({e.strerror}); free it, or name another directory"
        ) from e


def require_room(path: pathlib.Path, needed: int, what: str) -> None:
    """Compares the bytes that are to be written to a directory, which need not be there, with the free ones.

    Raises:
      UserError: there are too few.
    """
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{path}: found {free / 1e9:.3g} GB free, expected {needed / 1e9:.3g} GB or more for {what}; "
            "make room, or use another disk"
        )


def sha256(path: pathlib.Path) -> str:
    """Names the content of a file.

    Raises:
      OSError: it cannot be read.
    """
    about = path.stat()
    return _sha256(path.absolute(), about.st_size, about.st_mtime_ns)


@functools.cache
def _sha256(path: pathlib.Path, size: int, modified: int) -> str:
    """Of a file of this size that was changed then: read once for all that ask."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Replaces a JSON file in one step; of several processes the first one does."""
    if not processes.first():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what takes the place of a file when it is whole; of a failure nothing stays behind."""
    scratch = path.with_name(path.name + ".tmp")
    try:
        yield scratch
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read_json(path: pathlib.Path) -> Any:
    """The value of a JSON file, or None where there is no file.

    Raises:
      UserError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({e}); restore it, or delete it and run its stage again") from e
