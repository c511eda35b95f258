"""Hugging Face directories: what is read, and what is said of those that are not right."""

import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import small
import tokenizers
from golden_families import GOLDEN, load, parity, write
from tokenizers import decoders, models, pre_tokenizers

from ppow_jax.errors import UserError
from ppow_jax.models import rotary
from ppow_jax.models.target import fingerprint
from ppow_jax.parallel import partition
from ppow_jax.settings import TargetSettings
from ppow_jax.targets import families, huggingface, orbax
from ppow_jax.targets.load import load as load_target
from ppow_jax.targets.load import read as read_target

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role|upper }}\n{{ m.content }} <|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>ASSISTANT\n{% endif %}"
)


def write_tokenizer(directory: pathlib.Path, template: str = CHATML, extra: int = 0, **about) -> None:
    """A byte-level tokenizer of 70 ids and `extra` more."""
    letters = [chr(33 + i) for i in range(64)] + ["Ġ", "Ċ"]
    core = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(
        ["<|begin|>", "<|eot|>", "<|start|>", "<|end|>", *(f"<{i}>" for i in range(extra))]
    )
    core.save(str(directory / "tokenizer.json"))
    about = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|eot|>", "chat_template": template} | about
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [67, 69]}))


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    write(tmp_path / "model", "llama2", shards=3)
    write_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def target(path: str):
    return load_target(TargetSettings(path, "float32", ()), partition.make_mesh((-1, 1, 1)))


def refused(directory: pathlib.Path, *said: str) -> None:
    with pytest.raises(UserError) as e:
        target(str(directory))
    assert "\n" not in str(e.value)
    for words in said:
        assert words in str(e.value), str(e.value)


def change(directory: pathlib.Path, **values) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_shards_are_one_file_and_the_dtype_is_the_one_asked_for(tmp_path, directory):
    one, sharded = load(write(tmp_path / "one", "llama2"))[1], target(str(directory))[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), one, sharded))
    half = load(directory, "bfloat16")[1]
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16"}
    stored = {
        n: parity.weights(n, tuple(s)).astype("bfloat16") for n, s in GOLDEN["llama2"]["shapes"].items()
    }
    safetensors.numpy.save_file(stored, tmp_path / "one/model.safetensors")
    again = load(tmp_path / "one")[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b.astype("float32")).all(), again, half))


def test_the_tokenizer_of_a_directory(directory):
    tokens = target(str(directory))[2]
    assert tokens.stop_ids == (69, 67)  # the one that the template writes comes first
    assert tokens.decode(tokens.first_turn("!")) == "<|begin|><|start|>USER\n! <|end|>\n<|start|>ASSISTANT\n"
    assert tokens.size == 70
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}"
    )
    assert target(str(directory))[2].first_turn("AB") == [32, 33, 67]  # a file of its own is preferred
    write_tokenizer(directory, [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML}])
    (directory / "chat_template.jinja").unlink()
    assert target(str(directory))[2].first_turn("!") == tokens.first_turn("!")


def test_a_part_of_a_tensor_is_read_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(huggingface, "_AT_ONCE", 40)  # two rows of five, four bytes each
    whole, read = np.arange(77, dtype=np.float32).reshape(11, 7), []

    class Rows:
        def __getitem__(self, at):
            read.append(at[0])
            return whole[at]

    like = jax.ShapeDtypeStruct(whole.shape, np.float32)
    found = huggingface._slice(Rows(), (slice(3, 8), slice(1, 6)), like)
    assert np.array_equal(found, whole[3:8, 1:6])
    assert read == [slice(3, 5), slice(5, 7), slice(7, 8)]
    assert np.array_equal(huggingface._slice(Rows(), (slice(None), slice(None)), like), whole)


def test_a_missing_file(directory):
    shard = directory / "model-00002-of-00003.safetensors"
    shard.unlink()
    refused(directory, shard.name, "not there", "model.safetensors.index.json")


def test_a_truncated_file(directory):
    shard = directory / "model-00002-of-00003.safetensors"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    refused(directory, shard.name, f"{size - 100} bytes", "complete")


def test_a_tensor_too_many_or_too_few_or_of_another_shape(directory):
    shard = directory / "model-00001-of-00003.safetensors"
    tensors = safetensors.numpy.load_file(shard)
    safetensors.numpy.save_file(tensors | {"model.layers.0.self_attn.sinks": np.ones(4, "f")}, shard)
    refused(directory, shard.name, "model.layers.0.self_attn.sinks", "no place")
    safetensors.numpy.save_file(tensors | {"model.layers.7.input_layernorm.weight": np.ones(32, "f")}, shard)
    refused(directory, shard.name, "model.layers.7.input_layernorm.weight", "no place")
    safetensors.numpy.save_file(tensors | {"model.embed_tokens.weight": np.ones((95, 32), "f")}, shard)
    refused(directory, shard.name, "model.embed_tokens.weight", "(95, 32)", "(96, 32)")
    safetensors.numpy.save_file({n: t for n, t in tensors.items() if "embed" not in n}, shard)
    index = directory / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {n: f for n, f in where.items() if "embed" not in n}}))
    refused(directory, "no tensor for embedding/embedding", "config.json")


def test_an_architecture_that_is_not_supported(directory):
    change(directory, model_type="mamba")
    refused(directory, "config.json", "'mamba'", "llama, mistral, qwen2, qwen3, gemma3_text")
    change(directory, model_type="llama", hidden_act="relu")
    refused(directory, "config.json", "'relu'", "silu")
    change(directory, hidden_act="silu", attention_bias=True)
    refused(directory, "no tensor for layers_0/attention/key/bias, which config.json asks for")
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    change(directory, attention_bias=False, rope_parameters=None, rope_scaling=scaling)
    refused(directory, "config.json", "'dynamic'", "llama3")
    file = directory / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "hidden_size"}))
    refused(directory, "config.json", "'hidden_size'")
    file.write_text("{")
    refused(directory, "config.json", "JSON")


def test_a_tokenizer_of_another_model_or_none(directory):
    write_tokenizer(directory, chat_template=None)
    refused(directory, "chat_template.jinja")
    write_tokenizer(directory, extra=27)  # <26> has the id 96, of no row: a token for padding, say
    text = target(str(directory))[2]
    assert text.encode("<25>A") == [95, 32]
    with pytest.raises(UserError, match=r"the token '<26>' \(id 96\), expected ids below 96"):
        text.first_turn("A<26>")
    saved = json.loads((directory / "tokenizer.json").read_text())
    saved["model"]["vocab"] |= {f"word{i}": 66 + i for i in range(31)}
    saved["added_tokens"] = [token | {"id": token["id"] + 31} for token in saved["added_tokens"]]
    (directory / "tokenizer.json").write_text(json.dumps(saved))
    (directory / "generation_config.json").unlink()
    refused(directory, "the id 96", "below 96", "of two models")
    (directory / "tokenizer.json").write_text("{}")
    refused(directory, "tokenizer.json", "no readable tokenizer")


def test_a_path_that_means_nothing_and_one_that_means_the_directory(tmp_path, directory):
    refused(tmp_path, "no config.json")
    refused(tmp_path / "nothing here", "no file", "Hugging Face directory")
    refused("models/none.gguf", "no file 'models/none.gguf'")
    refused("", "no file ''")
    refused("package:no.such/package", "the package 'no.such/package' is not installed")
    refused("markov:\u00b2", "expected 'markov:SEED'")
    for name in ("config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"):
        assert huggingface.find(str(directory / name)) == directory


def test_int8_weights_are_refused_and_the_config_names_their_scheme(directory):
    shard = directory / "model-00001-of-00003.safetensors"
    tensors = {n: (t * 9).astype(np.int8) for n, t in safetensors.numpy.load_file(shard).items()}
    safetensors.numpy.save_file(tensors, shard)
    refused(directory, shard.name, "holds I8, expected weights in float32")
    change(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    refused(directory, "config.json", "the scheme 'bitsandbytes', 8 bits")


def test_a_head_that_is_tied_and_is_not(directory):
    change(directory, tie_word_embeddings=True)
    refused(directory, "config.json: found tie_word_embeddings true, but lm_head.weight is not")
    names = ("lm_head.weight", "model.embed_tokens.weight")
    where = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    embedding = safetensors.numpy.load_file(directory / where[names[1]])[names[1]]
    tensors = safetensors.numpy.load_file(directory / where[names[0]])
    safetensors.numpy.save_file(tensors | {names[0]: embedding}, directory / where[names[0]])
    assert "head" not in load(directory)[1]


@pytest.mark.parametrize(("layers", "example"), [(1, "(0, 1)"), (2, "(0, 1, 2)"), (6, "(0, 3, 6)")])
def test_a_target_of_few_layers_asks_for_its_taps(layers, example, directory):
    change(directory, num_hidden_layers=layers)
    said = f"a target of {layers} layers is too shallow", f"ascending from 0 to {layers}, such as {example}"
    refused(directory, "config.target.taps: found none", *said)  # before the weights are looked at
    drop = [f"model.layers.{layer}." for layer in range(layers, 7)]
    tensors = {n: parity.weights(n, tuple(s)) for n, s in GOLDEN["llama2"]["shapes"].items()}
    kept = {n: t for n, t in tensors.items() if not n.startswith(tuple(drop))}
    safetensors.numpy.save_file(kept, directory / "model.safetensors")
    mesh = partition.make_mesh((-1, 1, 1))
    assert load_target(TargetSettings(str(directory), "float32", (0, layers)), mesh)[0].taps == (0, layers)
    if layers == 2:  # it can be converted, and asks then
        orbax.save(directory / "converted", *read_target(str(directory), "float32", mesh))
        refused(directory / "converted", "config.target.taps: found none", *said)


def test_older_files_say_the_same_in_other_keys():
    for name, older in (
        ("llama3", {"rope_theta": 500.0, "rope_scaling": {"type": "llama3"}}),
        ("gemma3", {"rope_theta": 1000.0, "rope_local_base_freq": 100.0, "sliding_window_pattern": 3}),
    ):
        new = GOLDEN[name]["config"]
        rope = new["rope_parameters"]
        scaling = {k: v for k, v in rope.get("full_attention", rope).items() if k not in ("rope_theta",)}
        old = {k: v for k, v in new.items() if k not in ("rope_parameters", "layer_types")} | older
        old["rope_scaling"] = scaling | older.get("rope_scaling", {})
        if name == "llama3":
            del old["rope_scaling"]["rope_type"]
        want = families.target_config(new, False, "float32", "")
        assert families.target_config(old, False, "float32", "") == want
        assert families.target_config(old | {"rope_parameters": None}, False, "float32", "") == want
        assert len(want.rope_divisors) == want.head_size // 2


def test_llama3_divisors_by_hand():
    # wavelengths 2 pi and 20 pi in a context of 64 fit 10.2 and 1.02 times: the first stays, the second is
    # stretched but for 0.019 / 3 of it
    first, second = rotary.llama3_divisors(100.0, 4, 8.0, 1.0, 4.0, 64)
    assert first == 1
    kept = (64 / (20 * np.pi) - 1) / 3
    assert second == pytest.approx(1 / ((1 - kept) / 8 + kept)) and 7.5 < second < 8


def test_a_model_that_sees_pictures_has_a_part_about_text(tmp_path):
    plain, seeing = write(tmp_path / "plain", "gemma3"), write(tmp_path / "seeing", "gemma3")
    tensors = safetensors.numpy.load_file(seeing / "model.safetensors")
    tensors = {n.replace("model.", "language_model.model.", 1): t for n, t in tensors.items()}
    tensors["vision_tower.embeddings.weight"] = np.ones((2, 2), "f")
    safetensors.numpy.save_file(tensors, seeing / "model.safetensors")
    config = {"model_type": "gemma3", "text_config": GOLDEN["gemma3"]["config"]}
    (seeing / "config.json").write_text(json.dumps(config))
    one, other = load(plain), load(seeing)
    assert one[0] == other[0]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), one[1], other[1]))
    assert huggingface.find(str(seeing)) == seeing


def test_converted_to_an_orbax_checkpoint_it_is_the_same_target(directory, tmp_path):
    config, params, tokens = target(str(directory))
    orbax.save(tmp_path / "converted", config, params, tokens)
    again, same, text = target(str(tmp_path / "converted"))
    assert again == config and fingerprint(again, same) == fingerprint(config, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all() and a.sharding == b.sharding, params, same))
    assert text.first_turn("AB") == tokens.first_turn("AB") and text.stop_ids == tokens.stop_ids
    mesh = partition.make_mesh((-1, 1, 1))
    _, half, _ = load_target(TargetSettings(str(tmp_path / "converted"), "bfloat16", ()), mesh)
    assert {str(x.dtype) for x in jax.tree.leaves(half)} == {"bfloat16"}
    manifest = tmp_path / "converted/target_manifest.json"
    held = json.loads(manifest.read_text())
    old = {"template": CHATML, "stop_ids": [69, 67], "bos": "<|begin|>", "eos": ""}
    manifest.write_text(json.dumps(held | {"tokenizer": old}))  # as before it held all special tokens
    before = target(str(tmp_path / "converted"))[2]
    assert before.first_turn("AB") == tokens.first_turn("AB") and before.variables == {
        "bos_token": "<|begin|>"
    }
    manifest.write_text(json.dumps(held | {"format": 2}))
    refused(tmp_path / "converted", "format 2", "expected 1")


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_is_the_same_from_a_gguf_file_a_directory_and_an_orbax_checkpoint(tmp_path):
    """Bit for bit, so that logits are too. transformers' own conversion gave the same: docs/interop.md."""
    config, params, tokens = target(f"package:{small.SMOLLM2}")
    name = fingerprint(config, params)
    names = {ours: theirs for theirs, ours in (huggingface._MODULES | huggingface._NORMS[False]).items()}
    ends = {ours: theirs for theirs, ours in huggingface._ENDS.items()}
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        at = partition.path_name(path)
        if at not in ends:
            layer, module = at.rsplit("/", 1)[0].split("/", 1)
            at = f"model.layers.{layer.removeprefix('layers_')}.{names[module]}.weight"
        else:
            at = ends[at]
        tensors[at] = np.asarray(leaf)
    values = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_hidden,
        "max_position_embeddings": config.context,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": True,
        "eos_token_id": tokens.stop_ids[0],
    }
    directory = tmp_path / "hf"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "chat_template.jinja").write_text(tokens.template)
    about = {"bos_token": tokens.bos, "eos_token": tokens.eos}
    (directory / "tokenizer_config.json").write_text(json.dumps(about))
    tokens.core.save(str(directory / "tokenizer.json"))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    orbax.save(tmp_path / "orbax", config, params, tokens)
    for where in ("hf", "orbax"):
        again, same, text = target(str(tmp_path / where))
        assert again == config and fingerprint(again, same) == name
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, np.asarray(b)), params, same))
        assert text.first_turn("1 + 1 is?") == tokens.first_turn("1 + 1 is?")
        assert text.stop_ids == tokens.stop_ids


def test_more_layers_than_tensors_are_refused_at_once(directory):
    change(directory, num_hidden_layers=900)
    refused(directory, "config.json: found 900 layers, but ", "tensors")
