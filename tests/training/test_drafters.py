"""Drafters that come from files, and drafters of other shapes, through whole runs."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import runs
import safetensors.numpy
import small

from ppow_jax.drafters import eagle3
from ppow_jax.drafters.files import writing
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.settings import IMPORTED
from ppow_jax.training import drafters

STEPS = dict(
    train__supervise__steps=4,
    train__supervise__optimizer__warmup_steps=2,
    train__ppow__steps=2,  # and those of cst
    log__curve_points=1,
)
TRAINED = ("respond", "train", "evaluate")


@pytest.fixture
def exported(finished, tmp_path) -> pathlib.Path:
    """What `export` writes for vLLM, in float32."""
    workdir = tmp_path / "first"
    shutil.copytree(finished.workdir, workdir)
    runs.run(workdir, stages=("export",), export__server="vllm", export__dtype="float32")
    return workdir / "export"


def report(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "report.json").read_text())


@pytest.mark.slow
def test_training_goes_on_from_files_and_the_report_shows_where_it_began(exported, tmp_path):
    files = str(exported / "vllm")
    chosen = dict(STEPS, drafter__path=files, drafter__vocab_size=7)  # the files know better
    chosen |= dict(stages=TRAINED, train__cst__start="fresh")
    runs.run(tmp_path / "w", runs=("cst",), **chosen)
    found = report(tmp_path / "w")["drafters"]
    manifest = json.loads((exported / "manifest.json").read_text())
    assert list(found) == ["imported", "cst"] and found["imported"]["steps"] == 0
    assert found["imported"]["params_sha256"] == manifest["params_sha256"]
    assert found["cst"]["params_sha256"] != manifest["params_sha256"]
    runs.run(tmp_path / "w", runs=("supervise", "cst"), **chosen)
    found = report(tmp_path / "w")["drafters"]
    assert list(found) == ["imported", "supervise", "cst"]
    for drafter in found.values():
        assert all(b["identical_outputs"] == 2 for b in drafter["benchmarks"].values())
    with pytest.raises(ConfigError, match=r"target.taps: found \(0, 1, 4\), expected \(1, 2, 3\), which the"):
        runs.run(tmp_path / "other", runs=("cst",), target__taps=(0, 1, 4), **chosen)


@pytest.mark.slow
def test_a_drafter_of_another_shape_from_training_to_files(tmp_path):
    shape = dict(drafter__layers=2, drafter__width=48, drafter__induction=False, target__taps=(2, 4))
    chosen = dict(STEPS, **shape, drafter__mlp_hidden=0, export__server="vllm", export__dtype="float32")
    chosen |= dict(stages=(*TRAINED, "export"), runs=("supervise", "ppow"), export__drafter="ppow")
    runs.run(tmp_path / "w", **chosen)
    found = report(tmp_path / "w")["drafters"]
    assert list(found) == ["supervise", "ppow"]
    for drafter in found.values():
        for benchmark in drafter["benchmarks"].values():
            assert benchmark["identical_outputs"] == benchmark["same_rounds_as_simulated"] == 2
    files = tmp_path / "w/export/vllm"
    config = json.loads((files / "config.json").read_text())
    assert (config["hidden_size"], config["target_hidden_size"], config["num_hidden_layers"]) == (48, 32, 2)
    assert config["num_attention_heads"] == 3 and config["intermediate_size"] == 24
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 4]
    run = runs.build(tmp_path / "w", **chosen)
    own = drafters.shape_by(run.settings.drafter, run.target.config)
    again = drafters.imported(str(files), run.target.config, run.fingerprint)
    assert again.config == own


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple:
    """An experiment, and a drafter for it without a head, which a hub would give by a name."""
    directory = tmp_path_factory.mktemp("headless")
    files = directory / "org/drafter"
    run = runs.build(directory / "w", drafter__path=str(files))
    target = run.target.config
    shape = eagle3.drafter_config(target, target.vocab_size, 16, "float32")
    params, everything = small.randomise(eagle3.abstract_params(shape), 1), np.arange(target.vocab_size)
    writing.write(files, shape, params, everything, target, "vllm", "float32", run.fingerprint)
    tensors = safetensors.numpy.load_file(files / "model.safetensors")
    del tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, files / "model.safetensors")
    return run, files


def test_a_drafter_without_a_head_begins_with_a_copy_of_the_targets(built):
    run, files = built
    found = drafters.load(run, IMPORTED)
    head, target = found.params["head"]["weight"], run.target_params["head"]["weight"]
    assert np.array_equal(head, target) and head.unsafe_buffer_pointer() != target.unsafe_buffer_pointer()
    assert found.vocab.tolist() == list(range(run.target.config.vocab_size))
    values = json.loads((files / "config.json").read_text())
    (files / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    drafters.imported.cache_clear()
    tied = drafters.load(run, IMPORTED).params["head"]["weight"]
    assert np.array_equal(tied, run.target_params["embedding"]["embedding"])
    assert not np.array_equal(tied, head)


def test_paths_of_drafters(built, monkeypatch):
    run, files = built

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            return {"someone/drafter": str(files)}[name]

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    read = lambda path, key="drafter.path": drafters.imported(path, run.target.config, run.fingerprint, key)  # noqa: E731
    want = read(str(files)).config
    assert read("someone/drafter").config == read(str(files / "config.json")).config == want
    monkeypatch.chdir(files.parents[1])
    assert read("org/drafter").config == want
    for path, key, said in (
        ("someone/else", "train.cst.start", "config.train.cst.start: 'someone/else' cannot be fetched"),
        (
            "./nothing",
            "drafter.path",
            "config.drafter.path: no directory './nothing'; expected one of",
        ),
        (
            str(files.parent),
            "drafter.path",
            f"a directory of Hugging Face files; name {files}",
        ),
    ):
        with pytest.raises(UserError) as e:
            read(path, key)
        assert said in str(e.value), str(e.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            dict(drafter__vocab_size=10_000),
            "config.drafter.vocab_size: found 10000, expected at most the",
        ),
        (dict(train__cst__start="./none", runs=("cst",)), "config.train.cst.start: no directory './none'"),
        (dict(drafter__path="./none"), "config.drafter.path: no directory './none'"),
    ],
)
def test_what_does_not_fit_the_target_is_said_before_it_writes_anything(changes, said, tmp_path):
    with pytest.raises(UserError) as e:
        runs.run(tmp_path / "w", **changes)
    assert said in str(e.value) and not (tmp_path / "w/responses").exists()


@pytest.mark.parametrize("taps", [(2, 1), (1, 1), (1, 5), (-1, 2)])
def test_taps_that_the_target_does_not_have(taps, tmp_path):
    with pytest.raises(ConfigError, match=r"config.target.taps: .* ascending layers from 0 to 4"):
        runs.build(tmp_path / "w", target__taps=taps)
