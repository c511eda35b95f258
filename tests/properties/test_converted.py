"""Converted targets and checkpoints that strangers make: each is read, or refused in one line."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import small
import strange
import tokenizers
from test_model_files import CORE

from ppow_jax.errors import UserError
from ppow_jax.models.target import abstract_params
from ppow_jax.parallel import checkpoint, partition
from ppow_jax.targets import orbax
from ppow_jax.targets.tokenizer import Tokenizer, with_stops

SHAPE = dataclasses.replace(small.TINY, vocab_size=9, spans=(0, 4, 0), rope_divisors=(1.0,) * 6)
TEMPLATE = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"


@pytest.fixture(scope="module")
def mesh():
    return partition.make_mesh((-1, 1, 1))


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, bytes]:
    """A small target as `convert` writes it."""
    directory = tmp_path_factory.mktemp("converted") / "target"
    core = tokenizers.Tokenizer.from_str(strange.dumped(CORE).decode())
    params = jax.tree.map(lambda like: np.ones(like.shape, like.dtype), abstract_params(SHAPE))
    orbax.save(directory, SHAPE, params, Tokenizer(core, TEMPLATE, (7,), {"eos_token": "<end>"}))
    return contents(directory)


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """All files below a directory, by their paths in it."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


@strange.counts()
def test_manifests(count, written, mesh, tmp_path, monkeypatch):
    """All but the arrays, which take long to read."""
    shapes = functools.lru_cache(512)(abstract_params)
    monkeypatch.setattr(orbax, "abstract_params", shapes)
    monkeypatch.setattr(checkpoint, "load_params", lambda directory, like: {})
    place = strange.Place(tmp_path, written)

    def read(directory: pathlib.Path) -> None:
        found = orbax.find(str(directory))
        if found is None:
            raise UserError(f"{directory}: no manifest")
        _, _, tokens = orbax.load(found, "float32", mesh, (0, 1))
        with_stops(tokens)

    read(place.here)
    made = strange.changes(["target_manifest.json", "target_manifest.json", "tokenizer.json"])
    names = ("chat template", "tokenizer:", "config.target")
    strange.examples(count, made, lambda made: place.hold(made, read, *names))


@strange.counts(25, fast=5)
def test_arrays(count, written, mesh, tmp_path):
    place = strange.Place(tmp_path, written)

    def read(directory: pathlib.Path) -> None:
        orbax.load(directory, "float32", mesh)

    read(place.here)
    names = sorted(name for name in written if name.startswith("params/"))
    made = strange.changes([name for name in names if name.endswith("_METADATA")], others=names)
    strange.examples(count, made, lambda made: place.hold(made, read))


@strange.counts(50, fast=5)
def test_checkpoints(count, mesh, tmp_path):
    state = {"params": {"head": np.ones((4, 3), np.float32)}, "vocab": np.arange(4, dtype=np.int32)}
    store = checkpoint.Checkpoints(tmp_path / "sound", 2)
    for step in (1, 2):
        store.save(step, state, None, {"target": "ours", "steps": 2})
    store.close()
    files = contents(tmp_path / "sound")
    place = strange.Place(tmp_path / "examples", files)
    whole = partition.replicated(mesh)
    like = {"params": {"head": jax.ShapeDtypeStruct((4, 3), np.float32, sharding=whole)}}
    like["vocab"] = jax.ShapeDtypeStruct((4,), np.int32, sharding=whole)

    def read(directory: pathlib.Path) -> None:
        store = checkpoint.Checkpoints(directory, 2)
        try:
            if store.latest is None:
                raise UserError(f"{directory}: no step")
            store.about()
            store.restore_part(like)
        finally:
            store.close()

    read(place.here)
    names = [name for name in sorted(files) if name.startswith("2/")]
    made = strange.changes(
        [n for n in names if n.endswith("METADATA") or n.endswith("about")] or names, others=names
    )
    strange.examples(count, made, lambda made: place.hold(made, read))
