"""Drafters in GGUF files as llama.cpp reads them: written, read back, and refused."""

import dataclasses
import json
import pathlib

import gguf
import jax
import numpy as np
import pytest
from drafter_files import CONVERTED, LLAMA3, PLAIN, TARGET, VOCAB, numbered, params_of, same
from golden_llamacpp import DIVISORS, described

from ppow_jax.drafters import eagle3
from ppow_jax.drafters.files import llamacpp
from ppow_jax.errors import UserError
from ppow_jax.targets import gguf_files
from ppow_jax.training import drafters

TOKENIZER = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.chat_template": "x",
}
GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "golden" / "llamacpp.json").read_text())
SHAPES = {
    "plain": PLAIN,
    "residual": dataclasses.replace(PLAIN, normed_residual=True),
    "narrower": eagle3.drafter_config(TARGET, len(VOCAB), 40, "float32", width=24),
    "more heads": CONVERTED["more_heads"],
    "llama3": CONVERTED["llama3"],
    "all tokens": dataclasses.replace(PLAIN, vocab_size=TARGET.vocab_size),
}


def write(file, config=PLAIN, dtype="float32", params=None, target=TARGET):
    params = params or params_of(config)
    vocab = VOCAB if config.vocab_size == len(VOCAB) else np.arange(config.vocab_size)
    llamacpp.write(file, config, params, vocab, target, TOKENIZER, dtype, "ours")
    return params, vocab


def read(file, target=TARGET):
    return llamacpp.read(file, target, "ours")


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_to_the_same_bits(shape, tmp_path):
    params, vocab = write(tmp_path / "d.gguf", SHAPES[shape])
    found = read(tmp_path / "d.gguf")
    assert found.config == SHAPES[shape] and found.taps == TARGET.taps and found.head == ""
    assert same(found.params, params) and found.vocab.tolist() == vocab.tolist()
    assert found.vocab.dtype == np.int32


@pytest.mark.parametrize("shape", CONVERTED)
def test_our_file_is_that_of_llama_cpps_own_converter(shape, tmp_path):
    """Of what it makes of our files for SGLang: `parity/llamacpp_converter.py`."""
    write(tmp_path / "d.gguf", CONVERTED[shape], params=numbered(CONVERTED[shape]))
    ours = gguf.GGUFReader(tmp_path / "d.gguf")
    assert {t.name: described(t) for t in ours.tensors if t.name != DIVISORS} == GOLDEN[shape]["tensors"]
    divisors = [t.data.tolist() for t in ours.tensors if t.name == DIVISORS]
    assert np.array(divisors) == pytest.approx(np.array(GOLDEN[shape]["divisors"]), rel=1e-6)
    keys = {key: field.contents() for key, field in ours.fields.items() if key.startswith("eagle3.")}
    assert keys == {f"eagle3.{key}": value for key, value in GOLDEN[shape]["keys"].items()}


def test_names_keys_and_rows_as_llama_cpp_has_them(tmp_path):
    params, _ = write(tmp_path / "d.gguf", SHAPES["llama3"])
    metadata, tensors = gguf_files.read(tmp_path / "d.gguf")
    of = {name: gguf_files.values(t, tmp_path) for name, t in tensors.items() if name != "d2t"}
    layer = ("attn_norm", "attn_norm_2", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output")
    names = {f"blk.0.{x}.weight" for x in (*layer, "ffn_gate", "ffn_up", "ffn_down")}
    assert set(of) == names | {"fc.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
    assert tensors["d2t"].tensor_type == gguf.GGMLQuantizationType.I64
    assert tensors["d2t"].data.reshape(-1).tolist() == VOCAB.tolist()  # ids, not offsets
    assert of["fc.weight"].shape == (32, 96) and of["output.weight"].shape == (24, 32)
    q = params["attention"]["query"][
        "weight"
    ]  # rotary pairs i and i + 6 of 12; there they stand side by side
    first = np.asarray(q)[:12]
    assert np.array_equal(of["blk.0.attn_q.weight"][:12], first[[0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]])
    assert np.array_equal(of["blk.0.attn_norm_2.weight"], params["hidden_norm"]["scale"])
    assert metadata["general.architecture"] == "eagle3"
    expected = {
        "target_layers": [2, 4, 6],
        "target_hidden_size": 32,
        "embedding_length": 32,
        "block_count": 1,
        "rope.freq_base": 10_000.0,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 12,
        "attention.value_length": 12,
        "rope.dimension_count": 12,
        "feed_forward_length": 40,
        "context_length": 128,
        "vocab_size": 40,
        "norm_before_residual": False,
        "norm_before_fc": False,
    }
    assert {key: metadata[f"eagle3.{key}"] for key in expected} == expected
    assert metadata["eagle3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert {key: metadata[key] for key in TOKENIZER} == TOKENIZER
    # of a context of 32, the longest wavelengths 8 times as long, the shortest as they were
    assert of["rope_freqs.weight"][0] == 1 and of["rope_freqs.weight"][-1] == 8


@pytest.mark.parametrize(
    ("dtype", "kind", "error"),
    [
        ("float16", "F16", 1e-3),
        ("bfloat16", "BF16", 1e-2),
        ("q8_0", "Q8_0", 1e-2),
        ("q4_0", "Q4_0", 0.15),
        ("q4_1", "Q4_1", 0.15),
    ],
)
def test_types_of_weights(dtype, kind, error, tmp_path):
    """Norms stay float32, and so rows that a block of 32 does not divide stay float16."""
    config = dataclasses.replace(PLAIN, mlp_hidden=40)
    params, _ = write(tmp_path / "d.gguf", config, dtype)
    tensors = gguf_files.read(tmp_path / "d.gguf").tensors
    stored = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert stored["blk.0.ffn_norm.weight"] == "F32"
    assert stored["output.weight"] == stored["blk.0.attn_q.weight"] == kind
    assert stored["blk.0.ffn_down.weight"] == ("F16" if "q" in dtype else kind)
    found = read(tmp_path / "d.gguf").params

    def near(one, other):
        scale = np.abs(np.asarray(other)).max()
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= error * scale

    jax.tree.map(near, found, params)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(layers=2), "2 layers, expected 1"),
        (dict(taps=2, taps_width=64), "2 taps, expected 3"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(out_bias=True), "out_bias True"),
        (dict(head_norms=True), "head_norms True"),
        (dict(tap_norms="all"), "tap_norms 'all'"),
        (dict(feeds_normed=True), "feeds_normed True"),
        (dict(rope_scaling=(("rope_type", "linear"), ("factor", 2.0))), "linear scaling of its wavelengths"),
        (dict(module="mine:Drafter"), "the class 'mine:Drafter'"),
    ],
)
def test_drafters_that_llama_cpp_cannot_run(changes, said, tmp_path):
    with pytest.raises(UserError, match="'llamacpp' cannot run this drafter") as e:
        llamacpp.check(dataclasses.replace(PLAIN, **changes), TARGET)
    assert said in str(e.value)


@pytest.mark.parametrize("changes", [dict(attention_bias=True), dict(post_norms=True)])
def test_targets_whose_layers_llama_cpp_does_not_tap(changes):
    with pytest.raises(UserError, match=r"a target whose layers llama.cpp does not tap \(Qwen2, Gemma 3\)"):
        llamacpp.check(PLAIN, dataclasses.replace(TARGET, **changes))


def test_the_output_of_the_last_layer_is_no_tap_there():
    """llama.cpp reads it as zeros, without a word."""
    llamacpp.check(PLAIN, dataclasses.replace(TARGET, taps=(2, 4, TARGET.layers - 1)))
    with pytest.raises(UserError, match="a tap at 9, the last layer's output, which it gives as zeros"):
        llamacpp.check(PLAIN, dataclasses.replace(TARGET, taps=(2, 4, TARGET.layers)))


def rewritten(tmp_path, metadata=None, tensors=None, without=()):
    """A drafter's file with other keys and tensors."""
    write(tmp_path / "d.gguf")
    source, file = gguf.GGUFReader(tmp_path / "d.gguf"), tmp_path / "changed.gguf"
    metadata = dict(metadata or {})
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture", "eagle3"))
    known = gguf_files.read(tmp_path / "d.gguf").metadata
    known = {k: v for k, v in known.items() if not k.startswith("GGUF.") and k != "general.architecture"}
    for key, value in (known | metadata).items():
        if value is not None:
            llamacpp._add(writer, key, value)
    found = {t.name: np.array(t.data) for t in source.tensors} | (tensors or {})
    for name, values in found.items():
        if name not in without:
            writer.add_tensor(name, values)
    gguf_files.close(writer)
    return file


FREQUENCIES = np.ones(6, np.float32)


def key(name, value):
    return {"metadata": {name: value}}


def tensor(name, values):
    return {"tensors": {name: values}}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (key("general.architecture", "llama"), "general.architecture 'llama', expected one of eagle3"),
        (key("eagle3.block_count", 2), "eagle3.block_count 2, expected 1: a drafter of one layer"),
        (key("eagle3.norm_before_fc", True), "eagle3.norm_before_fc True, expected false"),
        (key("eagle3.target_layers", [4, 2, 6]), "eagle3.target_layers [4, 2, 6], expected ascending"),
        (key("eagle3.target_layers", [2, 4, 16]), "expected ascending layers of the target, from 0 to 9"),
        (key("eagle3.target_layers", [2, 4]), "expected a list of 3 whole numbers"),
        (key("eagle3.target_hidden_size", 64), "the target's 32; this drafter is for another target"),
        (key("eagle3.rope.freq_base", None), "found no 'eagle3.rope.freq_base'"),
        (key("eagle3.attention.head_count_kv", 3), "expected a divisor of head_count, 4"),
        (key("eagle3.rope.dimension_count", 6), "eagle3.rope.dimension_count 6, expected 12"),
        (key("eagle3.attention.key_length", 13), "expected an even size of heads"),
        (key("eagle3.logit_scale", 2.0), "eagle3.logit_scale 2.0, which is not known here"),
        (key("eagle3.embedding_length", 24), "expected 32, as wide as the target's embedding"),
        (key("ppow_jax.target_fingerprint", "theirs"), "belongs to target theirs, not to ours"),
        (key("ppow_jax.rope_scaling", "[1"), "expected a list of keys and values of rope_scaling"),
        (key("ppow_jax.rope_scaling", "[" * 5000), "expected a list of keys and values of rope_scaling"),
        (key("ppow_jax.rope_scaling", '["ab", "cd"]'), "rope_scaling.a 'b', which is not known here"),
        (key("ppow_jax.rope_scaling", '[["rope_type", "foo"]]'), "rope_type 'foo', expected one of default"),
        (key("ppow_jax.rope_scaling", '[["rope_type", "llama3"]]'), "found no 'rope_scaling.factor'"),
        (key("ppow_jax.rope_scaling", '[["rope_type", "linear"], ["factor", 2.0]]'), "of the kind 'llama3'"),
        (tensor("rope_freqs.weight", FREQUENCIES * 2), "stretches the wavelengths in a way that"),
        (tensor("blk.0.attn_q.bias", FREQUENCIES), "tensor 'blk.0.attn_q.bias' has no place"),
        (tensor("d2t", VOCAB[::-1].astype(np.int64)), "'d2t' does not hold 24 ascending ids below 40"),
        (tensor("d2t", VOCAB.astype(np.int64) - 30), "'d2t' does not hold 24 ascending ids below 40"),
        (tensor("output.weight", FREQUENCIES), "'output.weight' has the shape (6,), expected two axes"),
        (tensor("d2t", VOCAB.astype(np.int64) + 30), "'d2t' does not hold 24 ascending ids below 40"),
        (tensor("output_norm.weight", FREQUENCIES), "has the shape (6,), expected (32,)"),
        (dict(without=("fc.weight",)), "found no tensor 'fc.weight', which an EAGLE-3 drafter has"),
        (dict(without=("output.weight",)), "found no tensor 'output.weight', which an EAGLE-3 drafter has"),
        (dict(without=("d2t",)), "'d2t' does not hold 24 ascending ids"),
    ],
)  # fmt: skip
def test_files_that_hold_another_drafter_or_none(how, said, tmp_path):
    with pytest.raises(UserError) as e:
        read(rewritten(tmp_path, **how))
    assert said in str(e.value) and "\n" not in str(e.value)
    assert read(rewritten(tmp_path)).config == PLAIN


def test_what_the_scaling_of_others_is_called_is_not_guessed(tmp_path):
    write(tmp_path / "d.gguf", SHAPES["llama3"])
    scaling = json.loads(gguf_files.read(tmp_path / "d.gguf").metadata["ppow_jax.rope_scaling"])
    assert dict(map(tuple, scaling)) == LLAMA3


def test_a_config_names_the_file(tmp_path):
    write(tmp_path / "d.gguf")
    assert drafters.imported(str(tmp_path / "d.gguf"), TARGET, "ours").config == PLAIN
    (tmp_path / "d.gguf").rename(tmp_path / "D.GGUF")
    assert drafters.imported(str(tmp_path / "D.GGUF"), TARGET, "ours").config == PLAIN
    (tmp_path / "directory.gguf").mkdir()
    with pytest.raises(UserError, match=r"directory.gguf' has no config.json; expected a directory of"):
        drafters.imported(str(tmp_path / "directory.gguf"), TARGET, "ours")
    (tmp_path / "text").write_text("no drafter")
    with pytest.raises(UserError, match="is no GGUF file"):
        drafters.imported(str(tmp_path / "text"), TARGET, "ours")
    with pytest.raises(UserError, match=r"^config.drafter.path: no directory .*none.gguf"):
        drafters.imported(str(tmp_path / "none.gguf"), TARGET, "ours")
