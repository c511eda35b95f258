"""GGUF files hold the same model as the Hugging Face directory; every quantisation is read."""

import json
import math
import pathlib
import shutil
import struct

import gguf as library
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from golden_families import GOLDEN, load, parity, write

from ppow_jax.errors import UserError
from ppow_jax.models import rotary
from ppow_jax.targets import gguf, gguf_files

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
FAMILIES = ("llama2", "llama3", "qwen2", "qwen3", "gemma3", "llama_yarn")
SIZES = {  # key of config.json -> method of the writer
    "hidden_size": "add_embedding_length",
    "num_hidden_layers": "add_block_count",
    "num_attention_heads": "add_head_count",
    "num_key_value_heads": "add_head_count_kv",
    "head_dim": "add_key_length",
    "intermediate_size": "add_feed_forward_length",
    "max_position_embeddings": "add_context_length",
    "rms_norm_eps": "add_layer_norm_rms_eps",
    "sliding_window": "add_sliding_window",
}


def name_in_gguf(name: str, gemma: bool) -> str:
    if name in ENDS:
        return ENDS[name]
    _, _, layer, module, kind = name.replace("self_attn.", "self_attn_").replace("mlp.", "mlp_").split(".")
    module = module.replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
    if gemma and module == "post_attention_layernorm":
        return f"blk.{layer}.post_attention_norm.{kind}"
    return f"blk.{layer}.{NAMES[module]}.{kind}"


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: the two halves of a head interleaved."""
    by_head = rows.reshape(heads, 2, rows.shape[0] // heads // 2, -1)
    return np.stack([by_head[:, 0], by_head[:, 1]], 2).reshape(rows.shape)


def write_gguf(
    file: pathlib.Path, name: str, change=lambda name, values: (values, None), a_part=0, **more
) -> pathlib.Path:
    """The family's model as llama.cpp's converter would write it, some tensors a part if it is split."""
    config, shapes = GOLDEN[name]["config"] | more, GOLDEN[name]["shapes"]
    arch = {"gemma3_text": "gemma3", "mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = library.GGUFWriter(file, arch, split_max_tensors=a_part)
    for key, method in SIZES.items():
        if config.get(key):
            getattr(writer, method)(config[key])
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(library.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
    elif rope["rope_type"] == "llama3":
        sizes = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        divisors = rotary.llama3_divisors(
            rope["rope_theta"], config["head_dim"], *(rope[size] for size in sizes)
        )
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    writer.add_token_list([str(i) for i in range(config["vocab_size"])])
    for tensor, shape in shapes.items():
        values = parity.weights(tensor, tuple(shape))
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(tensor.split(".")[-2])
        if arch == "llama" and heads:
            values = permuted(values, config[heads])
        if arch == "gemma3" and tensor.endswith("norm.weight"):
            values = values + 1
        values, kind = change(tensor, values)
        writer.add_tensor(name_in_gguf(tensor, arch == "gemma3"), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_model_as_in_a_directory(name, tmp_path):
    more = {}
    if name == "gemma3":  # what a GGUF file of Gemma leaves to its reader, as it is in all of them
        kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(7)]
        rope = GOLDEN[name]["config"]["rope_parameters"]
        local = rope["sliding_attention"] | {"rope_theta": 10_000.0}
        more = {"layer_types": kinds, "query_pre_attn_scalar": 16}
        more["rope_parameters"] = rope | {"sliding_attention": local}
    elif name == "llama_yarn":  # keys that such a file has not
        rope = GOLDEN[name]["config"]["rope_parameters"]
        more["rope_parameters"] = {k: v for k, v in rope.items() if k[:6] not in ("mscale", "trunca")}
    directory = write(tmp_path / "model", name)
    (directory / "config.json").write_text(json.dumps(GOLDEN[name]["config"] | more))
    target, want = load(directory)
    config, params, _ = gguf.load(str(write_gguf(tmp_path / "m.gguf", name, **more)), "float32")
    assert {**vars(config), "rope_divisors": 0, "norm_epsilon": 0} == {
        **vars(target.config),
        "rope_divisors": 0,
        "norm_epsilon": 0,
    }
    assert config.norm_epsilon == pytest.approx(target.config.norm_epsilon)
    assert config.rope_divisors == pytest.approx(target.config.rope_divisors)
    exact = name != "gemma3"  # whose norms lose a bit by what is added to them
    compare = np.testing.assert_array_equal if exact else np.testing.assert_allclose
    assert jax.tree.structure(params) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: compare(a, np.asarray(b), **({} if exact else {"atol": 1e-6})), params, want)


def halves(raw: bytes, at: int) -> float:
    return float(np.frombuffer(raw[at : at + 2], np.float16)[0])


def k_scales(raw: bytes) -> list[tuple[int, int]]:
    """Scale and minimum of the eight parts of a block, six bits each."""
    q, found = raw, []
    for j in range(8):
        if j < 4:
            found.append((q[j] & 63, q[j + 4] & 63))
        else:
            low, high = q[j + 4] & 15, q[j + 4] >> 4
            found.append((low | (q[j - 4] >> 6) << 4, high | (q[j] >> 6) << 4))
    return found


def by_hand(kind: Kind, raw: bytes) -> list[float]:
    """The 256 values of a block, one after the other, from ggml's description of its bytes."""
    out = []
    if kind in (Kind.Q4_K, Kind.Q5_K):
        d, least, scales = halves(raw, 0), halves(raw, 2), k_scales(raw[4:16])
        high, low = (raw[16:48], raw[48:]) if kind == Kind.Q5_K else (bytes(32), raw[16:])
        for i in range(256):
            part, at = i // 32, i % 32
            nibble = low[part // 2 * 32 + at] >> (4 * (part % 2)) & 15
            scale, minimum = scales[part]
            out.append(d * scale * (nibble + 16 * (high[at] >> part & 1)) - least * minimum)
        return out
    low, high, scales, d = raw[:128], raw[128:192], np.frombuffer(raw[192:208], np.int8), halves(raw, 208)
    for i in range(256):
        half, part, at = i // 128, i % 128 // 32, i % 32
        nibble = low[half * 64 + part % 2 * 32 + at] >> (4 * (part // 2)) & 15
        value = nibble + 16 * (high[half * 32 + at] >> (2 * part) & 3) - 32
        out.append(d * int(scales[i // 16]) * value)
    return out


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q5_K, Kind.Q6_K])
def test_blocks_of_256_by_hand(kind, tmp_path):
    size = library.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(0).integers(0, 256, (32, size), np.uint8)
    for at in (0, 2) if kind != Kind.Q6_K else (208,):
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    want = np.array([by_hand(kind, row.tobytes()) for row in raw])
    assert read_down(tmp_path, raw, kind) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1])
def test_smaller_blocks_come_back_as_near_as_their_bits_allow(kind, tmp_path):
    values = np.random.default_rng(0).uniform(-1, 1, (32, 256)).astype(np.float32)
    step = {Kind.F32: 0, Kind.F16: 1e-3, Kind.BF16: 8e-3, Kind.Q8_0: 1 / 127}.get(kind, 2 / 15)
    found = read_down(tmp_path, library.quantize(values, kind), kind)
    assert found == pytest.approx(values, abs=step * 1.05)
    assert (found == values).all() == (kind == Kind.F32)


def read_down(tmp_path: pathlib.Path, raw: np.ndarray, kind: Kind) -> np.ndarray:
    """One matrix of a model whose MLP has 256 neurons."""

    def change(name: str, values: np.ndarray):
        if "mlp" in name:
            values = np.zeros((32, 256) if "down" in name else (256, 32), np.float32)
        return (raw, kind) if name == "model.layers.3.mlp.down_proj.weight" else (values, None)

    file = write_gguf(tmp_path / "m.gguf", "llama2", change, intermediate_size=256)
    return gguf.load(str(file), "float32")[1]["layers_3"]["mlp"]["down"]["weight"]


def test_files_of_other_models(tmp_path):
    def extra(name, values):
        return (values[:-1], None) if name == "model.layers.1.mlp.up_proj.weight" else (values, None)

    with pytest.raises(UserError, match=r"layers_1/mlp/up/weight: found the shape \(47, 32\).*\(48, 32\)"):
        gguf.load(str(write_gguf(tmp_path / "a.gguf", "llama2", extra)), "float32")
    file = write_gguf(tmp_path / "b.gguf", "llama2", model_type="mamba")
    with pytest.raises(UserError, match=r"b.gguf.*'mamba' is not supported.*llama, qwen2, qwen3, gemma3"):
        gguf.load(str(file), "float32")


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
