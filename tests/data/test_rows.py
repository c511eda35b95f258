"""Rows of files: what they may be, and how what is broken is named, with its line."""

import errno
import gzip
import json
import os
import pathlib
import sys

import pytest

from ppow_jax.data import rows
from ppow_jax.errors import UserError

KEY = "respond.prompts"
ROWS = [{"id": "é", "turns": ["a\nb"]}, {"turns": ["c"], "score": 1.5}]
LINES = "\n\n".join(json.dumps(row) for row in ROWS).encode()  # with an empty line between
ARRAY = json.dumps(ROWS, indent=1, ensure_ascii=False).encode()
BOM = b"\xef\xbb\xbf"


def read(path: pathlib.Path, content: bytes) -> list[rows.Row]:
    path.write_bytes(content)
    return rows.read(str(path), KEY)


def refusal(path: pathlib.Path | str) -> str:
    """The message that a file is refused with; one line."""
    with pytest.raises(UserError) as caught:
        rows.read(str(path), KEY)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [LINES, LINES + b"\r\n", LINES.replace(b"\n", b"\r\n"), BOM + LINES, gzip.compress(BOM + LINES)],
    ids=["plain", "ends with a line's end", "CRLF", "BOM", "gzip"],
)
def test_json_lines(tmp_path, content):
    path = tmp_path / "any.name"
    assert read(path, content) == [(f"{path}:1", 1, ROWS[0]), (f"{path}:3", 2, ROWS[1])]


@pytest.mark.parametrize("content", [ARRAY, b" \n" + ARRAY, BOM + ARRAY, gzip.compress(ARRAY, mtime=0)])
def test_an_array(tmp_path, content):
    path = tmp_path / "p.jsonl"
    assert read(path, content) == [(f"{path}: row 1", 1, ROWS[0]), (f"{path}: row 2", 2, ROWS[1])]


def test_files_that_were_joined(tmp_path):
    assert len(read(tmp_path / "p.jsonl", BOM + b'{"a": 1}\n' + BOM + b'{"a": 2}')) == 2


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    same = [{"id": None, "score": None} | row for row in ROWS]
    parquet.write_table(pyarrow.Table.from_pylist(same), path)
    assert rows.read(str(path), KEY) == [(f"{path}: row 1", 1, same[0]), (f"{path}: row 2", 2, same[1])]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refusal(path).startswith(f"{path}: not a whole Parquet file (")


def test_parquet_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "p").write_bytes(b"PAR1")
    assert refusal(tmp_path / "p").endswith("which is missing; `pip install pyarrow`")


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"turns": ["a"]}\n{"turns": \n',
            ":2: not JSON (Expecting value: column 10); expected one object a",
        ),
        (b'{"turns": ["a"]} {"turns": ["b"]}\n', ":1: not JSON (Extra data: column 18)"),
        (b'{\n "turns": ["a"]\n}\n', ":1: not JSON (Expecting property name"),
        (b'{"turns": ["a\x01"]}', ":1: not JSON (Invalid control character at: column 14)"),
        (b'[\n{"a": 1},\n{"a": 2}\n', ":3: not JSON (Expecting ',' delimiter: column 9)"),
        (b'["a"]\n["b"]\n', ":2: not JSON (Extra data: column 1); expected one object a line, or one array"),
        (b'[{"a": 1}, "b"]', ": row 2: found str, expected an object"),
        (b'{"a": 1}\n\n3\n', ":3: found int, expected an object"),
        (b'{"a": 1}\n{"b": "\xff\xfe"}\n', ":2: not UTF-8 text (invalid start byte); expected JSON Lines or"),
        (b'[{"a": 1},\n\n{"b": "\xff\xfe"}]\n', ":3: not UTF-8 text"),
        ('{"a": 1}'.encode("utf-16"), ":1: not UTF-8 text"),
        (b'{"a": 1}\n{"b": ' + DEEP + b"}", ":2: brackets nested too deeply to be read; take the row out"),
        (DEEP, ": brackets nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", ":1: Exceeds the limit (4300 digits) for integer string conversion"),
        (
            b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}',
            ":2: the key 'c' occurs twice in one object; mend the row",
        ),
        (gzip.compress(LINES, mtime=0)[:-9], ": not a whole gzip file (Compressed file ended before"),
        (b"\x1f\x8bno gzip", ": not a whole gzip file ("),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_broken_files_are_named_with_the_line(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{message}")


def test_numbers_that_are_none_are_read_where_nobody_uses_them(tmp_path):
    (row,) = read(tmp_path / "p", b'{"turns": ["a"], "score": NaN, "other": 1e999}')
    assert row.values["turns"] == ["a"]


def test_what_is_no_file(tmp_path, monkeypatch):
    assert refusal(tmp_path).startswith(
        f"{KEY}: {str(tmp_path)!r} is a directory; expected a file, JSON Lines"
    )
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/null"):
        assert "is a pipe or a device, which can be read once only; expected a file" in refusal(path)
    for path in (tmp_path / "none", tmp_path / "fifo" / "x"):
        assert refusal(path).startswith(f"{KEY}: no file {str(path)!r}; expected JSON Lines")
    assert "cannot be read (File name too long)" in refusal("x" * 300)
    assert "is no path (embedded null byte)" in refusal("a\0b")
    assert "no file '~nobody-of-this-name/x'" in refusal("~nobody-of-this-name/x")

    def denied(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "mine").write_bytes(LINES)
    monkeypatch.setattr(pathlib.Path, "read_bytes", denied)  # root may read anything
    assert "cannot be read (Permission denied); mend its path or its rights" in refusal(tmp_path / "mine")


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_bytes(LINES)
    assert len(rows.read("~/p.jsonl", KEY)) == 2
