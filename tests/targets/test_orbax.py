"""Converted targets that are damaged, or that something else wrote."""

import json
import pathlib

import numpy as np
import pytest
import small
import tokenizers
from tokenizers import models

from ppow_jax.errors import UserError
from ppow_jax.models.target import abstract_params
from ppow_jax.parallel import partition
from ppow_jax.settings import TargetSettings
from ppow_jax.targets import orbax
from ppow_jax.targets.load import load
from ppow_jax.targets.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("converted")
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    params = small.randomise(abstract_params(small.TINY), 0)
    orbax.save(directory, small.TINY, params, Tokenizer(core, "{{ messages }}", (1,), {"eos_token": "b"}))
    return directory


def target(path):
    return load(TargetSettings(str(path), "float32", ()), partition.make_mesh((-1, 1, 1)))


def refused(path, *said: str) -> None:
    with pytest.raises(UserError) as e:
        target(path)
    assert "\n" not in str(e.value) and str(path.parent) in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)


def test_it_comes_back_also_by_the_name_of_its_manifest(converted):
    for path in (converted, converted / "target_manifest.json"):
        config, params, tokens = target(path)
        assert config == small.TINY and tokens.stop_ids == (1,) and tokens.eos == "b"
    want = small.randomise(abstract_params(small.TINY), 0)
    assert np.array_equal(params["head"]["weight"], want["head"]["weight"])


@pytest.mark.parametrize(
    ("group", "changes", "said"),
    [
        ("", {"format": 2}, "format 2, expected 1; convert again"),
        ("", {"format": "1"}, "format '1', expected a whole number"),
        ("", {"format": None}, "no 'format'"),
        ("", {"shape": None}, "no 'shape', which a converted target has"),
        ("", {"shape": [1]}, "shape [1], expected a group of keys"),
        ("", {"tokenizer": "x"}, "tokenizer 'x', expected a group of keys"),
        ("shape", {"width": "32"}, "shape.width '32', expected a whole number"),
        ("shape", {"layers": True}, "shape.layers True"),
        ("shape", {"heads": -4}, "shape.heads -4"),
        ("shape", {"rope_theta": [1e4]}, "shape.rope_theta [10000.0], expected a number"),
        ("shape", {"tied_head": 0}, "shape.tied_head 0, expected true or false"),
        ("shape", {"taps": ["0"]}, "shape.taps with '0' in it, expected a list of whole numbers"),
        ("shape", {"spans": 8}, "shape.spans 8, expected a list"),
        ("shape", {"activation": 1}, "shape.activation 1, expected a text"),
        ("shape", {"vocab_size": None}, "no 'shape.vocab_size'"),
        ("shape", {"experts": 8}, "shape.experts 8, which is not known here"),
        ("shape", {"layers": 2**31 - 1}, "shape.layers 2147483647, expected what fits the rest"),
        ("shape", {"kv_heads": 0}, "shape.kv_heads 0, expected what fits"),
        ("shape", {"kv_heads": 3}, "shape.kv_heads 3, expected a divisor of heads, 4"),
        ("shape", {"head_size": 7}, "shape.head_size 7, expected what fits"),
        ("shape", {"spans": [4]}, "shape.spans [4], expected what fits"),
        ("shape", {"rope_divisors": [2.0]}, "shape.rope_divisors [2.0], expected what fits"),
        ("shape", {"activation": "relu"}, "shape.activation 'relu', expected what fits"),
        ("tokenizer", {"stop_ids": "1"}, "tokenizer.stop_ids '1', expected a list"),
        ("tokenizer", {"template": None}, "no 'tokenizer.template'"),
    ],
)
def test_a_manifest_that_is_not_ours_or_damaged(group, changes, said, converted, tmp_path):
    for file in ("params", "tokenizer.json"):
        (tmp_path / file).symlink_to(converted / file)
    manifest = json.loads((converted / "target_manifest.json").read_text())
    if group:
        manifest[group] |= changes
    else:
        manifest |= changes
    (tmp_path / "target_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError) as e:
        target(tmp_path)
    assert said in str(e.value) and "\n" not in str(e.value), str(e.value)


def test_parts_that_are_not_there(converted, tmp_path):
    (tmp_path / "target_manifest.json").write_text("[1, 2]")
    refused(tmp_path, "found [1, 2], expected an object")
    (tmp_path / "target_manifest.json").write_text((converted / "target_manifest.json").read_text())
    refused(tmp_path, "params: the parameters cannot be read")
    (tmp_path / "params").symlink_to(converted / "params")
    refused(tmp_path, "no tokenizer.json", "fetch it")
    refused(converted / "params", "is an orbax checkpoint of something else")
