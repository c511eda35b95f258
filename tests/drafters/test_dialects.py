"""Drafters in and out: the names and conventions of servers, and what is said of files that are not right."""

import dataclasses
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import small

from ppow_jax.drafters import eagle3
from ppow_jax.drafters.files import reading, writing
from ppow_jax.errors import UserError
from ppow_jax.models.target import default_taps
from ppow_jax.parallel import partition

TARGET = dataclasses.replace(small.TINY, layers=9, taps=default_taps(9))  # 2, 4, 6
VOCAB = small.DRAFT_VOCAB
PLAIN = eagle3.drafter_config(TARGET, len(VOCAB), 40, "float32")
LAYER = (
    "input_layernorm.weight",
    "hidden_norm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{m}_proj.weight" for m in "qkvo"),
    *(f"mlp.{m}_proj.weight" for m in ("gate", "up", "down")),
)


def params_of(config) -> dict:
    return small.randomise(eagle3.abstract_params(config), 1)


def write(directory, config=PLAIN, server="sglang", dtype="float32", target=TARGET, vocab=VOCAB, params=None):
    params = params or params_of(config)
    writing.write(directory, config, params, vocab, target, server, dtype, "ours")
    return params


def tensors_of(directory: pathlib.Path) -> dict:
    return safetensors.numpy.load_file(directory / "model.safetensors")


def config_of(directory: pathlib.Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def change(directory: pathlib.Path, tensors: dict | None = None, **values) -> None:
    """Other tensors, other values of config.json; None removes one."""
    if tensors:
        changed = {n: t for n, t in (tensors_of(directory) | tensors).items() if t is not None}
        safetensors.numpy.save_file(changed, directory / "model.safetensors")
    config = {k: v for k, v in (config_of(directory) | values).items() if v is not None}
    (directory / "config.json").write_text(json.dumps(config))


def read(directory: pathlib.Path, target=TARGET, fingerprint="ours") -> reading.Imported:
    return reading.read(directory, target, fingerprint)


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)), one, other))


@pytest.mark.parametrize(
    ("server", "layer", "architecture"),
    [
        ("sglang", "midlayer", "LlamaForCausalLMEagle3"),
        ("vllm", "layers.0", "LlamaForCausalLMEagle3"),
        ("vllm_tpu", "midlayer", "Eagle3LlamaForCausalLM"),
    ],
)
def test_names_of_every_server_and_back_to_the_same_bits(server, layer, architecture, tmp_path):
    params = write(tmp_path, server=server)
    found = tensors_of(tmp_path)
    names = {f"{layer}.{name}" for name in LAYER}
    assert set(found) == names | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert found["d2t"].dtype == np.int64 and found["t2d"].dtype == bool
    assert (found["d2t"] + np.arange(len(VOCAB)) == VOCAB).all()
    assert np.flatnonzero(found["t2d"]).tolist() == VOCAB.tolist() and len(found["t2d"]) == TARGET.vocab_size
    q = found[f"{layer}.self_attn.q_proj.weight"]
    assert np.array_equal(q, params["attention"]["query"]["weight"])  # embedding first, as they have it
    config = config_of(tmp_path)
    assert config["architectures"] == [architecture] and config["model_type"] == "llama"
    assert config["draft_vocab_size"] == len(VOCAB) and config["vocab_size"] == TARGET.vocab_size
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == TARGET.rope_theta
    assert config["head_dim"] == 12 and config["num_hidden_layers"] == 1
    assert "eagle_config" not in config and "eagle_aux_hidden_state_layer_ids" not in config
    back = read(tmp_path)
    assert back.config == PLAIN and back.taps == TARGET.taps
    assert same(back.params, params) and back.vocab.tolist() == VOCAB.tolist()


def test_the_dtype_of_the_file_is_the_one_asked_for(tmp_path):
    params = write(tmp_path, dtype="bfloat16")
    kinds = {n: t.dtype for n, t in tensors_of(tmp_path).items()}
    assert {kinds.pop("d2t"), kinds.pop("t2d")} == {np.dtype("int64"), np.dtype("bool")}
    assert (
        set(kinds.values()) == {np.dtype(ml_dtypes.bfloat16)}
        and config_of(tmp_path)["torch_dtype"] == "bfloat16"
    )
    half = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16).astype("f"), params)
    assert same(read(tmp_path).params, half)


def test_tapped_layers_are_outputs_for_sglang_and_inputs_for_vllm(tmp_path):
    target = dataclasses.replace(TARGET, taps=(1, 5, 9))
    write(tmp_path / "s", target=target)
    write(tmp_path / "v", target=target, server="vllm")
    ids = "eagle_aux_hidden_state_layer_ids"
    assert config_of(tmp_path / "s")["eagle_config"][ids] == [0, 4, 8]
    assert config_of(tmp_path / "v")[ids] == [1, 5, 9]
    assert read(tmp_path / "s").taps == read(tmp_path / "v").taps == (1, 5, 9)
    for server, wrong in (("vllm_tpu", (1, 5, 9)), ("sglang", (0, 5, 9))):
        with pytest.raises(UserError, match=rf"'{server}' would ignore .*the taps \({wrong[0]}, 5, 9\)"):
            write(tmp_path, target=dataclasses.replace(TARGET, taps=wrong), server=server)


TRAITS = {
    "layers": (dict(layers=3), "vllm"),
    "layers, sglang": (dict(layers=2), "sglang"),
    "residual": (dict(normed_residual=True), "vllm"),
    "normed state": (dict(feeds_normed=True), "sglang"),
    "norm of each tap": (dict(tap_norms="each"), "vllm"),
    "norm of all taps": (dict(tap_norms="all"), "sglang"),
    "biases": (dict(attention_bias=True), "vllm"),
    "embedding": (dict(embedding_size=TARGET.vocab_size), "vllm"),
    "width": (dict(embedding_size=TARGET.vocab_size, width=24), "sglang"),
    "scaling": (dict(rope_scaling=(("rope_type", "linear"), ("factor", 4.0))), "sglang"),
    "taps": (dict(taps=2, taps_width=64), "vllm"),
}


@pytest.mark.parametrize("trait", TRAITS)
def test_what_a_drafter_may_have_beyond_eagle_3(trait, tmp_path):
    values, server = TRAITS[trait]
    config = dataclasses.replace(PLAIN, **values)
    target = dataclasses.replace(TARGET, taps=(2, 6)) if trait == "taps" else TARGET
    params = write(tmp_path, config, server, target=target)
    back = read(tmp_path, target)
    assert back.config == config and same(back.params, params) and back.taps == target.taps
    laid_out = partition.shard(back.params, partition.make_mesh((-1, 1, 1)))
    assert same(laid_out, params)  # every parameter has its row in the table of layouts


@pytest.mark.parametrize(
    ("values", "server", "said"),
    [
        (dict(normed_residual=True), "sglang", "normed_residual True"),
        (dict(attention_bias=True), "sglang", "attention_bias True"),
        (dict(embedding_size=40), "sglang", "an embedding of its own"),
        (dict(layers=2), "vllm_tpu", "2 layers, expected 1"),
        (dict(tap_norms="each"), "vllm_tpu", "tap_norms 'each'"),
        (dict(head_norms=True), "vllm", "head_norms True"),
        (dict(feeds_normed=True), "vllm_tpu", "feeds_normed True"),
    ],
)
def test_what_a_server_would_ignore_is_not_exported(values, server, said, tmp_path):
    with pytest.raises(UserError, match=f"'{server}' would ignore what this drafter has: {said}"):
        write(tmp_path, dataclasses.replace(PLAIN, **values), server)
    assert not any(tmp_path.iterdir())


def test_a_draft_vocabulary_that_is_the_targets(tmp_path):
    config = dataclasses.replace(PLAIN, vocab_size=TARGET.vocab_size)
    everything = np.arange(TARGET.vocab_size)
    write(tmp_path / "v", config, "vllm", vocab=everything)
    assert "d2t" not in tensors_of(tmp_path / "v")  # vLLM has no place for it then
    write(tmp_path / "s", config, "sglang", vocab=everything)
    assert not tensors_of(tmp_path / "s")["d2t"].any()
    for server in "vs":
        assert read(tmp_path / server).vocab.tolist() == everything.tolist()


def test_files_of_the_speculators_library(tmp_path):
    """Shape one level down, ids of inputs, `layers.0`, its own embedding, the head's norms of Qwen3."""
    config = dataclasses.replace(PLAIN, embedding_size=40, normed_residual=True)
    params = write(tmp_path, config, "vllm")
    values = config_of(tmp_path)
    layer = {k: v for k, v in values.items() if k in ("hidden_size", "intermediate_size", "rms_norm_eps")}
    layer |= {k: v for k, v in values.items() if k.startswith(("num_h", "num_a", "num_k", "head", "rope_p"))}
    layer |= {"model_type": "llama", "vocab_size": 40}
    about = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": layer,
        "draft_vocab_size": len(VOCAB),
        "norm_before_residual": True,
        "eagle_aux_hidden_state_layer_ids": [1, 4, 9],
        "target_hidden_size": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(about))
    back = read(tmp_path)
    assert back.config == config and back.taps == (1, 4, 9) and same(back.params, params)
    norms = {f"layers.0.self_attn.{x}_norm.weight": np.full(12, 2, "f") for x in "qk"}
    change(tmp_path, norms)
    back = read(tmp_path)
    assert back.config.head_norms and back.params["attention"]["query_norm"]["scale"].tolist() == [2] * 12


def test_missing_keys_mean_what_eagles_own_code_takes_them_to_mean(tmp_path):
    write(tmp_path)
    change(tmp_path, rope_theta=None, rope_parameters=None, rms_norm_eps=None, num_hidden_layers=None)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_of(tmp_path) | {"eagle_config": None}))
    back = read(tmp_path).config
    assert (back.rope_theta, back.norm_epsilon, back.layers) == (10_000.0, 1e-6, 1)


def refused(directory: pathlib.Path, *said: str, **how) -> None:
    with pytest.raises(UserError) as e:
        read(directory, **how)
    assert "\n" not in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)


def test_drafters_of_other_targets(tmp_path):
    write(tmp_path)
    refused(tmp_path, "belongs to target ours", "theirs", fingerprint="theirs")
    change(tmp_path, {"extra": None})  # drops the fingerprint, as files that others wrote have none
    read(tmp_path, fingerprint="theirs")
    refused(tmp_path, "vocab_size 40", "the target's 41", target=dataclasses.replace(TARGET, vocab_size=41))
    refused(tmp_path, "hidden_size 32", "24 wide", target=dataclasses.replace(TARGET, width=24))


def test_damaged_and_foreign_files(tmp_path):
    write(tmp_path)
    name = "midlayer.mlp.up_proj.weight"
    up = tensors_of(tmp_path)[name]
    change(tmp_path, {name: up[:-1]})
    refused(tmp_path, name, "(39, 32)", "(40, 32)")
    change(tmp_path, {name: None})
    refused(tmp_path, f"no tensor {name!r}")
    change(tmp_path, {name: up, "midlayer.mlp.gate_proj.bias": np.ones(40, "f")})
    refused(tmp_path, "midlayer.mlp.gate_proj.bias", "no place")
    change(tmp_path, {"midlayer.mlp.gate_proj.bias": None}, hidden_act="relu")
    refused(tmp_path, "config.json", "'relu'", "silu")
    change(tmp_path, hidden_act="silu", norm_output=True, trained_with=None)
    refused(tmp_path, "config.json", "norm_output", "SpecForge")
    change(tmp_path, norm_output=None, hidden_size=None)
    refused(tmp_path, "config.json", "no 'hidden_size'")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(tmp_path, "model.safetensors", "complete")
    file.unlink()
    refused(tmp_path, "model.safetensors", "not there")
    (tmp_path / "config.json").unlink()
    refused(tmp_path, "config.json", "no readable JSON")


def test_vocabularies_that_are_not_what_they_should_be(tmp_path):
    write(tmp_path)
    offsets, mask = tensors_of(tmp_path)["d2t"], tensors_of(tmp_path)["t2d"]
    change(tmp_path, {"d2t": VOCAB.astype(np.int64)})  # absolute ids
    refused(tmp_path, "'d2t'", "absolute")
    change(tmp_path, {"d2t": offsets, "t2d": ~mask})
    refused(tmp_path, "'t2d' and 'd2t'")
    change(tmp_path, {"d2t": None, "t2d": mask})
    refused(tmp_path, "no 'd2t'", "24 draft ids")
