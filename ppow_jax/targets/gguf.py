"""Targets from GGUF files: weights, shape and tokenizer data.

Reading and dequantisation are the `gguf` library's (`gguf_files`); naming and the rotary un-permutation are
ours.
"""

import dataclasses
import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.fields import WHOLE, Fields
from ppow_jax.models.target import TargetConfig, abstract_params, with_taps
from ppow_jax.parallel import partition
from ppow_jax.targets import families, gguf_files, weights
from ppow_jax.targets.gguf_files import Contents

_MODULES = {
    "attn_norm": "attention_norm",
    "attn_q": "attention/query",
    "attn_k": "attention/key",
    "attn_v": "attention/value",
    "attn_q_norm": "attention/query_norm",
    "attn_k_norm": "attention/key_norm",
    "attn_output": "attention/out",
    "post_attention_norm": "attention_post_norm",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "mlp/gate",
    "ffn_up": "mlp/up",
    "ffn_down": "mlp/down",
    "post_ffw_norm": "mlp_post_norm",
}
_ENDS = {
    "token_embd.weight": "embedding/embedding",
    "output_norm.weight": "norm/scale",
    "output.weight": "head/weight",
}
# general.architecture -> model_type of `families`; Mistral's files call themselves llama
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
# metadata -> key of `config.json`
_WHOLE = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
}
_WHOLE_IF_THERE = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
}
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout")
_GEMMA3_27B = 62  # layers of the one Gemma 3 whose queries are scaled by another size


def target_config(contents: Contents, dtype: str, where: str) -> TargetConfig:
    """The decoder's shape; see `families.target_config`.

    Raises:
      UserError: an architecture that is not supported, or metadata that are missing, of a wrong type, or not
        obeyed though they may change the result.
    """
    m = Fields(contents.metadata, where, of="a GGUF model")
    arch = m.text("general.architecture")
    if arch not in _FAMILIES:
        expected = ", ".join(_FAMILIES)
        raise UserError(f"{where}: GGUF architecture {arch!r} is not supported; expected one of {expected}")
    config: dict[str, Any] = {"model_type": _FAMILIES[arch]}
    config["vocab_size"] = len(m.listed("tokenizer.ggml.tokens", str))
    for key, ours in _WHOLE.items():
        most = families.MOST_LAYERS if key == "block_count" else WHOLE
        config[ours] = m.whole(f"{arch}.{key}", most=most)
    for key, ours in _WHOLE_IF_THERE.items():
        config[ours] = m.whole(f"{arch}.{key}", None)
    config["rms_norm_eps"] = m.number(f"{arch}.attention.layer_norm_rms_epsilon", zero=True)
    config["rope_theta"] = m.number(f"{arch}.rope.freq_base", 10_000.0, above=1)
    config["rope_scaling"] = _scaling(m, arch)
    heads = config["num_attention_heads"]
    size = config["head_dim"] = config["head_dim"] or config["hidden_size"] // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        m.only(f"{arch}.{key}", size, "the size of a head, as of all that is supported")
    m.only(f"{arch}.attention.causal", True)
    if arch == "gemma3":  # what llama.cpp knows of it without a key
        largest = config["num_hidden_layers"] == _GEMMA3_27B
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if largest else size
        config["rope_local_base_freq"] = m.number(f"{arch}.rope.freq_base_swa", None, above=1)
    elif arch != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in contents.tensors
    m.rest(lambda key: not key.startswith(f"{arch}.") or key.removeprefix(f"{arch}.") in _HARMLESS)
    tied = "output.weight" not in contents.tensors
    return families.target_config(config | {"tie_word_embeddings": tied}, tied, dtype, where)


def _scaling(m: Fields, arch: str) -> dict[str, Any] | None:
    """`rope_scaling` of `config.json`."""
    at = f"{arch}.rope.scaling"
    kind = m.text(f"{at}.type", "none", ("none", "linear", "yarn"))
    m.only(f"{at}.attn_factor", 1.0)
    older = m.number(f"{arch}.rope.scale_linear", None)
    if kind == "none":
        return None if older is None else {"rope_type": "linear", "factor": older}
    found = {"rope_type": kind, "factor": m.number(f"{at}.factor", older) or m.number(f"{at}.factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = m.whole(f"{at}.original_context_length")
        for key in ("beta_fast", "beta_slow"):
            found[key] = m.number(f"{at}.yarn_{key}", None)
    return found


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's row order of llama q/k matrices `[out, in]`, meant for interleaved rotary."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(rows.shape)


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's row order of llama q/k matrices `[out, in]` and biases, meant for interleaved rotary."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def load(
    path: str, dtype: str, taps: tuple[int, ...] | None = None
) -> tuple[TargetConfig, dict, dict[str, Any]]:
    """Shape, with the taps of `with_taps`, parameters (nested dict of numpy arrays) and metadata of a file.

    Raises:
      UserError: missing, damaged or foreign file, or a tensor that has no place.
    """
    file = gguf_files.find(path)
    contents = gguf_files.read(file)
    config = with_taps(target_config(contents, dtype, str(file)), taps)
    tensors = dict(contents.tensors)
    if (stretched := tensors.pop("rope_freqs.weight", None)) is not None:
        divisors = tuple(gguf_files.values(stretched, file).tolist())
        if config.rope_divisors or len(divisors) != config.head_size // 2:
            raise UserError(
                f"{file}: found {len(divisors)} factors in rope_freqs.weight, expected half the size of a "
                f"head, {config.head_size // 2}, and no rope.scaling.type"
            )
        config = dataclasses.replace(config, rope_divisors=divisors)
    places = {_place(name, file): tensor for name, tensor in tensors.items()}
    _check({path: tuple(t.shape[::-1].tolist()) for path, t in places.items()}, config, file)
    permuted = contents.metadata["general.architecture"] == "llama"
    params: dict = {}
    for path, tensor in places.items():
        *modules, leaf = path.split("/")
        values = gguf_files.values(tensor, file)
        if config.norm_offset and leaf == "scale":
            values = values - np.float32(config.norm_offset)  # such files hold the sum
        if permuted and modules[-1] in ("query", "key"):
            values = unpermute(values, config.heads if modules[-1] == "query" else config.kv_heads)
        inner = functools.reduce(lambda at, module: at.setdefault(module, {}), modules, params)
        inner[leaf] = np.ascontiguousarray(values).astype(jnp.dtype(dtype))
    return config, params, contents.metadata


def _place(name: str, file: pathlib.Path) -> str:
    """Our path of a tensor.

    Raises:
      UserError: there is none.
    """
    if name in _ENDS:
        return _ENDS[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _MODULES:
        raise UserError(f"{file}: tensor {name!r} has no place in the decoder")
    module = _MODULES[match[2]]
    return f"layers_{match[1]}/{module}/{'scale' if module.endswith('norm') else match[3]}"


def _check(found: dict[str, tuple], config: TargetConfig, file: pathlib.Path) -> None:
    """Raises `UserError` unless the tensors are those of the decoder, of its shapes."""
    weights.require_layers(file, config.layers, found)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    expected = {partition.path_name(path): leaf.shape for path, leaf in leaves}
    for path in sorted(found.keys() | expected.keys()):
        if path not in found:
            raise UserError(f"{file}: found no tensor for {path}, which the file's metadata ask for")
        if path not in expected:
            raise UserError(f"{file}: tensor for {path} has no place in the decoder of the file's metadata")
        if found[path] != expected[path]:
            raise UserError(
                f"{file}: {path}: found the shape {found[path]}, expected {expected[path]} by the file's "
                "metadata"
            )
