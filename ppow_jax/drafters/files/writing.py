"""Writes a drafter for a server: `config.json` and `model.safetensors`."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ppow_jax.drafters.eagle3 import DrafterConfig
from ppow_jax.drafters.files import dialects
from ppow_jax.drafters.files.dialects import Server
from ppow_jax.models.target import TargetConfig, default_taps
from ppow_jax.parallel import partition


def write(
    directory: pathlib.Path,
    config: DrafterConfig,
    params: dict,
    vocab: np.ndarray,
    target: TargetConfig,
    server: str,
    dtype: str,
    fingerprint: str,
) -> None:
    """Writes a drafter for a server.

    Args:
      directory: where; made if need be.
      config, params: the drafter.
      vocab: `[N]` target ids of the draft ids, ascending.
      target: shape of its target.
      server: one of `dialects.SERVERS`.
      dtype: of the weights in the file.
      fingerprint: names the target; kept in the file's metadata, which servers do not read.

    Raises:
      UserError: the server would silently ignore something that the drafter has.
    """
    kind = dialects.SERVERS[server]
    dialects.check(config, target, server)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = dialects.tensor_name(partition.path_name(path), config, kind)
        tensors[name] = np.ascontiguousarray(np.asarray(leaf).astype(jnp.dtype(dtype)))
    if config.attention_bias and not config.out_bias:  # vLLM has one too then, and does not fill it
        for layer in range(config.layers):
            ours = f"layers_{layer - 1}/attention/out/bias" if layer else "attention/out/bias"
            name = dialects.tensor_name(ours, config, kind)
            tensors[name] = np.zeros(config.width, jnp.dtype(dtype))
    if kind.equal_d2t or config.vocab_size != target.vocab_size:
        ids = np.asarray(vocab, np.int64)
        tensors["d2t"] = ids - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(target.vocab_size), ids)
    directory.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt", dialects.FINGERPRINT: fingerprint}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", about)
    values = _values(config, target, kind) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def _values(config: DrafterConfig, target: TargetConfig, server: Server) -> dict[str, Any]:
    """What `config.json` holds."""
    scaling = dict(config.rope_scaling)
    values = {
        "architectures": [server.architecture],
        "model_type": "llama",
        "hidden_size": config.width,
        "intermediate_size": config.mlp_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "vocab_size": target.vocab_size,
        "draft_vocab_size": config.vocab_size,
        "max_position_embeddings": target.context,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default"} | scaling | {"rope_theta": config.rope_theta},
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "num_aux_hidden_states": config.taps,
        "trained_with": dialects.US,
    }
    if config.taps_width != config.taps * config.width:
        values["target_hidden_size"] = config.taps_width // config.taps
    flags = {
        "fc_norm": config.tap_norms == "each",
        "norm_before_fc": config.tap_norms == "all",
        "norm_before_residual": config.normed_residual,
        "norm_output": config.feeds_normed,
    }
    values |= {key: True for key, on in flags.items() if on}
    if target.taps != default_taps(target.layers):
        if server.ids == "inputs":
            values[dialects.IDS] = list(target.taps)
        else:
            values["eagle_config"] = {
                dialects.IDS: [tap - 1 for tap in target.taps],
                "use_aux_hidden_state": True,
            }
    return values
