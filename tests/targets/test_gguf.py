"""GGUF files hold the same model as the Hugging Face directory; every quantisation is read."""

import json
import pathlib

import gguf as library
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from golden_families import GOLDEN, load, parity, write

from ppow_jax.errors import UserError
from ppow_jax.models import rotary
from ppow_jax.targets import gguf

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
        writer.add_float32(f"{arch}.rope.scaling.yarn_beta_fast", rope["beta_fast"])
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
