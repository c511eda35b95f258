"""What is said of a drafter's files that are not right, or not obeyed."""

import dataclasses

import numpy as np
import pytest
import small
from drafter_files import PLAIN, TARGET, VOCAB, change, read, refused, tensors_of, write


def test_drafters_of_other_targets(tmp_path):
    write(tmp_path)
    refused(tmp_path, "belongs to target ours", "theirs", fingerprint="theirs")
    change(tmp_path, {"extra": None})  # drops the fingerprint, as files that others wrote have none
    read(tmp_path, fingerprint="theirs")
    refused(
        tmp_path, "vocab_size 40, expected the target's 41", target=dataclasses.replace(TARGET, vocab_size=41)
    )
    refused(tmp_path, "hidden_size 32", "24 wide", target=dataclasses.replace(TARGET, width=24))


def test_more_layers_than_tensors_are_refused_at_once(tmp_path):
    write(tmp_path)
    change(tmp_path, num_hidden_layers=388)
    refused(tmp_path, "config.json: found 388 layers, but ")


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
    for wrong in (offsets[:-1], offsets[None], offsets.astype("f")):
        change(tmp_path, {"d2t": wrong})
        refused(tmp_path, "tensor 'd2t' is ", "expected whole numbers of the shape (24,)")
    change(tmp_path, {"d2t": offsets, "t2d": mask[1:]})
    refused(tmp_path, "tensor 't2d' is bool of the shape (39,), expected whole numbers of the shape (40,)")


TOP, NESTED = "eagle_aux_hidden_state_layer_ids", "eagle_config"
WRONG = {
    "taps beyond the target": ({TOP: [2, 4, 40]}, f"{TOP} [2, 4, 40], expected ascending", "0 to 9, by"),
    "taps as texts": ({TOP: ["2", "4", "6"]}, f"{TOP} with '2' in it, expected a list of whole numbers"),
    "taps as one text": ({TOP: "246"}, f"{TOP} '246'"),
    "taps twice": ({TOP: [2, 2, 4]}, f"{TOP} [2, 2, 4]"),
    "taps in no order": ({TOP: [6, 4, 2]}, f"{TOP} [6, 4, 2]"),
    "taps below 0": ({TOP: [-1, 4, 6]}, f"{TOP} [-1, 4, 6]"),
    "taps by outputs": ({NESTED: {TOP: [1, 3, 9]}}, f"{NESTED}.{TOP} [1, 3, 9]", "-1 to 8, by their outputs"),
    "two sorts of taps": ({TOP: [2, 4, 6], NESTED: {TOP: [2, 4, 6]}}, f"{NESTED}.{TOP} [2, 4, 6]"),
    "other names of taps": ({"target_layer_ids": [2, 4, 6]}, "target_layer_ids [2, 4, 6]"),
    "their number": ({"num_aux_hidden_states": 4}, "num_aux_hidden_states 4, expected 3"),
    "no taps": ({NESTED: {"use_aux_hidden_state": False}}, "eagle_config.use_aux_hidden_state False"),
    "a list as group": ({NESTED: [1]}, "eagle_config [1], expected a group of keys"),
    "another width": ({"target_hidden_size": 64}, "target_hidden_size 64, expected the target's 32"),
    "too large a vocabulary": ({"draft_vocab_size": 41}, "draft_vocab_size 41, expected at most", "40"),
    "a text as size": ({"hidden_size": "32"}, "hidden_size '32', expected a whole number"),
    "a list as layers": ({"num_hidden_layers": [1]}, "num_hidden_layers [1]"),
    "truth as heads": ({"num_attention_heads": True}, "num_attention_heads True"),
    "kv heads": ({"num_key_value_heads": 3}, "num_key_value_heads 3, expected a divisor"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan"),
    "a text as flag": ({"norm_before_residual": "yes"}, "norm_before_residual 'yes', expected true or false"),
    "a text as scaling": ({"rope_scaling": "linear"}, "rope_scaling 'linear', expected a group of keys"),
    "llama3 without keys": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}, "rope_parameters": {}}, "'rope_scaling.lo"),
    "a part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "a window": ({"sliding_window": 8}, "sliding_window 8"),
    "kinds of layers": ({"layer_types": ["sliding_attention"]}, "'sliding_attention' in layer_types"),
    "biases that are not there": ({"attention_bias": True}, "attention_bias True, expected false, as"),
    "biases of the mlp": ({"mlp_bias": True}, "mlp_bias True"),
    "experts": ({"use_moe": True}, "use_moe True"),
    "scaled logits": ({"logit_scale": 0.5}, "logit_scale 0.5"),
    "another sort of drafter": ({"speculators_model_type": "eagle"}, "speculators_model_type 'eagle'"),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, "'fp8', expected weights in float32"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_obeyed_is_refused_by_name(name, tmp_path):
    values, *said = WRONG[name]
    write(tmp_path)
    change(tmp_path, **values)
    refused(tmp_path, f"{tmp_path}/config.json: found ", *said)


def test_keys_that_change_nothing(tmp_path):
    write(tmp_path)
    change(
        tmp_path,
        max_window_layers=36,
        sliding_window=8,
        use_sliding_window=False,
        num_experts=128,
        logit_scale=1,
    )
    nested = {"use_aux_hidden_state": True, "parallel_draft_step": 1, TOP: []}
    change(tmp_path, eagle_config=nested, layer_types=["full_attention"], target_model_type="gemma3_text")
    assert read(tmp_path).config == PLAIN


def test_quantised_weights_and_pickles(tmp_path):
    write(tmp_path)
    up = tensors_of(tmp_path)["midlayer.mlp.up_proj.weight"]
    change(tmp_path, {"midlayer.mlp.up_proj.weight": up.astype(np.int8)})
    refused(tmp_path, "'midlayer.mlp.up_proj.weight' holds I8, expected weights in float32")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refused(tmp_path, "found pytorch_model.bin, a pickle", "weights_only=True")


def test_a_target_of_few_layers_has_no_usual_taps(tmp_path):
    shallow = dataclasses.replace(small.TINY, layers=2, taps=(0, 1, 2))
    write(tmp_path, target=shallow, server="vllm")
    assert read(tmp_path, shallow).taps == (0, 1, 2)
    change(tmp_path, **{TOP: None})
    refused(tmp_path, f"no {TOP}, which a drafter for 2 layers has", target=shallow)
