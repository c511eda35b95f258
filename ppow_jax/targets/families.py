"""The model families: what a model's `config.json` says, as the shape of the one decoder.

A family is what its decoder has beyond Llama's, in the fields of `TargetConfig`. References: Llama 2 and 3
(arXiv 2307.09288, 2407.21783), Mistral (2310.06825), Qwen2.5 (2412.15115), Qwen3 (2505.09388), Gemma 3
(2503.19786); names of keys as in Hugging Face transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models.rotary import divisors, rotary
from ppow_jax.models.target import TargetConfig, default_taps

Json = Mapping[str, Any]


def _llama(c: Json) -> dict[str, Any]:
    return {}


def _mistral(c: Json) -> dict[str, Any]:
    return {"spans": (c.get("sliding_window") or 0,) * c["num_hidden_layers"]}


def _qwen2(c: Json) -> dict[str, Any]:
    return {"attention_bias": True, "spans": _qwen_spans(c)}


def _qwen3(c: Json) -> dict[str, Any]:
    return {"head_norms": True, "spans": _qwen_spans(c)}


def _qwen_spans(c: Json) -> tuple[int, ...]:
    span = c.get("sliding_window") or 0 if c.get("use_sliding_window") else 0
    first = c.get("max_window_layers", 0)
    return _spans(c, span, lambda layer: layer >= first)


def _gemma3(c: Json) -> dict[str, Any]:
    _expect(c, "attn_logit_softcapping", None, None)
    _expect(c, "final_logit_softcapping", None, None)
    pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    local = (c.get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
    return {
        "head_norms": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": c["hidden_size"] ** 0.5,
        "query_scale": c.get("query_pre_attn_scalar", 256) ** -0.5,
        "spans": _spans(c, c["sliding_window"], lambda layer: (layer + 1) % pattern != 0),
        "local_theta": float(local or c.get("rope_local_base_freq", 10_000.0)),
    }


# model_type -> what the family has beyond Llama
FAMILIES: dict[str, Callable[[Json], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def target_config(config: Json, tied: bool, dtype: str, where: str) -> TargetConfig:
    """The decoder's shape.

    Args:
      config: what `config.json` holds; of a model that sees pictures, the part about text.
      tied: whether the head is the embedding, where the file does not say.
      dtype: of weights and compute.
      where: the file, for errors.

    Raises:
      UserError: an architecture that is not supported, or a key that is missing.
    """
    config = config.get("text_config", config)
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{where}: found model_type {kind!r}, expected one of {', '.join(FAMILIES)}")
    try:
        return _config(config, kind, tied, dtype)
    except KeyError as e:
        raise UserError(f"{where}: found no {e.args[0]!r}, which a {kind} model has") from e
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def _config(c: Json, kind: str, tied: bool, dtype: str) -> TargetConfig:
    _expect(c, "attention_bias", kind == "qwen2", kind == "qwen2")
    _expect(c, "mlp_bias", False, False)
    layers, heads, width = c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"]
    head_size = c.get("head_dim") or width // heads
    act = c.get("hidden_activation") or c.get("hidden_act") or "silu"
    if act not in _ACTIVATIONS:
        raise UserError(f"found the activation {act!r}, expected one of {', '.join(_ACTIVATIONS)}")
    theta, scaling = rotary(c)
    traits = {"activation": _ACTIVATIONS[act]} | FAMILIES[kind](c)
    if not any(traits.get("spans", ())):
        traits["spans"] = ()
    return TargetConfig(
        vocab_size=c["vocab_size"],
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_size=head_size,
        mlp_hidden=c["intermediate_size"],
        context=c["max_position_embeddings"],
        rope_theta=theta,
        norm_epsilon=c["rms_norm_eps"],
        tied_head=c.get("tie_word_embeddings", tied),
        taps=default_taps(layers),
        dtype=dtype,
        rope_divisors=divisors(scaling, theta, head_size),
        **traits,
    )


def _expect(c: Json, key: str, value: Any, default: Any) -> None:
    if c.get(key, default) != value:
        raise UserError(f"found {key} {c[key]!r}, expected {value!r}: nothing else is supported")


def _spans(c: Json, span: int, local: Callable[[int], bool]) -> tuple[int, ...]:
    """Of every layer: from `layer_types`, or by a rule where the file does not list them."""
    kinds = c.get("layer_types") or [
        "sliding_attention" if local(layer) else "full_attention" for layer in range(c["num_hidden_layers"])
    ]
    return tuple(span if kind == "sliding_attention" else 0 for kind in kinds)
