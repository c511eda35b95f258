"""Files as strangers make them: sound ones that are changed at random, and how a reader must end.

Hypothesis draws bytes, `Dice` makes changes of them, and they are made in memory. `Place` lays the files out,
has them read and puts back what was there.
"""

import copy
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import struct
import time
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hypothesis
import pytest
from dice import BYTES, Dice
from hypothesis import strategies as st

from ppow_jax.errors import UserError

SECONDS = 10  # of computing; a busy machine and the collector can make a moment of one
_BLOCKED = 60  # seconds that an example may take on the busiest machine
LONGEST = 700  # characters of an error
FAST, SLOW = 100, 10_000  # examples of a test, and of a kind of files

# Written as they are, where JSON's writer would refuse them.
_RAW = {
    "<deep list>": "[" * 100_000 + "]" * 100_000,
    "<deep object>": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "<open brackets>": "[" * 100_000,
    "<nested>": "[" * 500 + "]" * 500,  # Python reads it
    "<many digits>": "9" * 5000,
    "<too large>": "1e999",
    "<not a number>": "NaN",
    "<infinite>": "-Infinity",
}
_ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64,
    -(2**63),
    10**18, 10**30, 10**400, 0.0, -0.0, 0.5, 1e-308, 1e308, float("nan"), float("inf"), "", " ", "a", "0",
    "-1", "true",
    "x" * 5000, "\ud800", "\udfff\ud800", "\0", "a\nb", "\x1b[31m", "\u2028", "..", "../elsewhere.txt",
    "/etc/hostname",
    "a/../../b", "C:\\x", "é", "中文", "{{ 1 }}", [], [[]], [None], [1], ["a"], [1, "a"], {}, {"": {}},
    {"a": None}, *_RAW,
]  # fmt: skip


def _value(dice: Dice) -> Any:
    match dice.below(6):
        case 0:
            return dice.between(-(2**64), 2**64) >> dice.below(64)
        case 1:
            return dice.number()
        case 2:
            return dice.text(8)
        case 3:
            return [dice.of(_ODD) for _ in range(dice.below(4))]
        case 4:
            return {dice.text(3): dice.of(_ODD) for _ in range(dice.below(3))}
    return dice.of(_ODD)


class _Twice(str):
    """A key that an object may have beside the same one."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclasses.dataclass(frozen=True)
class Edit:
    """One of a JSON value: what is done at the end of a way down into it, which a number names."""

    way: int
    what: str
    value: Any

    def on(self, root: Any) -> Any:
        """The value after it."""
        parent, key, node, value, way = None, None, root, copy.deepcopy(self.value), self.way
        while isinstance(node, dict | list) and node:
            way, at = divmod(way, len(node) + 1)
            if at == len(node) and parent is not None:
                break
            parent, key = node, list(node)[at % len(node)] if isinstance(node, dict) else at % len(node)
            node = parent[key]
        if parent is None:
            return value if self.what == "replace" else _of_another_type(root)
        if self.what == "replace":
            parent[key] = value
        elif self.what == "retype":
            parent[key] = _of_another_type(node)
        elif self.what == "delete":
            del parent[key]
        elif self.what == "grow":
            parent[key] = (node * 2000)[:100_000] if isinstance(node, str) else [node] * 4
        elif isinstance(parent, list):  # twice or rename
            parent.insert(key, value if self.what == "rename" else node)
        elif self.what == "twice":
            parent[_Twice(key)] = value
        else:
            parent[value if isinstance(value, str) else f"{key}_"] = parent.pop(key)
        return root


def _of_another_type(value: Any) -> Any:
    match value:
        case bool():
            return int(value)
        case int() | float():
            return str(value)
        case str():
            return [value]
        case list():
            return {str(i): x for i, x in enumerate(value)}
        case dict():
            return list(value.items())
    return False


def edits(dice: Dice) -> list[Edit]:
    """One to three of them."""
    kinds = ("replace", "replace", "retype", "delete", "grow", "twice", "rename")
    return [Edit(dice.below(2**40), dice.of(kinds), _value(dice)) for _ in range(dice.between(1, 3))]


def dumped(value: Any) -> bytes:
    """JSON, or nearly."""
    text = json.dumps(value)
    for name, raw in _RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


@dataclasses.dataclass(frozen=True)
class Json:
    """Edits of a JSON file."""

    name: str
    edits: Sequence[Edit]

    def on(self, files: dict[str, Any]) -> None:
        """Changes the files."""
        if isinstance(files[self.name], bytes):
            files[self.name] = dumped(edited(_loaded(files[self.name]), self.edits))


@dataclasses.dataclass(frozen=True)
class Header(Json):
    """Edits of the header of a safetensors file; its length fits."""

    def on(self, files: dict[str, Any]) -> None:
        """Changes the files."""
        if isinstance(files[self.name], bytes):
            head, data = parted(files[self.name])
            files[self.name] = joined(dumped(edited(head, self.edits)), data)


def parted(file: bytes) -> tuple[Any, bytes]:
    """Header and data of a safetensors file."""
    end = 8 + int.from_bytes(file[:8], "little")
    return _loaded(file[8:end]), file[end:]


def joined(head: bytes, data: bytes) -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(head)) + head + data


def _loaded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # an earlier change
        return {}


def edited(value: Any, edits: Sequence[Edit]) -> Any:
    """A JSON value after edits."""
    for edit in edits:
        value = edit.on(value)
    return value


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A change of a file's bytes at a place, counted from its start or as a share of its length."""

    name: str
    what: str
    at: int
    size: int
    value: int

    def on(self, files: dict[str, Any]) -> None:
        """Changes the files."""
        data = files.get(self.name)
        if not isinstance(data, bytes):
            return
        at = self.at % (len(data) + 1)
        before, part, after = data[:at], data[at : at + self.size], data[at + self.size :]
        files[self.name] = {
            "flip": before + bytes(b ^ (self.value % 255 + 1) for b in part) + after,
            "cut": before + after,
            "end": before,
            "insert": before + self.value.to_bytes(8, "little")[: self.size] + part + after,
            "repeat": before + part * (self.value % 50) + after,
            "zero": before + bytes(len(part)) + after,
            "set": before + self.value.to_bytes(8, "little") + data[at + 8 :],
        }[self.what]


@dataclasses.dataclass(frozen=True)
class Entry:
    """Another kind of entry in place of a file."""

    name: str
    what: str

    def on(self, files: dict[str, Any]) -> None:
        """Changes the files."""
        files[self.name] = {"empty": b"", "null": b"null", "space": b" \n"}.get(self.what, self.what)


_SIZES = (0, 1, 2**31 - 1, 2**31, 2**32, 10**18, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ENTRIES = (
    "missing",
    "empty",
    "null",
    "space",
    "directory",
    "elsewhere",
    "nowhere",
    "itself",
    "folder",
    "device",
)


def _bytes(dice: Dice, names: Sequence[str]) -> Bytes:
    kinds = ("flip", "cut", "end", "insert", "repeat", "zero", "set")
    name, what, at = dice.of(names), dice.of(kinds), dice.below(dice.of((65, 2**20)))
    return Bytes(name, what, at, dice.below(17), dice.of((dice.of(_SIZES), dice.below(2**64))))


def changes(
    json_names: Sequence[str] = (), headers: Sequence[str] = (), others: Sequence[str] = ()
) -> Callable[[Dice], list[Any]]:
    """Up to two changes of a directory's files: of JSON, of safetensors, and of any other kind."""
    names = (*json_names, *headers, *others)
    kinds = ("bytes", "entry", *["json"] * 4 * bool(json_names), *["header"] * 4 * bool(headers))

    def change(dice: Dice) -> Any:
        match dice.of(kinds):
            case "bytes":
                return _bytes(dice, names)
            case "entry":
                return Entry(dice.of(names), dice.of(ENTRIES))
            case "json":
                return Json(dice.of(json_names), edits(dice))
        return Header(dice.of(headers), edits(dice))

    return lambda dice: [change(dice) for _ in range(dice.between(1, 2))]


class Place:
    """Where the files of examples lie: `here`, beside `elsewhere`, which no reader may change."""

    def __init__(self, root: pathlib.Path, files: Mapping[str, bytes]) -> None:
        self.root, self.files, self.here = root, dict(files), root / "here"
        self._elsewhere = root / "elsewhere"
        self._elsewhere.mkdir(parents=True)
        (self._elsewhere / "secret.txt").write_text("of somebody else")
        for name, data in self.files.items():
            self._lay(name, data)

    def _lay(self, name: str, entry: bytes | str) -> None:
        path = self.here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(entry, bytes):
            path.write_bytes(entry)
        elif entry == "directory":
            path.mkdir()
        elif entry != "missing":
            path.symlink_to({
                "elsewhere": self._elsewhere / "secret.txt", "nowhere": self._elsewhere / "nothing",
                "itself": path, "folder": self._elsewhere, "device": "/dev/zero",
            }[entry])  # fmt: skip

    def _listing(self) -> list[tuple]:
        found = []
        for directory, folders, names in os.walk(self.root):
            for name in (*folders, *names):
                about = os.lstat(os.path.join(directory, name))
                found.append((directory, name, about.st_mode, about.st_size, about.st_mtime_ns))
        return sorted(found)

    def hold(self, made: Sequence[Any], read: Callable[[pathlib.Path], Any], *names: str) -> None:
        """Lays out the changed files, has them read, and asserts that the reader ends as it must."""
        files = dict(self.files)
        for change in made:
            change.on(files)
        changed = [name for name in files if files[name] != self.files.get(name)]
        try:
            for name in changed:
                (self.here / name).unlink(missing_ok=True)
                self._lay(name, files[name])
            before = self._listing()
            ends(lambda: read(self.here), str(self.root), *names)
            assert self._listing() == before, "the reader has changed files"
        finally:
            for name in changed:
                path = self.here / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
                if name in self.files:
                    self._lay(name, self.files[name])


class _Blocked(Exception):
    """An example takes too long."""


def _stop(number: int, frame: Any) -> None:
    raise _Blocked


def ends(read: Callable[[], Any], *names: str) -> None:
    """Asserts that a reader returns or says in one line what is wrong, naming one of `names`, and soon."""
    begun, kept = time.thread_time(), signal.signal(signal.SIGALRM, _stop)
    signal.alarm(_BLOCKED)
    try:
        read()
    except UserError as e:
        said = str(e)
        assert 0 < len(said) <= LONGEST, f"{len(said)} characters: {said[:900]}"
        odd = {c for c in said if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")}
        assert not odd, f"{odd} in {said!r}"
        assert any(name in said for name in names), f"neither file nor key in {said!r}"
    except Exception:
        raise
    except BaseException as e:  # a panic of a library in Rust
        raise AssertionError(f"{type(e).__name__}: {e}") from e
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, kept)
    taken = time.thread_time() - begun
    assert taken < SECONDS, f"{taken:.1f} s of computing"


def counts(share: int = 1, fast: int = FAST) -> pytest.MarkDecorator:
    """The examples of a test: `fast` of them, and `SLOW // share` in the slow suite: the tests of one kind of
    files share its `SLOW` examples."""
    slow = pytest.param(SLOW // share, marks=pytest.mark.slow)
    return pytest.mark.parametrize("count", [fast, slow])


def examples(count: int, make: Callable[[Dice], Any], hold: Callable[[Any], None]) -> None:
    """Has `hold` hold for what is made of so many dice, always the same ones."""

    @hypothesis.settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,  # `ends` counts what the reader computes, however busy the machine is
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.binary(min_size=BYTES, max_size=BYTES))
    def holds(data: bytes) -> None:
        made = make(Dice(data))
        hypothesis.note(made)  # shown if it fails
        hold(made)

    holds()
