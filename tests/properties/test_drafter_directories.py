"""Drafters' directories that strangers make: each is read, or refused in one line."""

import functools
import pathlib

import drafter_files
import pytest
import strange

from ppow_jax.drafters import eagle3
from ppow_jax.drafters.files import reading
from ppow_jax.errors import UserError
from ppow_jax.targets import directories

WEIGHTS = "model.safetensors"


@strange.counts(2)
@pytest.mark.parametrize("server", ["sglang", "vllm"])
def test_drafters(count, server, tmp_path, monkeypatch):
    drafter_files.write(tmp_path / "sound", server=server)
    files = {name: (tmp_path / "sound" / name).read_bytes() for name in ("config.json", WEIGHTS)}
    place = strange.Place(tmp_path / "examples", files)
    monkeypatch.setattr(reading, "abstract_params", functools.lru_cache(512)(eagle3.abstract_params))

    def read(directory: pathlib.Path) -> None:
        found = directories.find(str(directory), "drafter.path")
        if found is None:
            raise UserError(f"{directory}: no directory")
        reading.read(found, drafter_files.TARGET, "ours")

    read(place.here)
    made = strange.changes(["config.json"], [WEIGHTS])
    strange.examples(count // 2, made, lambda made: place.hold(made, read))
