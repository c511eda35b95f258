"""GGUF files in parts, damaged ones, and metadata that are obeyed or refused by name."""

import math
import pathlib
import shutil
import struct

import gguf as library
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from test_gguf import write_gguf

from ppow_jax.errors import UserError
from ppow_jax.targets import gguf, gguf_files


def said(ask) -> str:
    with pytest.raises(UserError) as e:
        ask()
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    return str(e.value)


def load_said(file: pathlib.Path) -> str:
    found = said(lambda: gguf.load(str(file), "float32"))
    assert found.startswith(str(file.parent)), found
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    return write_gguf(tmp_path_factory.mktemp("whole") / "m.gguf", "llama2")


def test_parts_are_one_model_whichever_is_named(tmp_path, whole):
    write_gguf(tmp_path / "m.gguf", "llama2", a_part=40)
    first, second = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"
    want = gguf.load(str(whole), "float32")[1]
    for file in (first, second):
        config, params, metadata = gguf.load(str(file), "float32")
        assert config.layers == 7 and len(metadata["tokenizer.ggml.tokens"]) == 96
        assert jax.tree.all(jax.tree.map(np.array_equal, params, want))
    shutil.copy(first, tmp_path / "renamed.gguf")
    assert "one of 2 parts (split.count), expected a name that ends in -00001-of-00002" in load_said(
        tmp_path / "renamed.gguf"
    )
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert "found split.no 0, expected 1" in load_said(first)
    second.unlink()
    assert "is one of 2 parts; m-00002-of-00002.gguf is not beside it" in load_said(first)
    second.write_bytes(content)
    alone = write_gguf(tmp_path / "n-00001-of-00002.gguf", "llama2")
    shutil.copy(alone, tmp_path / "n-00002-of-00002.gguf")
    assert "tensor 'blk.0.attn_k.weight' is in another part too" in load_said(alone)


def test_a_file_without_tensors(tmp_path):
    writer = library.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_token_list(["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "holds no tensors, expected a model's weights" in load_said(tmp_path / "v.gguf")


def test_damaged_files(tmp_path, whole):
    content, file = whole.read_bytes(), tmp_path / "d.gguf"
    for size in (0, 3, 10, 24, 60, 500, 2000, 3000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert f"not a complete GGUF file ({size} bytes; " in load_said(file)
    tokens = content.index(b"tokenizer.ggml.tokens") + 21 + 8
    for at, what in ((tokens, struct.pack("<Q", 2**60)), (8, struct.pack("<Q", 2**50)), (4, b"\x63\0\0\0")):
        file.write_bytes(content[:at] + what + content[at + len(what) :])
        assert "not a complete GGUF file" in load_said(file)
    kind = content.index(b"token_embd.weight") + 17 + 4 + 16
    file.write_bytes(content[:kind] + struct.pack("<I", 250) + content[kind + 4 :])
    assert "(250) is not a valid GGMLQuantizationType); fetch it again, or update the" in load_said(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    assert "Git LFS pointer" in load_said(file)


def test_tensors_that_the_library_cannot_read(tmp_path):
    def change(name, values):
        return (np.zeros(values.shape, np.int8), Kind.I8) if name == "model.norm.weight" else (values, None)

    found = load_said(write_gguf(tmp_path / "m.gguf", "llama2", change))
    assert "tensor 'output_norm.weight' holds I8, expected a type that the gguf library reads" in found


SCALING = "llama.rope.scaling"
WRONG = {
    "an array of head counts": ({"llama.attention.head_count": [4, 4]}, "head_count [4, 4], expected a"),
    "an array of kv head counts": ({"llama.attention.head_count_kv": [2] * 7}, "head_count_kv [2, 2"),
    "an array of widths": ({"llama.feed_forward_length": [48] * 7}, "feed_forward_length [48"),
    "a text": ({"llama.embedding_length": "32"}, "llama.embedding_length '32', expected a whole number"),
    "a negative number": ({"llama.context_length": -1}, "llama.context_length -1"),
    "half a layer": ({"llama.block_count": 7.5}, "llama.block_count 7.5"),
    "very many layers": ({"llama.block_count": 2**31 - 1}, "llama.block_count 2147483647"),
    "truth": ({"llama.block_count": True}, "llama.block_count True"),
    "no number": ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "layer_norm_rms_epsilon nan"),
    "no size": ({"llama.block_count": None}, "no 'llama.block_count', which a GGUF model has"),
    "no architecture": ({"general.architecture": None}, "no 'general.architecture'"),
    "a number as architecture": ({"general.architecture": 3}, "general.architecture 3, expected a text"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "no 'tokenizer.ggml.tokens'"),
    "a text as tokens": ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens 'abc', expected a list"),
    "linear without a factor": ({f"{SCALING}.type": "linear"}, "no 'llama.rope.scaling.factor'"),
    "a factor of 0": ({f"{SCALING}.type": "linear", f"{SCALING}.factor": 0.0}, "scaling.factor 0.0"),
    "yarn without a context": (
        {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 2.0}, "no 'llama.rope.scaling.original_context_len"),
    "another scaling": ({f"{SCALING}.type": "longrope"}, "rope.scaling.type 'longrope', expected one of"),
    "scaled attention": ({f"{SCALING}.attn_factor": 1.2}, "rope.scaling.attn_factor 1.2, expected 1.0"),
    "a scaling of longer texts": ({f"{SCALING}.yarn_log_multiplier": 0.1}, "yarn_log_multiplier 0.1"),
    "a part of a head": ({"llama.rope.dimension_count": 4}, "rope.dimension_count 4, expected 8"),
    "values of another size": ({"llama.attention.value_length": 16}, "attention.value_length 16, expected 8"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count 8, which is not known here"),
    "soft caps": ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping 30.0"),
    "both ways": ({"llama.attention.causal": False}, "llama.attention.causal False, expected true"),
    "a window": ({"llama.attention.sliding_window": 8}, "sliding_window 8"),
    "parts as text": ({"split.count": "2"}, "split.count '2'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_metadata_are_obeyed_or_refused_by_name(name, whole, monkeypatch):
    changes, words = WRONG[name]
    one = gguf_files._open(whole)
    changed = one._replace(metadata=one.metadata | changes)
    monkeypatch.setattr(gguf_files, "_open", lambda file: changed)
    found = load_said(whole)
    assert words in found, found


def test_older_keys_of_metadata_and_those_that_mean_nothing(whole, monkeypatch):
    one = gguf_files._open(whole)

    def shape(**changes):
        metadata = one.metadata | {key.replace("__", "."): value for key, value in changes.items()}
        return gguf.target_config(one._replace(metadata=metadata), "float32", "m.gguf")

    plain = shape()
    assert shape(llama__rope__scale_linear=4.0).rope_divisors == (4.0,) * 4
    more = dict(llama__expert_count=0, llama__vocab_size=96, general__name="x", llama__attention__causal=True)
    assert shape(llama__rope__dimension_count=8, llama__rope__scaling__finetuned=True, **more) == plain


def test_factors_of_frequencies_beside_another_scaling(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", "llama3")
    one = gguf_files._open(file)
    scaled = one.metadata | {f"{SCALING}.type": "linear", f"{SCALING}.factor": 2.0}
    monkeypatch.setattr(gguf_files, "_open", lambda file: one._replace(metadata=scaled))
    assert "found 4 factors in rope_freqs.weight" in load_said(file)
