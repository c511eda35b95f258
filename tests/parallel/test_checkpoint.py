"""Checkpoints lie where they were asked to, whatever a directory is called."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ppow_jax.errors import UserError
from ppow_jax.parallel import checkpoint
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.training import drafters

ODD = ["a[1]b", "a]b[", "a*b", "a?b", "a\\b", "gs:", "a[1:2] {x} ~%41#$HOME'\"|", "日本\n", "-a"]
SHAPES = {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}


def values(first: float) -> dict[str, jax.Array]:
    return {"x": jnp.arange(4.0) + first}


@pytest.mark.parametrize("name", ODD)
def test_what_is_saved_in_a_directory_of_an_odd_name_is_read_there(tmp_path, name):
    directory = tmp_path / name / "run"
    store = Checkpoints(directory, 1)
    for step in (1, 2):
        store.save(step, values(step), None, {"n": step})
        store.require(step)
    store.close()
    assert [p.name for p in directory.iterdir()] == ["2"]
    store = Checkpoints(directory, 1)
    step, found, about = store.restore(SHAPES)
    store.close()
    assert (step, about["n"]) == (2, 2)
    np.testing.assert_array_equal(found["x"], values(2)["x"])
    checkpoint.save_params(tmp_path / name / "params", values(3))
    np.testing.assert_array_equal(
        checkpoint.load_params(tmp_path / name / "params", SHAPES)["x"], values(3)["x"]
    )


@pytest.mark.parametrize(("name", "beside"), [("a[1]b", "a1b"), ("a*b", "axb"), ("a?b", "axb")])
def test_a_directory_beside_it_that_the_name_would_match_as_a_pattern_is_left_alone(tmp_path, name, beside):
    checkpoint.save_params(tmp_path / beside / "params", values(1))
    before = runs.digest(tmp_path / beside)
    checkpoint.save_params(tmp_path / name / "params", values(2))
    assert runs.digest(tmp_path / beside) == before
    for directory, first in ((name, 2), (beside, 1)):
        found = checkpoint.load_params(tmp_path / directory / "params", SHAPES)
        np.testing.assert_array_equal(found["x"], values(first)["x"])


def test_a_relative_name_means_the_directory_at_hand(tmp_path, monkeypatch):
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        checkpoint.save_params(pathlib.Path("w[1]/params"), values(len(place)))
        assert (tmp_path / place / "w[1]" / "params").is_dir()


def test_a_link_to_a_directory_will_do(tmp_path):
    (tmp_path / "real[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real[1]")
    checkpoint.save_params(tmp_path / "link" / "params", values(1))
    found = checkpoint.load_params(tmp_path / "real[1]" / "params", SHAPES)
    np.testing.assert_array_equal(found["x"], values(1)["x"])


def test_parameters_that_cannot_be_written_leave_those_that_are_there(tmp_path, monkeypatch):
    checkpoint.save_params(tmp_path / "params", values(1))

    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: /a/long/path: No space left on device [os_error_code='28']")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp, "save_pytree", full)
        with pytest.raises(UserError, match=r"params: the parameters cannot be written \(No space left on"):
            checkpoint.save_params(tmp_path / "params", values(2))
    found = checkpoint.load_params(tmp_path / "params", SHAPES)
    np.testing.assert_array_equal(found["x"], values(1)["x"])
    checkpoint.save_params(tmp_path / "params", values(2))
    np.testing.assert_array_equal(checkpoint.load_params(tmp_path / "params", SHAPES)["x"], values(2)["x"])


def test_a_device_in_a_checkpoint_is_refused_before_it_is_read_without_end(tmp_path):
    checkpoint.save_params(tmp_path / "params", values(1))
    for place, name in ((tmp_path / "params", "_METADATA"), (tmp_path / "run" / "1" / "state", "_METADATA")):
        place.mkdir(parents=True, exist_ok=True)
        (place / name).unlink(missing_ok=True)
        (place / name).symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"params/_METADATA: found a device or a pipe, expected a file"):
        checkpoint.load_params(tmp_path / "params", SHAPES)
    with pytest.raises(UserError, match=r"1/state/_METADATA: found a device or a pipe, expected a file"):
        Checkpoints(tmp_path / "run", 1)


def test_checkpoints_that_cannot_be_listed(tmp_path):
    store = Checkpoints(tmp_path / "run", 1)
    store.save(1, values(1), None, {"n": 1})
    store.close()
    about = tmp_path / "run/1/_CHECKPOINT_METADATA"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"init_timestamp_nsecs": "x"}))
    with pytest.raises(UserError, match=r"run: the checkpoints cannot be listed \(.*int.*\); restore them"):
        Checkpoints(tmp_path / "run", 1)


@pytest.mark.parametrize(
    "change", [{"target": 1}, {"steps": None}, {"steps": "3"}, {"seconds": -1}, {"drafter": []}]
)
def test_what_a_drafters_checkpoint_notes(change):
    about = {"target": "ab", "steps": 3, "seconds": 0.0, "drafter": {}}
    assert drafters.checked(about, "run") == about
    with pytest.raises(UserError, match=f"^run: found .*{next(iter(change))}"):
        drafters.checked(about | change, "run")
