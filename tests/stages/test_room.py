"""Disk and memory that do not suffice are found before the work, with the figures."""

import shutil
import sys

import jax
import pytest
import runs

from ppow_jax import run
from ppow_jax.data import records
from ppow_jax.errors import UserError
from ppow_jax.parallel import files, memory, progress
from ppow_jax.stages import features, respond, room
from ppow_jax.training import drafters

TOKEN = (3 + 1) * 32 * 2  # three taps and the last state, of the chain's width, in float16


@pytest.fixture
def disk(monkeypatch):
    """Sets how many bytes are free wherever one asks."""

    def free(count: int) -> None:
        usage = type("Usage", (), {"free": count})
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)

    return free


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return runs.build(tmp_path_factory.mktemp("room") / "w")


def test_features_take_so_many_bytes_a_token_and_answers_may_be_short(experiment, disk, tmp_path):
    about = (experiment, tmp_path / "features", "float16")
    disk(1100 * TOKEN)
    room.require_for_features(*about, known=1000, answers=400)
    disk(1100 * TOKEN - 1)
    with pytest.raises(
        UserError, match=r"features: found 0.000282 GB free, expected 0.000282 GB or more for"
    ):
        room.require_for_features(*about, known=1000, answers=400)


def test_checkpoints_hold_parameters_and_two_moments_and_so_many_are_kept(finished, experiment, disk):
    """Of 30 steps 2 of 3 saves are kept, of 10 steps there is one, and one more while it is written."""
    parameters = drafters.load(runs.build(finished.workdir), "cst").params
    size = int(0.8 * 3 * sum(x.nbytes for x in jax.tree.leaves(parameters)))
    chosen = experiment.settings.chosen()
    disk(4 * size)
    room.require_for_checkpoints(experiment, chosen)
    disk(4 * size - 1)
    with pytest.raises(
        UserError, match=r"checkpoints: found .* GB free, expected .* config.log.keep_checkpoints"
    ):
        room.require_for_checkpoints(experiment, chosen)


def test_checkpoints_that_are_there_need_no_room(finished, disk):
    disk(0)
    made = runs.build(finished.workdir)
    room.require_for_checkpoints(made, made.settings.chosen())


def test_a_small_disk_is_found_before_anything_is_written(tmp_path, disk):
    disk(100_000)
    with pytest.raises(UserError, match="keep_checkpoints"):
        runs.run(tmp_path / "w", stages=("respond", "train"))
    disk(10_000)
    with pytest.raises(UserError, match="for the target's features"):
        runs.run(tmp_path / "w", stages=("respond",))
    assert not (tmp_path / "w" / "responses").exists() and not (tmp_path / "w" / "features").exists()


@pytest.fixture
def without(finished, tmp_path):
    """The finished run without its features, which were read from elsewhere."""
    workdir = shutil.copytree(finished.workdir, tmp_path / "w", ignore=shutil.ignore_patterns("features"))
    return runs.experiment.build(finished.settings, workdir)


def test_features_that_are_missing_are_asked_room_for(without, disk):
    tokens = sum(len(without.responses[i]["tokens"][:32]) for i in range(24))
    disk(tokens * TOKEN - 1000 * TOKEN // 100)
    with pytest.raises(UserError, match="for the target's features"):
        features.ensure(without)
    assert not (without.workdir / "features").exists()


def test_features_say_how_far_they_are_within_a_shard(without, monkeypatch, log_lines):
    monkeypatch.setattr(progress, "_QUIET", 0.0)
    monkeypatch.setattr(features, "_BATCH", 4)
    assert len(features.ensure(without)) == 24
    said = [line for line in log_lines if line.startswith("features: ")]
    assert [line.split()[1] for line in said] == [f"{n}/24" for n in range(4, 25, 4)]
    assert all("texts/s | " in line or "s each | " in line for line in said)


@pytest.mark.parametrize(("free", "warned"), [(10**12, False), (1000, True), (None, False)])
def test_a_batch_that_memory_is_short_for_is_named(experiment, monkeypatch, log_lines, free, warned):
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    room.warn_of_training(experiment, "supervise")
    room.warn_of_writing(experiment, "evaluate maths", 512, "float32")
    assert len(log_lines) == (2 if warned else 0)
    if warned:
        assert log_lines[0].startswith("supervise: about ") and log_lines[0].endswith(
            "(config.train.supervise.accumulate)"
        )
        assert log_lines[1].endswith("1e-06 GB free; lower config.evaluate.batch_size")


def test_the_logits_of_a_step_are_counted(experiment, monkeypatch):
    """4 texts of 4 anchors, windows of 2 over 20 tokens, in float32, four times; of half a batch, half."""
    seen = []
    monkeypatch.setattr(room, "_warn", lambda *about: seen.append(about))
    room.warn_of_training(experiment, "supervise")
    split = runs.experiment.build(
        runs.make_settings(experiment.workdir.parent, train__supervise__accumulate=2), experiment.workdir
    )
    room.warn_of_training(split, "supervise")
    assert [about[2] for about in seen] == [4 * 4 * 4 * 2 * 20 * 4, 4 * 2 * 4 * 2 * 20 * 4]


def test_a_config_json_of_something_else_is_left_alone(tmp_path):
    """A workdir that is a model's directory."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    before = runs.digest(tmp_path)
    with pytest.raises(UserError, match=r"--workdir: .* holds a config.json of something else"):
        run.run(runs.make_settings(tmp_path, stages=("respond",)), tmp_path)
    assert before.items() <= runs.digest(tmp_path).items()


@pytest.mark.parametrize("folder", ["", "responses", "features"])
def test_a_workdir_that_cannot_be_written_is_found_before_a_target_is_loaded(tmp_path, monkeypatch, folder):
    def refuse(path, where):
        if path == tmp_path / "w" / folder:
            raise UserError(f"{where}: {path} cannot be written")

    (tmp_path / "w" / folder).mkdir(parents=True)
    monkeypatch.setattr(files, "require_writable", refuse)
    monkeypatch.setattr(run.experiment, "build", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError, match="cannot be written"):
        runs.run(tmp_path / "w", stages=("respond",))


def test_so_many_texts_are_written_at_a_time_as_half_of_the_memory_has_room_for(experiment, monkeypatch):
    c = experiment.target.config
    text = 100 * (2 * c.layers * c.kv_heads * c.head_size * 4 + TOKEN)
    for free, fits in ((2 * 20 * text, 16), (2 * 7 * text, 7), (10, 1), (None, sys.maxsize)):
        monkeypatch.setattr(memory, "free_bytes", lambda free=free: free)
        assert room.texts_that_fit(experiment, 100, "float16") == fits


def test_the_batch_size_is_settled_once(tmp_path, monkeypatch, caplog):
    """Batches are known by their number: with another size a run that goes on would write others."""
    few = dict(stages=("respond",), respond__batch_size=64)
    monkeypatch.setattr(room, "texts_that_fit", lambda *_: 16)
    made = runs.build(tmp_path / "w", **few)
    assert respond._batch_size(made) == 16
    monkeypatch.setattr(room, "texts_that_fit", lambda *_: 40)
    with caplog.at_level("INFO", logger="ppow_jax"):
        assert respond._batch_size(made) == 16
    assert "16 prompts at a time instead of 64" in caplog.text
    (made.workdir / respond.SETTLED).unlink()
    records.write_shard(made.workdir / "responses", "write-00000", [{"x": 1}])  # of an older version
    assert respond._batch_size(made) == 64
