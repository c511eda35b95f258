"""What a path may mean: a directory, a file of it, or a name of the hub; and what is said of the rest."""

import json
import os
import sys

import numpy as np
import pytest
import safetensors.numpy

from ppow_jax.errors import UserError
from ppow_jax.targets import directories, gguf_files, weights


@pytest.fixture
def model(tmp_path):
    made = tmp_path / "org/model"
    made.mkdir(parents=True)
    (made / "config.json").write_text("{}")
    safetensors.numpy.save_file({"x": np.ones(1, "f")}, made / weights.WHOLE)
    return made


def find(path) -> object:
    return directories.find(str(path), "target.path")


def refused(path, *said: str) -> None:
    with pytest.raises(UserError) as e:
        find(path)
    assert str(e.value).startswith("config.target.path: ") and "\n" not in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)


def test_a_directory_or_a_file_of_it(model, monkeypatch):
    (model / "extra.safetensors").touch()
    assert (
        find(model)
        == find(f"{model}/")
        == find(model / "config.json")
        == find(model / weights.WHOLE)
        == model
    )
    refused(model / "extra.safetensors", "extra.safetensors", "are model.safetensors", "name the directory")
    (model / weights.WHOLE).rename(model / "a.safetensors")
    (model / weights.INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert find(model / "a.safetensors") == find(model / weights.INDEX) == model
    monkeypatch.chdir(model.parents[1])
    assert str(find("org/model")) == "org/model"  # what lies here goes before the hub
    monkeypatch.setenv("HOME", str(model.parent))
    assert find("~/model") == model


def test_directories_of_something_else(model):
    outer = model.parent
    refused(outer, "has no config.json", f"name {model}")
    (model / "config.json").unlink()
    refused(outer, "has no config.json; expected a directory of Hugging Face files")
    (model / "model.gguf").touch()
    refused(model, f"name {model}/model.gguf")
    refused(model / weights.WHOLE, "has no config.json")
    (model / "_METADATA").touch()
    refused(
        model, "is an orbax checkpoint of something else", "python -m ppow_jax.convert", "from the model's"
    )
    with pytest.raises(
        UserError, match=r"name the directory of a server's files, such as WORKDIR/export/sgl"
    ):
        directories.find(str(model), "drafter.path")
    (model / "adapter_config.json").touch()
    (model / "config.json").write_text("{}")
    refused(model, "LoRA adapter", "merge it")


def test_a_pickle(model):
    (model / weights.WHOLE).unlink()
    (model / "pytorch_model.bin").touch()
    refused(model / "pytorch_model.bin", "a pickle", "convert it there")


def test_paths_that_cannot_be_looked_at(tmp_path, monkeypatch):
    refused("x" * 5000, "cannot be read")
    assert find("~no_such_user_here/model") is None  # a name like any other

    def denied(self, *a, **k):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "stat", denied)
    refused(tmp_path / "model", "cannot be read", "Permission denied")


@pytest.mark.parametrize(
    "path", ["", "a.gguf", "org/a.gguf", "./model", "../model", "a/b/c", "org/a.safetensors"]
)
def test_what_is_neither_here_nor_a_name_of_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(path) is None


def test_names_of_the_hub(tmp_path, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    refused("someone/some-model", "'someone/some-model'", "pip install 'ppow_jax[hub]'")

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns):
            if name != "someone/some-model":
                raise OSError("401 Client Error\nand more")
            assert {"*.json", "*.safetensors", "*.jinja"} == set(allow_patterns)
            return str(model)

    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    refused("someone/else", "'someone/else'", "401 Client Error", "local")
    assert find("someone/some-model") == model
    (model / "config.json").unlink()
    refused("someone/some-model", "'someone/some-model' has no config.json")


def test_files_that_are_no_models_and_shards_that_lack_their_index(model):
    (model / "tokenizer.json").write_text('{"model": {}}')
    assert find(model / "tokenizer.json") is None
    with pytest.raises(UserError, match=r"tokenizer.json: is no GGUF file; expected one, or the directory"):
        gguf_files.read(model / "tokenizer.json")
    shard = (model / weights.WHOLE).rename(model / "model-00001-of-00002.safetensors")
    wanted = "found model-00001-of-00002.safetensors: fetch model.safetensors.index.json"
    refused(shard, wanted)
    assert wanted in weights.instead(model, "weights")
    shard.rename(model / "pytorch_model-00001-of-00002.bin")
    assert "found shards of pytorch_model.bin" in weights.instead(model, "weights")
