"""Directories as users name them, and files that are written whole or not at all."""

import errno
import os
import pathlib
import tempfile

import pytest

from ppow_jax.data import records, rows
from ppow_jax.errors import UserError
from ppow_jax.parallel import files, partition
from ppow_jax.settings import TargetSettings
from ppow_jax.targets.load import load


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gs://bucket/run", "found the URL 'gs://bucket/run', expected a directory; mount"),
        ("gs:/bucket/run", "found the URL"),  # as pathlib has it
        ("file", "'file': it is a file, expected a directory"),
        ("file/below", "'file/below': it cannot be made: Not a directory"),
        ("nowhere", "'nowhere': it cannot be made: File exists"),  # a link to nothing
        ("x" * 300, "it cannot be made: File name too long"),
        (os.fsdecode(b"\xff"), "expected one in UTF-8"),
    ],
)
def test_a_name_that_cannot_be_a_directory_is_one_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("file").write_text("kept")
    pathlib.Path("nowhere").symlink_to("gone")
    with pytest.raises(UserError) as caught:
        files.directory(name, "--workdir")
    assert str(caught.value).startswith("--workdir: ") and message in str(caught.value)
    assert sorted(os.listdir()) == ["file", "nowhere"] and pathlib.Path("file").read_text() == "kept"


def test_a_directory_is_made_with_those_above_it_and_the_home_directory_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert files.directory("~/a b/[1]/", "--out") == tmp_path / "a b" / "[1]"
    assert (tmp_path / "a b" / "[1]").is_dir()
    assert files.directory("~nobody-of-that-name", "--out").is_dir()  # a name like any other


def test_a_home_directory_of_nobody_is_a_name_like_any_other(tmp_path):
    """pathlib ends in an error of its own."""
    name = "~nobody-of-that-name/x"
    assert files.path_of(name) == pathlib.Path(name)
    with pytest.raises(UserError, match=r"no file '~nobody-of-that-name/x'"):
        rows.read(name, "respond.responses")
    for target in (name, f"{name}.gguf"):
        with pytest.raises(UserError, match="~nobody-of-that-name"):
            load(TargetSettings(target, "float32", ()), partition.make_mesh((1, 1, 1)))


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_directory_that_cannot_be_written_is_found(tmp_path, monkeypatch, number):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    files.require_writable(tmp_path, "--workdir")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=rf"--workdir: '.*' cannot be written \({os.strerror(number)}\)"):
        files.require_writable(tmp_path, "--workdir")


def test_two_runs_do_not_share_a_directory(tmp_path):
    refused = pytest.raises(UserError, match="another run is at work in")
    with files.held(tmp_path, "--workdir"), refused, files.held(tmp_path, "--workdir"):
        pass
    with files.held(tmp_path, "--workdir"):  # it has ended
        pass
    assert list(tmp_path.iterdir()) == []


def test_room_on_the_disk_is_asked_for_before_the_directory_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", Disk(2_000_000_000))
    files.require_room(tmp_path / "a" / "b", 2_000_000_000, "features")
    with pytest.raises(
        UserError, match=r"b: found 2 GB free, expected 3.5 GB or more for features; make room"
    ):
        files.require_room(tmp_path / "a" / "b", 3_500_000_000, "features")
    assert list(tmp_path.iterdir()) == []


class Disk:
    """With so many bytes free, wherever one asks."""

    def __init__(self, free: int) -> None:
        self.free = free

    def __call__(self, path: pathlib.Path) -> "Disk":
        assert path.exists()
        return self


def test_a_file_is_known_by_its_content(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("a")
    other.write_text("a")
    assert files.sha256(one) == files.sha256(other)
    before = one.stat()
    one.write_text("b")  # as long, and a moment later
    os.utime(one, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert files.sha256(one) != files.sha256(other)


def test_what_fails_leaves_what_was_there_and_nothing_half(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(OSError, match="full"), files.replacing(path) as scratch:
        scratch.write_text("half")
        raise OSError(errno.ENOSPC, "full")
    assert files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_shard_that_the_disk_has_no_room_for_is_one_line_and_not_there(tmp_path, monkeypatch):
    class Full:
        def __init__(self, path: str, _: str) -> None:
            pathlib.Path(path).write_bytes(b"half")

        def write(self, _: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device; writing x.tmp; at byte 1048576")

    monkeypatch.setattr(records.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(
        UserError, match=r"a\.arrayrecord: cannot be written \(write\(\) failed: No space left on"
    ):
        records.write_shard(tmp_path, "a", [{"x": 1}])
    assert list(tmp_path.iterdir()) == []
