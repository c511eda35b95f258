"""The forms in which servers read EAGLE-3 drafters: names of tensors and keys, and what each server knows.

Three forms are written, for SGLang, vLLM and vLLM on TPUs, and all of them are read, as are those of EAGLE,
SpecForge and the speculators library. They differ in the name of the layer (`midlayer` or `layers.0`), in
`architectures`, and in what the ids of tapped layers mean: where they stand in `eagle_config` they name
layers whose *output* is tapped (SGLang, SpecForge), at the top level layers whose *input* is (vLLM,
speculators), which is ours.
"""

import dataclasses
import re
from collections.abc import Collection

from ppow_jax.drafters.eagle3 import DrafterConfig
from ppow_jax.errors import UserError
from ppow_jax.models.target import TargetConfig, default_taps

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
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
    "head/weight": HEAD,
    "embedding/embedding": EMBEDDING,
}
IDS = "eagle_aux_hidden_state_layer_ids"
US = "ppow_jax"  # in `trained_with`
FINGERPRINT = "target_fingerprint"  # in the safetensors file's metadata


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
      scaling: which keys of `rope_scaling` it honours, and so computes as `rotary.scaled` does.
    """

    layer: str
    architecture: str
    ids: str
    second_norm: str
    equal_d2t: bool
    knows: frozenset[str]
    scaling: frozenset[str] = frozenset()


_COMMON = {"tap_norms", "rope_scaling", "feeds_normed"}
_SCALING = {"rope_type", "type", "factor", "original_max_position_embeddings"}
_SCALING |= {"low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"}
SERVERS = {
    "sglang": Server(
        "midlayer",
        "LlamaForCausalLMEagle3",
        "outputs",
        "hidden_norm",
        True,
        frozenset(_COMMON),
        frozenset(_SCALING),
    ),
    "vllm": Server(
        "layers.0",
        "LlamaForCausalLMEagle3",
        "inputs",
        "input_layernorm",
        False,
        frozenset(_COMMON | {"normed_residual", "attention_bias", "out_bias", "embedding_size"}),
        frozenset(_SCALING | {"truncate"}),
    ),
    "vllm_tpu": Server(
        "midlayer", "Eagle3LlamaForCausalLM", "", "", True, frozenset({"normed_residual", "embedding_size"})
    ),
}


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
        "out_bias",
        "head_norms",
        "normed_residual",
        "feeds_normed",
        "module",
    ):
        if getattr(config, trait) != plain[trait] and trait not in kind.knows:
            why.append(f"{trait} {getattr(config, trait)!r}")
    unknown = dict(config.rope_scaling).keys() - kind.scaling
    if unknown and "rope_scaling" in kind.knows:
        why.append(f"{', '.join(sorted(unknown))} of rope_scaling")
    if config.out_bias and not config.attention_bias:
        why.append("a bias of the attention's output alone")
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


def server_of(tensors: Collection[str]) -> Server:
    """The names that a file uses."""
    layer = "midlayer" if any(name.startswith("midlayer.") for name in tensors) else "layers.0"
    norm = "hidden_norm" if "layers.1.hidden_norm.weight" in tensors else "input_layernorm"
    return dataclasses.replace(SERVERS["sglang"], layer=layer, second_norm=norm)


def tensor_name(path: str, config: DrafterConfig, server: Server) -> str:
    """The file's name of one of our parameters, by its path."""
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
