"""Runs that are asked to end, and saves that fail."""

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ppow_jax import main
from ppow_jax.errors import UserError
from ppow_jax.parallel import console, preemption, processes
from ppow_jax.parallel.checkpoint import Checkpoints
from ppow_jax.training import loop

CHANGES = dict(
    stages=("respond", "train"),
    runs=("supervise",),
    train__supervise__steps=6,
    log__checkpoint_every_steps=50,
)


@pytest.fixture
def listening(monkeypatch):
    """SIGTERM is taken as the command takes it."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(preemption, "_asked", False)
    preemption.install()
    yield
    signal.signal(signal.SIGTERM, before)


def test_a_run_that_is_asked_to_end_saves_the_step_that_it_is_in(tmp_path, monkeypatch, listening):
    make_step = loop.make_step

    def make_watched(*arguments):
        step = make_step(*arguments)

        def watched(number, state, batch):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            steps.append(number)
            return step(number, state, batch)

        return watched

    steps: list[int] = []
    monkeypatch.setattr(loop, "make_step", make_watched)
    with pytest.raises(preemption.Stopped, match="supervise is saved after step 3 of 6"):
        runs.run(tmp_path / "workdir", **CHANGES)
    assert steps == [1, 2, 3]
    stages = json.loads((tmp_path / "workdir" / "stages.json").read_text())
    assert stages["respond"]["finished"] and not stages["train/supervise"]["finished"]
    monkeypatch.setattr(preemption, "_asked", False)
    monkeypatch.setattr(loop, "make_step", make_step)
    runs.run(tmp_path / "workdir", **CHANGES)
    lines = [json.loads(x) for x in (tmp_path / "workdir" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_is_asked_to_end_while_its_last_step_is_saved_ends_before_the_next_stage(
    tmp_path, monkeypatch, listening
):
    require = Checkpoints.require

    def late(store, step):
        os.kill(os.getpid(), signal.SIGTERM)
        require(store, step)

    monkeypatch.setattr(Checkpoints, "require", late)
    with pytest.raises(preemption.Stopped, match="after its last step"):
        runs.run(tmp_path / "workdir", **CHANGES)
    stages = json.loads((tmp_path / "workdir" / "stages.json").read_text())
    assert not stages["train/supervise"]["finished"]
    store = Checkpoints(tmp_path / "workdir" / "checkpoints" / "supervise", 2)
    assert store.latest == 6
    store.close()


@pytest.mark.parametrize("told", [[0, 0], [0, 1], [1, 0]])
def test_several_processes_end_together_if_one_is_told(monkeypatch, told):
    given = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    gather = lambda mine: given.append(int(mine)) or np.array(told)  # noqa: E731
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(preemption, "_asked", bool(told[0]))
    with preemption.at_steps():
        assert preemption.asked() == any(told)
    assert given == told[:1]
    if any(told):
        with pytest.raises(preemption.Stopped, match="maths"):
            preemption.leave("evaluate is done with maths")


@pytest.mark.slow
def test_between_batches_and_benchmarks_a_run_may_end(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(preemption, "leave", left.append)
    stages = ("respond", "train", "evaluate")
    runs.run(tmp_path / "workdir", **CHANGES | {"stages": stages})
    assert left[0] == "respond is written up to batch 1 of 3"
    assert left[-1].startswith("evaluate is done with ")


def test_outside_of_steps_it_ends_at_once_with_a_status_of_its_own(listening):
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert end.value.code == preemption.STATUS == 75
    os.kill(os.getpid(), signal.SIGTERM)  # again, while it ends: nothing more
    time.sleep(0.1)


@pytest.mark.slow
def test_a_process_that_is_told_between_steps_does_not_crash(tmp_path):
    """While steps are timed to see how many fit: the interpreter's own end crashed then."""
    command = [sys.executable, "-m", "ppow_jax.main", "--config=tiny", f"--workdir={tmp_path / 'w'}"]
    command += ["--config.train.supervise.steps=0", "--config.train.supervise.minutes=1"]
    command += ["--config.respond.prompts=chat=builtin:chat/train[:64]", "--config.data.holdout=4"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr.readline, "")
    assert any("timing some steps" in line for line in lines)
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(60) == preemption.STATUS, rest
    assert "Fatal" not in rest


def test_the_command_says_so_and_how_to_go_on(monkeypatch, capsys):
    def stopped(*_, **__):
        raise preemption.Stopped("ppow is saved after step 7 of 9")

    monkeypatch.setattr(console.app, "run", stopped)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(console.sys, "argv", ["ppow_jax"])
    with pytest.raises(SystemExit) as end:
        main.cli()
    assert end.value.code == preemption.STATUS
    assert "ppow is saved after step 7 of 9; the same command goes on" in capsys.readouterr().err


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(console.app, "run", full)
    monkeypatch.setattr(console.sys, "argv", ["ppow_jax"])
    with pytest.raises(SystemExit) as end:
        main.cli()
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert "metrics.jsonl" in said and "make room" in said and len(said.splitlines()) == 1


def state_of(seed: int) -> dict[str, jax.Array]:
    return {"x": jax.random.normal(jax.random.key(seed), (512, 1024))}  # 2 MB, and nothing to compress


def shapes() -> dict[str, jax.ShapeDtypeStruct]:
    return {"x": jax.ShapeDtypeStruct((512, 1024), jnp.float32)}


def test_arrays_may_be_overwritten_as_soon_as_a_save_has_begun(tmp_path):
    """As the next step does, which gets them donated."""
    store = Checkpoints(tmp_path, 3)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    for step in (1, 2, 3):
        state = state_of(step)
        want = np.array(state["x"])
        store.save(step, state, None, {"n": step})
        jax.block_until_ready(overwrite(state))
        np.testing.assert_array_equal(store.restore(shapes())[1]["x"], want)
    store.close()


@pytest.fixture
def small_disk():
    """Makes files above 64 KB impossible to write, until it is called again with False."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(is_full: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16 if is_full else limits[0], limits[1]))

    yield full
    full(False)


def test_a_save_that_fails_is_reported_and_the_one_before_it_stays(tmp_path, small_disk, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ppow_jax"), "propagate", True)
    store = Checkpoints(tmp_path, 1)
    store.save(1, state_of(1), None, {"n": 1})
    store.settle()
    small_disk(True)
    store.save(2, state_of(2), None, {"n": 2})
    with pytest.raises(UserError, match=r"step 2 could not be saved.*goes on from step 1"):
        store.require(2)
    small_disk(False)
    assert "step 2 could not be saved" in caplog.text and "the newest one saved is step 1" in caplog.text
    step, found, about = store.restore(shapes())
    assert (step, about["n"]) == (1, 1)
    np.testing.assert_array_equal(found["x"], state_of(1)["x"])
    store.save(3, state_of(3), None, {"n": 3})
    store.require(3)
    np.testing.assert_array_equal(store.restore(shapes())[1]["x"], state_of(3)["x"])
    store.close()
    again = Checkpoints(tmp_path, 1)
    assert again.latest == 3
    again.close()


def test_a_damaged_step_does_not_pass_for_one_that_is_saved_again(tmp_path, small_disk):
    store = Checkpoints(tmp_path, 2)
    for number in (1, 2):
        store.save(number, state_of(number), None, {"n": number})
    store.close()
    for file in (tmp_path / "2" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    store = Checkpoints(tmp_path, 2)
    assert store.latest == 2
    assert store.restore(shapes())[0] == 1
    small_disk(True)
    store.save(2, state_of(2), None, {"n": 2})
    with pytest.raises(UserError, match=r"step 2 could not be saved.*goes on from step 1"):
        store.require(2)
    small_disk(False)
    store.close()


def test_a_step_that_another_process_could_not_save_or_read_is_not_there(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("ppow_jax"), "propagate", True)
    elsewhere: list[bool] = []
    monkeypatch.setattr(processes, "anywhere", lambda mine: elsewhere.pop(0) or mine)
    store = Checkpoints(tmp_path, 3)
    for number in (1, 2, 3):
        elsewhere += [number == 2]
        store.save(number, state_of(number), None, {"n": number})
        store.settle()
        assert store._saved == (1 if number == 2 else number)
    assert (
        "step 2 could not be saved (another process says why); the newest one saved is step 1" in caplog.text
    )
    elsewhere += [True, False]
    assert store.restore(shapes())[0] == 2  # this process did write it
    assert "step 3 cannot be read (another process says why)" in caplog.text
    assert not elsewhere
    store.close()
