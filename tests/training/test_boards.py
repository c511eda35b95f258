"""Boards get the numbers of a run, and are asked for their packages before anything runs."""

import sys
import types

import pytest
import runs

from ppow_jax.errors import UserError
from ppow_jax.settings import LogSettings
from ppow_jax.stages import train
from ppow_jax.training import boards
from ppow_jax.training.metrics import Writer


class Run:
    """Stands for a run of wandb."""

    def __init__(self, **about: object) -> None:
        self.about, self.rows, self.finished = about, [], False

    def log(self, values: dict, step: int) -> None:
        assert not self.finished
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    """The package as far as it is used; `runs` has those that were opened."""
    module = types.ModuleType("wandb")
    module.runs = []
    module.init = lambda **about: module.runs.append(Run(**about)) or module.runs[-1]
    module.Settings = lambda **about: about
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_all_numbers_of_all_steps(tmp_path, wandb):
    (tmp_path / "config.json").write_text('{"seed": 3}')
    for first in (0, 2):  # the run goes on after its second step
        with Writer(tmp_path, "cst", 4, first, settings=LogSettings(wandb="drafters")) as writer:
            for step in (first + 1, first + 2):
                writer.write(step, {"loss": step / 8, "shares": [0.5], "accepted": 2})
    begun, resumed = wandb.runs
    assert begun.rows == [(1, {"loss": 0.125, "accepted": 2}), (2, {"loss": 0.25, "accepted": 2})]
    assert [step for step, _ in resumed.rows] == [3, 4]
    assert begun.finished and resumed.finished
    assert begun.about["project"] == "drafters" and begun.about["name"] == "cst"
    assert begun.about["config"] == {"seed": 3} and begun.about["dir"] == str(tmp_path)
    assert begun.about["id"] == resumed.about["id"] and resumed.about["resume"] == "allow"
    boards.WeightsAndBiases("drafters", tmp_path, "ppow").close()
    assert wandb.runs[-1].about["id"] != begun.about["id"]


def test_a_service_that_is_not_there_is_one_line(tmp_path, wandb):
    def fail(**_: object) -> None:
        raise RuntimeError("api_key not configured (no-tty)")

    wandb.init = fail
    with pytest.raises(
        UserError, match=r"config.log.wandb: 'drafters' cannot be opened \(api_key not .*WANDB_MODE"
    ):
        boards.opened(LogSettings(wandb="drafters"), tmp_path, "cst")


def test_tensorboard_gets_its_scalars(tmp_path, monkeypatch):
    found: list = []

    class SummaryWriter:
        def __init__(self, directory: str) -> None:
            found.append(directory)

        def add_scalar(self, *scalar: object) -> None:
            found.append(scalar)

        def close(self) -> None:
            found.append("closed")

    module = types.ModuleType("tensorboardX")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with Writer(tmp_path, "cst", 1, settings=LogSettings(tensorboard=True)) as writer:
        writer.write(1, {"loss": 0.5, "shares": [0.5]})
    assert found == [str(tmp_path / "tensorboard" / "cst"), ("loss", 0.5, 1), "closed"]


def test_no_board_is_opened_or_imported_unless_it_is_asked_for(tmp_path, wandb):
    assert boards.opened(LogSettings(), tmp_path, "cst") == []
    assert wandb.runs == []


@pytest.mark.parametrize(
    ("key", "value", "package"), [("wandb", "drafters", "wandb"), ("tensorboard", True, "tensorboardX")]
)
def test_a_missing_package_is_found_before_anything_runs(tmp_path, monkeypatch, key, value, package):
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    boards.check(LogSettings())
    chosen = runs.make_settings(tmp_path, **{f"log__{key}": value})
    with pytest.raises(UserError, match=rf"config.log.{key}: the package {package} is missing; `pip install"):
        train.check(chosen)


def test_a_folder_of_its_name_is_no_package(tmp_path, monkeypatch):
    """Such as the one that wandb leaves where it ran."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="the package wandb is missing"):
        boards.check(LogSettings(wandb="drafters"))
