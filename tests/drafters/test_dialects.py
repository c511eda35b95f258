"""Drafters in and out: the names and conventions of servers."""

import dataclasses
import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from drafter_files import (
    PLAIN,
    TARGET,
    VOCAB,
    change,
    config_of,
    params_of,
    read,
    refused,
    same,
    tensors_of,
    write,
)

from ppow_jax.drafters import eagle3
from ppow_jax.drafters.eagle3 import Drafter
from ppow_jax.errors import UserError
from ppow_jax.parallel import partition

LAYER = (
    "input_layernorm.weight",
    "hidden_norm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{m}_proj.weight" for m in "qkvo"),
    *(f"mlp.{m}_proj.weight" for m in ("gate", "up", "down")),
)


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


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0}
LONG = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "short_factor": (1.5,) * 6,
    "long_factor": (4.0,) * 6,
}
TRAITS = {
    "layers": (dict(layers=3), "vllm"),
    "layers, sglang": (dict(layers=2), "sglang"),
    "residual": (dict(normed_residual=True), "vllm"),
    "normed state": (dict(feeds_normed=True), "sglang"),
    "norm of each tap": (dict(tap_norms="each"), "vllm"),
    "norm of all taps": (dict(tap_norms="all"), "sglang"),
    "biases": (dict(attention_bias=True, out_bias=True), "vllm"),
    "yarn": (dict(rope_scaling=tuple(YARN.items())), "vllm"),
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
        (dict(rope_scaling=tuple(YARN.items())), "vllm_tpu", "rope_scaling "),
        (dict(rope_scaling=tuple(LONG.items())), "vllm", "long_factor, short_factor of rope_scaling"),
        (dict(rope_scaling=(*YARN.items(), ("mscale", 2.0))), "sglang", "mscale of rope_scaling"),
        (dict(out_bias=True), "vllm", "a bias of the attention's output alone"),
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


def test_vllm_has_a_bias_of_the_output_too_and_gets_zeros(tmp_path):
    config = dataclasses.replace(PLAIN, attention_bias=True, layers=2)
    write(tmp_path, config, "vllm")
    for layer in "01":
        found = tensors_of(tmp_path)[f"layers.{layer}.self_attn.o_proj.bias"]
        assert found.shape == (32,) and not found.any()
    back = read(tmp_path)
    assert back.config == dataclasses.replace(config, out_bias=True)


def test_longrope_depends_on_the_longest_text_of_the_target(tmp_path):
    write(tmp_path)
    scaling = LONG | {"short_factor": [1.5] * 6, "long_factor": [4.0] * 6}
    change(tmp_path, rope_parameters=None, rope_scaling={k: v for k, v in scaling.items() if k != "factor"})
    for context, divisor in ((32, 1.5), (33, 4.0)):
        config = read(tmp_path, dataclasses.replace(TARGET, context=context)).config
        assert config.rope_context == context and dict(config.rope_scaling) == LONG  # 4 = 128 / 32
        rope = Drafter(config).bind({"params": params_of(config)}).attention.rotary
        assert rope.divisors == (divisor,) * 6
        assert rope.scale == pytest.approx(math.sqrt(1 + math.log(4) / math.log(32)))
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    assert eagle3.config_from(values, "x") == config and hash(config)


def test_a_drafter_in_shards(tmp_path):
    params = write(tmp_path)
    tensors = tensors_of(tmp_path)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": list(tensors)[i::2] for i in range(2)}
    for file, names in shards.items():
        safetensors.numpy.save_file(
            {n: tensors[n] for n in names}, tmp_path / file, {"target_fingerprint": "ours"}
        )
    (tmp_path / "model.safetensors").unlink()
    where = {name: file for file, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    back = read(tmp_path)
    assert same(back.params, params) and back.vocab.tolist() == VOCAB.tolist()
    refused(tmp_path, "belongs to target ours", fingerprint="theirs")
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused(tmp_path, "model-00002-of-00002.safetensors: not there", "index.json")


def test_without_a_head_it_predicts_with_the_targets(tmp_path):
    config = dataclasses.replace(PLAIN, vocab_size=TARGET.vocab_size)
    params = write(tmp_path, config, "vllm", vocab=np.arange(TARGET.vocab_size))
    change(tmp_path, {"lm_head.weight": None}, draft_vocab_size=None)
    del params["head"]
    back = read(tmp_path)
    assert back.config == config and back.head == "head" and same(back.params, params)
    change(tmp_path, tie_word_embeddings=True)
    assert read(tmp_path).head == "embedding"
    own = dataclasses.replace(config, embedding_size=TARGET.vocab_size)
    params = write(tmp_path / "own", own, "vllm", vocab=np.arange(TARGET.vocab_size))
    change(tmp_path / "own", {"lm_head.weight": None}, tie_word_embeddings=True)
    back = read(tmp_path / "own")
    assert back.head == "" and same(back.params["head"]["weight"], params["embedding"]["embedding"])
    narrow = dataclasses.replace(own, width=24)
    write(tmp_path / "narrow", narrow, "vllm", vocab=np.arange(TARGET.vocab_size))
    change(tmp_path / "narrow", {"lm_head.weight": None})
    refused(tmp_path / "narrow", "hidden_size 24, expected 32, as wide as the target's head")
    write(tmp_path / "part")
    change(tmp_path / "part", {"lm_head.weight": None})
    refused(tmp_path / "part", "no tensor 'lm_head.weight'")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": 10**9}, {"layers": 0}, {"width": "32"}, {"heads": None}, {"kv_heads": 0}, {"unknown": 1},
        {"tap_norms": "some"}, {"rope_scaling": [1]}, {"rope_scaling": {"rope_type": "yarn"}},
        {"dtype": "int3"},
    ],
)  # fmt: skip
def test_a_shape_that_no_drafter_has(changes):
    with pytest.raises(UserError, match=r"^x/1: the drafter's shape in it is damaged \(.+\); train again$"):
        eagle3.config_from(dataclasses.asdict(PLAIN) | changes, "x/1")


def test_a_file_names_no_class_that_the_settings_do_not(monkeypatch):
    """What `module` names would be imported, and so run."""
    own = dataclasses.asdict(PLAIN) | {"module": "theirs:Drafter"}
    monkeypatch.setattr(
        eagle3.keys, "imported", lambda name, complaint: imports.append(name) or eagle3.Drafter
    )
    imports = []
    with pytest.raises(UserError, match="found a drafter of the class 'theirs:Drafter', expected eagle3"):
        eagle3.config_from(own, "x/1")
    assert imports == []
    assert eagle3.config_from(own, "x/1", "theirs:Drafter").module == "theirs:Drafter"
    assert set(imports) == {"theirs:Drafter"}
