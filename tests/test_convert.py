"""A target becomes an orbax checkpoint, wherever that is to lie, and nothing else is touched."""

import pathlib
import types

import jax
import numpy as np
import pytest
import runs

from ppow_jax import convert
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.parallel import files, partition
from ppow_jax.settings import TargetSettings
from ppow_jax.targets.load import load


@pytest.fixture
def command(monkeypatch):
    """The command with a target and a place to write."""

    def run(target: str, out: str) -> None:
        for flag, value in (("_TARGET", target), ("_OUT", out), ("_DTYPE", "float32")):
            monkeypatch.setattr(convert, flag, types.SimpleNamespace(value=value))
        convert.main(["convert"])

    return run


@pytest.mark.parametrize("name", ["conv[1]", "~/conv", "a b/c\\d"])
def test_what_is_converted_is_the_same_target(tmp_path, monkeypatch, command, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    mesh = partition.make_mesh((1, 1, 1))
    for target in ("markov:0", "markov:1"):  # the second over the first
        command(target, name)
        config, params, tokens = load(TargetSettings(name, "float32", ()), mesh)
        want, expected, _ = load(TargetSettings(target, "float32", ()), mesh)
        assert config == want and tokens.encode("ab")
        jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_directory_with_other_files_is_left_alone(tmp_path, command, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    before = runs.digest(tmp_path)
    monkeypatch.setattr(convert, "read", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match=r"--out: .* holds 'config.json', expected a new or empty directory"):
        command("markov:0", str(tmp_path))
    assert runs.digest(tmp_path) == before


def test_a_full_disk_and_a_wrong_command_are_one_line(tmp_path, command, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"found 1e-06 GB free, expected .* GB or more for the target"):
        command("markov:0", str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(ConfigError, match="expected --target=PATH and --out=DIR"):
        command("markov:0", "")
    with pytest.raises(UserError, match="found the URL 'gs://a/b'"):
        command("markov:0", "gs://a/b")
    assert not pathlib.Path("gs:").exists()
