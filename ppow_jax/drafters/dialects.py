"""Drafters as servers read them: `config.json` and `model.safetensors` of EAGLE-3.

Three forms are written, for SGLang, vLLM and vLLM on TPUs, and all of them are read, as are those of EAGLE,
SpecForge and the speculators library. They differ in the name of the layer (`midlayer` or `layers.0`), in
`architectures`, and in what the ids of tapped layers mean: where they stand in `eagle_config` they name
layers whose *output* is tapped (SGLang, SpecForge), at the top level layers whose *input* is (vLLM,
speculators), which is ours.
"""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ppow_jax.drafters.eagle3 import DrafterConfig, abstract_params
from ppow_jax.errors import UserError
from ppow_jax.models.rotary import rotary
from ppow_jax.models.target import TargetConfig, default_taps
from ppow_jax.parallel import files

_LAYER = {
    "embedding_norm/scale": "input_layernorm.weight",
    "hidden_norm/scale": "hidden_norm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
_ENDS = {
    "fuse/weight": "fc.weight",
    "norm/scale": "norm.weight",
    "head/weight": "lm_head.weight",
    "embedding/embedding": "embed_tokens.weight",
}
_IDS = "eagle_aux_hidden_state_layer_ids"
_US = "ppow_jax"
_FINGERPRINT = "target_fingerprint"  # in the safetensors file's metadata
_path = functools.partial(jax.tree_util.keystr, simple=True, separator="/")  # as `partition.path_name`


@dataclasses.dataclass(frozen=True)
class Server:
    """What a server reads.

    Attributes:
      layer: name of the first layer.
      architecture: that it knows.
      ids: where it looks for the ids of tapped layers: "outputs" (in `eagle_config`), "inputs" (top level),
        or nowhere.
      second_norm: name of the norm before the attention of layers after the first; empty: it knows one alone.
      equal_d2t: whether it wants `d2t` where the draft vocabulary is the target's.
      knows: which of the drafter's possible traits it honours.
    """

    layer: str
    architecture: str
    ids: str
    second_norm: str
    equal_d2t: bool
    knows: frozenset[str]


_COMMON = {"tap_norms", "rope_scaling", "feeds_normed"}
SERVERS = {
    "sglang": Server(
        "midlayer", "LlamaForCausalLMEagle3", "outputs", "hidden_norm", True, frozenset(_COMMON)
    ),
    "vllm": Server(
        "layers.0",
        "LlamaForCausalLMEagle3",
        "inputs",
        "input_layernorm",
        False,
        frozenset(_COMMON | {"normed_residual", "attention_bias", "embedding_size"}),
    ),
    "vllm_tpu": Server(
        "midlayer", "Eagle3LlamaForCausalLM", "", "", True, frozenset({"normed_residual", "embedding_size"})
    ),
}


class Imported(NamedTuple):
    """A drafter from files.

    Attributes:
      config: its shape.
      params: float32 parameters.
      vocab: int32 `[N]`, target ids of the draft ids, ascending.
      taps: the target's layers whose inputs it sees.
    """

    config: DrafterConfig
    params: dict
    vocab: np.ndarray
    taps: tuple[int, ...]


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
      server: one of `SERVERS`.
      dtype: of the weights in the file.
      fingerprint: names the target; kept in the file's metadata, which servers do not read.

    Raises:
      UserError: the server would silently ignore something that the drafter has.
    """
    kind = SERVERS[server]
    check(config, target, server)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = _name(_path(path), config, kind)
        tensors[name] = np.ascontiguousarray(np.asarray(leaf).astype(jnp.dtype(dtype)))
    if kind.equal_d2t or config.vocab_size != target.vocab_size:
        ids = np.asarray(vocab, np.int64)
        tensors["d2t"] = ids - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(target.vocab_size), ids)
    directory.mkdir(parents=True, exist_ok=True)
    about = {"format": "pt", _FINGERPRINT: fingerprint}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", about)
    values = _values(config, target, kind) | {"torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n")


def check(config: DrafterConfig, target: TargetConfig, server: str) -> None:
    """Whether a server honours all that a drafter is.

    Raises:
      UserError: it would silently ignore something.
    """
    kind, why = SERVERS[server], []
    plain = {f.name: f.default for f in dataclasses.fields(config)}
    for trait in (
        "tap_norms",
        "rope_scaling",
        "attention_bias",
        "head_norms",
        "normed_residual",
        "feeds_normed",
        "module",
    ):
        if getattr(config, trait) != plain[trait] and trait not in kind.knows:
            why.append(f"{trait} {getattr(config, trait)!r}")
    if config.embedding_size and "embedding_size" not in kind.knows and config.width == target.width:
        why.append("an embedding of its own, which the target's replaces")
    if config.layers > 1 and not kind.second_norm:
        why.append(f"{config.layers} layers, expected 1")
    if target.taps != default_taps(target.layers):
        if not kind.ids:
            why.append(f"the taps {target.taps}, expected {default_taps(target.layers)}")
        elif kind.ids == "outputs" and target.taps[0] == 0:
            why.append(f"the taps {target.taps}: it cannot name the embedding")
    if why:
        raise UserError(
            f"config.export.server: {server!r} would ignore what this drafter has: {'; '.join(why)}. "
            "Export for another server, or train a drafter without"
        )


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
        "trained_with": _US,
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
            values[_IDS] = list(target.taps)
        else:
            values["eagle_config"] = {_IDS: [tap - 1 for tap in target.taps], "use_aux_hidden_state": True}
    return values


def read(directory: pathlib.Path, target: TargetConfig, fingerprint: str) -> Imported:
    """Reads a drafter that we, EAGLE, SpecForge or the speculators library wrote.

    Args:
      directory: with `config.json` and `model.safetensors`.
      target: shape of the target that will verify.
      fingerprint: names that target.

    Raises:
      UserError: a file is missing or damaged, a tensor has no place or another shape, or the drafter is for
        another target.
    """
    file, config_file = directory / "model.safetensors", directory / "config.json"
    try:
        values = json.loads(config_file.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{config_file}: no readable JSON file ({e}); expected an EAGLE-3 drafter's") from e
    tensors = _tensors(file, fingerprint)
    try:
        config, taps = _shape(values, tensors, target, str(config_file))
    except KeyError as e:
        raise UserError(f"{config_file}: found no {e.args[0]!r}, which an EAGLE-3 drafter has") from e
    vocab = _vocab(tensors, config, target, file)
    server = _server_of(tensors)

    def leaf(path: tuple, like: jax.ShapeDtypeStruct) -> np.ndarray:
        name = _name(_path(path), config, server)
        if name not in tensors:
            raise UserError(f"{file}: found no tensor {name!r}, which {config_file.name} asks for")
        found = tensors.pop(name)
        if found.shape != like.shape:
            raise UserError(
                f"{file}: tensor {name!r} has the shape {found.shape}, expected {like.shape} by "
                f"{config_file.name} and the target"
            )
        return found.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, abstract_params(config))
    left = [name for name in tensors if not _NOT_NEEDED.search(name)]
    if left:
        raise UserError(f"{file}: tensor {left[0]!r} has no place in the drafter of {config_file.name}")
    return Imported(config, params, vocab, taps)


_NOT_NEEDED = re.compile(r"rotary_emb|^verifier_|^mask_hidden$")


def _tensors(file: pathlib.Path, fingerprint: str) -> dict[str, np.ndarray]:
    with files.open_safetensors(file, "the drafter's weights as safetensors") as reader:
        trained_for = (reader.metadata() or {}).get(_FINGERPRINT, fingerprint)
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    if trained_for != fingerprint:
        raise UserError(
            f"{file}: this drafter belongs to target {trained_for[:12]}, not to {fingerprint[:12]}; its "
            "drafts would be refused"
        )
    return tensors


def _server_of(tensors: Mapping[str, np.ndarray]) -> Server:
    """The names that a file uses."""
    layer = "midlayer" if any(name.startswith("midlayer.") for name in tensors) else "layers.0"
    norm = "hidden_norm" if "layers.1.hidden_norm.weight" in tensors else "input_layernorm"
    return dataclasses.replace(SERVERS["sglang"], layer=layer, second_norm=norm)


def _shape(
    values: Mapping[str, Any], tensors: Mapping[str, np.ndarray], target: TargetConfig, where: str
) -> tuple[DrafterConfig, tuple[int, ...]]:
    """The drafter's shape and its taps."""
    inner = values.get("transformer_layer_config", values)
    meant = "transformer_layer_config" in values or values.get("trained_with") == _US
    if values.get("norm_output") and not meant:
        raise UserError(
            f"{where}: found norm_output true, which SpecForge (a norm before the head) and the servers (the "
            "normed state is fed on) take to mean two things; remove it if SpecForge wrote the file"
        )
    if inner.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: found the activation {inner['hidden_act']!r}, expected silu")
    taps = _taps(values, target)
    width, heads = inner["hidden_size"], inner["num_attention_heads"]
    theta, scaling = rotary(inner)
    scaling = {k: v for k, v in scaling.items() if k != "rope_theta" and (k, v) != ("rope_type", "default")}
    layer = _server_of(tensors).layer
    norms = {"fc_norm": "each", "norm_before_fc": "all"}
    flag = lambda key: values.get(key, _nested(values).get(key, False))  # noqa: E731
    config = DrafterConfig(
        vocab_size=values.get("draft_vocab_size") or inner["vocab_size"],
        width=width,
        taps_width=len(taps) * target.width,
        heads=heads,
        kv_heads=inner.get("num_key_value_heads") or heads,
        head_size=inner.get("head_dim") or width // heads,
        mlp_hidden=inner["intermediate_size"],
        rope_theta=theta,
        norm_epsilon=inner.get("rms_norm_eps", 1e-6),
        embedding_size=target.vocab_size if "embed_tokens.weight" in tensors else 0,
        layers=inner.get("num_hidden_layers", 1),
        rope_scaling=tuple(scaling.items()),
        attention_bias=f"{layer}.self_attn.q_proj.bias" in tensors,
        head_norms=f"{layer}.self_attn.q_norm.weight" in tensors,
        taps=len(taps),
        tap_norms=next((norm for key, norm in norms.items() if flag(key)), ""),
        normed_residual=bool(flag("norm_before_residual")),
        feeds_normed=bool(flag("norm_output")),
    )
    if not config.embedding_size and width != target.width:
        raise UserError(
            f"{where}: found hidden_size {width} and no embed_tokens.weight; the target's embedding, which "
            f"it would read, is {target.width} wide"
        )
    if inner.get("vocab_size", target.vocab_size) != target.vocab_size:
        raise UserError(
            f"{where}: found vocab_size {inner['vocab_size']}, expected the target's {target.vocab_size}; "
            "this drafter is for another target"
        )
    return config, taps


def _nested(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """What SpecForge and SGLang keep a level down; files may hold null there."""
    return values.get("eagle_config") or {}


def _taps(values: Mapping[str, Any], target: TargetConfig) -> tuple[int, ...]:
    """The tapped layers, by their inputs."""
    if values.get(_IDS):
        return tuple(values[_IDS])
    outputs = _nested(values).get(_IDS)
    return tuple(layer + 1 for layer in outputs) if outputs else default_taps(target.layers)


def _vocab(
    tensors: dict[str, np.ndarray], config: DrafterConfig, target: TargetConfig, file: pathlib.Path
) -> np.ndarray:
    """int32 `[N]`: the target's ids of the draft ids."""
    N, V = config.vocab_size, target.vocab_size
    offsets, mask = tensors.pop("d2t", None), tensors.pop("t2d", None)
    if offsets is None and N != V:
        raise UserError(
            f"{file}: found no 'd2t', expected it where {N} draft ids stand for {V} of the target"
        )
    ids = np.arange(N) + (0 if offsets is None else offsets.astype(np.int64))
    if len(ids) != N or (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= V:
        raise UserError(
            f"{file}: 'd2t' does not hold offsets (target id = draft id + d2t[draft id]) of ascending ids "
            f"below {V}; is it of another target, or are its ids absolute?"
        )
    if mask is not None and not np.array_equal(np.flatnonzero(mask), ids):
        raise UserError(f"{file}: 't2d' and 'd2t' name different tokens; the file is damaged")
    return ids.astype(np.int32)


def _name(path: str, config: DrafterConfig, server: Server) -> str:
    """The file's name of one of our parameters."""
    if path in _ENDS:
        return _ENDS[path]
    if norm := re.fullmatch(r"tap_norms_(\d+)/scale", path):
        return "input_norm.weight" if config.tap_norms == "all" else f"fc_norm.{norm[1]}.weight"
    layer, second = server.layer, re.fullmatch(r"layers_(\d+)/(.+)", path)
    if second:
        layer, path = f"layers.{int(second[1]) + 1}", second[2]
        if path == "attention_norm/scale":
            return f"{layer}.{server.second_norm}.weight"
    if path in _LAYER:
        return f"{layer}.{_LAYER[path]}"
    module, _, leaf = path.rpartition("/")
    return f"{layer}.{_LAYER[module]}.{leaf}"
