"""Targets' files that strangers make: each is read, or refused in one line."""

import functools
import json
import pathlib

import gguf_bytes
import numpy as np
import pytest
import safetensors.numpy
import strange
from dice import Dice

from ppow_jax.models import target as models_target
from ppow_jax.models.target import with_taps
from ppow_jax.parallel import partition
from ppow_jax.targets import families, gguf, huggingface, load, orbax, sandbox, tokenizer_files
from ppow_jax.targets.tokenizer import with_stops

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 14, "hidden_size": 8,
    "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
    "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False, "torch_dtype": "float32",
    "eos_token_id": [13], "transformers_version": "4.52",
}  # fmt: skip
LAYER = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (16, 8), "mlp.up_proj": (16, 8), "mlp.down_proj": (8, 16), "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
}  # fmt: skip
SHAPES = {f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()}
SHAPES |= {"model.embed_tokens.weight": (14, 8), "model.norm.weight": (8,)}
SHARDS = ("model-1.safetensors", "model-2.safetensors")
INDEX = "model.safetensors.index.json"
TAPS = (0, 1)
ROPE = {
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "longrope": {"rope_type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 4.0],
                 "original_max_position_embeddings": 32},
}  # fmt: skip
LOCAL = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
CONFIGS = {
    "llama": CONFIG | {"rope_scaling": ROPE["llama3"]},
    "qwen3": CONFIG | {"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8,
                       "layer_types": ["sliding_attention"], "rope_parameters": ROPE["yarn"]},
    "qwen2": CONFIG | {"model_type": "qwen2", "attention_bias": True, "max_window_layers": 1,
                       "rope_scaling": ROPE["longrope"]},
    "gemma3": {"model_type": "gemma3", "vision_config": {}, "text_config": CONFIG | {
        "model_type": "gemma3_text", "sliding_window": 8, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16, "sliding_window_pattern": 2, "rope_parameters": LOCAL,
        "rope_theta": None, "hidden_act": None}},
}  # fmt: skip


def shards() -> dict[str, bytes]:
    """A model's weights in two files, their index and its config."""
    where = {name: SHARDS[i % 2] for i, name in enumerate(sorted(SHAPES))}
    parts = [{n: np.ones(SHAPES[n], np.float32) for n in where if where[n] == shard} for shard in SHARDS]
    files = {shard: safetensors.numpy.save(part) for shard, part in zip(SHARDS, parts, strict=True)}
    files[INDEX] = json.dumps({"metadata": {"total_size": 0}, "weight_map": where}).encode()
    return files | {"config.json": json.dumps(CONFIG).encode()}


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Shapes of parameters are worked out once a shape; templates may compute for a tenth of a second."""
    shapes = functools.lru_cache(512)(models_target.abstract_params)
    for module in (huggingface, gguf, orbax):
        monkeypatch.setattr(module, "abstract_params", shapes)
    monkeypatch.setattr(sandbox, "_SECONDS", 0.1)


@pytest.fixture(scope="module")
def mesh():
    return partition.make_mesh((-1, 1, 1))


@strange.counts()
def test_gguf(count, mesh, tmp_path):
    name = "model.gguf"
    place = strange.Place(tmp_path, {name: gguf_bytes.file(gguf_bytes.sound())})

    def read(directory: pathlib.Path) -> None:
        load.read(str(directory / name), "float32", mesh, TAPS)

    read(place.here)
    of_file = strange.changes(others=[name])

    def make(dice: Dice) -> list:
        return of_file(dice) if dice.below(3) == 0 else [gguf_bytes.Content(name, strange.edits(dice))]

    strange.examples(count, make, lambda made: place.hold(made, read))


@strange.counts()
def test_safetensors(count, mesh, tmp_path):
    place = strange.Place(tmp_path, shards())

    def read(directory: pathlib.Path) -> None:
        huggingface.load(directory, "float32", mesh, TAPS)

    read(place.here)
    made = strange.changes([INDEX], SHARDS)
    strange.examples(count, made, lambda made: place.hold(made, read))


@strange.counts(len(CONFIGS), fast=25)
@pytest.mark.parametrize("family", CONFIGS)
def test_config(count, family, tmp_path):
    place = strange.Place(tmp_path, {"config.json": strange.dumped(CONFIGS[family])})

    def read(directory: pathlib.Path) -> None:
        if found := huggingface.find(str(directory)):
            about = huggingface.description(str(found))
            with_taps(families.target_config(about, True, "float32", str(found / "config.json")), TAPS)

    read(place.here)
    made = strange.changes(["config.json"])
    strange.examples(count, made, lambda made: place.hold(made, read, "config.target.taps"))


TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m.content }}<end>{% endfor %}"
CORE = {
    "version": "1.0", "truncation": None,
    "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                "pad_type_id": 0, "pad_token": "a"},
    "added_tokens": [
        {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True} for i, text in ((6, "<begin>"), (7, "<end>"))
    ],
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFC"}, {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "a|b"}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]},
    "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<begin>",
    "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<begin>": {"id": "<begin>", "ids": [6], "tokens": ["<begin>"]}}},
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "dropout": 0.1, "unk_token": "c", "continuing_subword_prefix": None,
              "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
              "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "Ġ": 4, "x": 5}, "merges": [["a", "b"]]},
}  # fmt: skip
TOKENIZER = {
    "tokenizer.json": CORE,
    "tokenizer_config.json": {
        "bos_token": {"content": "<begin>", "lstrip": False},
        "eos_token": "<end>",
        "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "tools", "template": "x"}],
        "additional_special_tokens": ["<x>"],
        "split_special_tokens": False,
    },
    "special_tokens_map.json": {"pad_token": {"content": "<pad>", "special": True}},
    "added_tokens.json": {"<l>": 8},
    "generation_config.json": {"eos_token_id": [7, 6]},
    "chat_template.json": {"chat_template": TEMPLATE},
}


@strange.counts()
def test_tokenizer(count, tmp_path):
    place = strange.Place(tmp_path, {name: strange.dumped(value) for name, value in TOKENIZER.items()})

    def read(directory: pathlib.Path) -> None:
        found = with_stops(tokenizer_files.read(directory))
        ids = found.encode("abcab x<end>")
        found.decode(ids)
        found.encode_after(" a")

    read(place.here)
    json_names = ["tokenizer.json", "tokenizer_config.json", *TOKENIZER]
    made = strange.changes(json_names, others=["chat_template.jinja"])
    strange.examples(count, made, lambda made: place.hold(made, read, "chat template", "tokenizer:"))
