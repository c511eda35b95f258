"""The model families: what a model's `config.json` says, as the shape of the one decoder.

A family is what its decoder has beyond Llama's, in the fields of `TargetConfig`. Every key of the file is
obeyed or refused, unless it is known to change nothing (`harmless`). References: Llama 2 and 3
(arXiv 2307.09288, 2407.21783), Mistral (2310.06825), Qwen2.5 (2412.15115), Qwen3 (2505.09388), Gemma 3
(2503.19786); names of keys and what is meant where one is missing as in Hugging Face transformers.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ppow_jax.errors import UserError
from ppow_jax.models import rope_scaling, rotary
from ppow_jax.models.fields import WHOLE, Fields
from ppow_jax.models.target import TargetConfig, default_taps
from ppow_jax.targets import quantised
from ppow_jax.targets.harmless import harmless

_FULL, _SLIDING = "full_attention", "sliding_attention"
_WINDOW = 4096  # of a model whose file does not name it
MOST_LAYERS = 1000


def _llama(c: Fields) -> dict[str, Any]:
    no_window(c)
    return _biases(c)


def _mistral(c: Fields) -> dict[str, Any]:
    c.only("attention_bias", False)
    spans = _spans(c, _window(c), lambda layer: True)
    if len(set(spans)) > 1:
        raise c.error(
            f"found {_FULL} and {_SLIDING} in {c.prefix}layer_types, expected layers of one kind in {c.of}"
        )
    return {"spans": spans}


def _qwen2(c: Fields) -> dict[str, Any]:
    c.only("attention_bias", True)
    return {"attention_bias": True, "spans": _qwen_spans(c)}


def _qwen3(c: Fields) -> dict[str, Any]:
    return _biases(c) | {"head_norms": True, "spans": _qwen_spans(c)}


def _qwen_spans(c: Fields) -> tuple[int, ...]:
    unused = c.whole("sliding_window", 0, least=0) and 0  # files name one also where it is not used
    span = _window(c) if c.flag("use_sliding_window") else unused
    first = c.whole("max_window_layers", 28, least=0)
    return _spans(c, span, lambda layer: layer >= first)


def _gemma3(c: Fields) -> dict[str, Any]:
    c.only("use_bidirectional_attention", False)
    pattern = c.whole("sliding_window_pattern", c.whole("_sliding_window_pattern", 6))
    span = _window(c)
    if not span:
        raise c.wrong("sliding_window", "a whole number: the window of local layers")
    return _biases(c) | {
        "head_norms": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": _activation(c, "hidden_activation", "gelu_pytorch_tanh"),
        "embedding_scale": c.whole("hidden_size") ** 0.5,
        "query_scale": c.number("query_pre_attn_scalar", 256.0) ** -0.5,
        "spans": _spans(c, span, lambda layer: (layer + 1) % pattern != 0),
        "rope_theta": 1_000_000.0,
        "local_theta": 10_000.0,
    }


# model_type -> what the family has beyond Llama; the bases of wavelengths are those of files without any
FAMILIES: dict[str, Callable[[Fields], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
}
# What is meant where a file has no such key.
_MISSING: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "gemma3_text": {"head_dim": 256, "tie_word_embeddings": True},
}
# The same of sizes, in the part about text of a model that sees pictures: transformers writes there what is
# not as in its class. A model's own file has all of them.
_SIZES: dict[str, tuple[int | None, ...]] = {
    "llama": (32_000, 4096, 11_008, 32, 32, None, 2048),
    "mistral": (32_000, 4096, 14_336, 32, 32, 8, 131_072),
    "qwen2": (151_936, 4096, 22_016, 32, 32, 32, 32_768),
    "qwen3": (151_936, 4096, 22_016, 32, 32, 32, 32_768),
    "gemma3_text": (262_208, 2304, 9216, 26, 8, 4, 131_072),
}
_SIZE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# what no family has otherwise
_OF_ALL = {
    "mlp_bias": False,
    "is_causal": True,
    "use_rope": True,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def target_config(config: Mapping[str, Any], tied: bool, dtype: str, where: str) -> TargetConfig:
    """The decoder's shape; its taps are `default_taps`.

    Args:
      config: what `config.json` holds; of a model that sees pictures, the part about text counts.
      tied: whether the head is the embedding, where neither the file nor the family says.
      dtype: of weights and compute.
      where: the file, for errors.

    Raises:
      UserError: an architecture that is not supported, weights that are quantised, a key that is missing, of
        a wrong type or beyond its limits, or one that is not obeyed and may change the result.
    """
    whole = Fields(config, where)
    _refuse_others(whole)
    part = whole.group("text_config")
    text = part or whole
    kind = text.text("model_type", None)
    if kind not in FAMILIES:
        raise UserError(f"{where}: found model_type {kind!r}, expected one of {', '.join(FAMILIES)}")
    missing = dict(_MISSING.get(kind, {}))
    if part:
        _refuse_others(part)
        sizes = zip(_SIZE_KEYS, _SIZES.get(kind, ()), strict=False)
        missing |= {"rms_norm_eps": 1e-6} | {key: size for key, size in sizes if size}
        missing |= {k: v for k, v in config.items() if k == "tie_word_embeddings" and v is not None}
    c = Fields(missing | dict(text.values), where, text.prefix, f"a {kind} model")
    found = _config(c, kind, tied, dtype)
    for key in config if part else ():
        if key in c.asked and key != "model_type" and config[key] not in (None, c.asked[key]):
            raise whole.wrong(key, f"that of text_config, {c.asked[key]!r}")
    return found


def _config(c: Fields, kind: str, tied: bool, dtype: str) -> TargetConfig:
    for key, value in _OF_ALL.items():
        c.only(key, value)
    _no_code(c)
    layers = c.whole("num_hidden_layers", most=MOST_LAYERS)
    traits = FAMILIES[kind](c)
    if not any(traits.get("spans", ())):
        traits["spans"] = ()
    if "activation" not in traits:
        traits["activation"] = _activation(c, "hidden_act", "silu")
    config = TargetConfig(
        vocab_size=c.whole("vocab_size"),
        layers=layers,
        mlp_hidden=c.whole("intermediate_size"),
        norm_epsilon=c.number("rms_norm_eps", zero=True),
        tied_head=c.flag("tie_word_embeddings", tied),
        taps=default_taps(layers),
        dtype=dtype,
        **traits | width_and_heads(c) | _wavelengths(c, traits),
    )
    c.rest(harmless)
    return config


def width_and_heads(c: Fields) -> dict[str, Any]:
    """The model's width and heads."""
    width, heads = c.whole("hidden_size", most=2**20), c.whole("num_attention_heads", most=2**16)
    kv_heads = c.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise c.wrong("num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    if not c.given("head_dim") and width % heads:
        raise c.wrong("num_attention_heads", f"a divisor of hidden_size, {width}, or a head_dim too")
    head_size = c.whole("head_dim", width // heads, most=2**16)
    if head_size % 2:
        raise c.error(
            f"found {c.prefix}head_dim {head_size}, expected an even number: heads are rotated in pairs"
        )
    return {"width": width, "heads": heads, "kv_heads": kv_heads, "head_size": head_size}


def _wavelengths(c: Fields, traits: Mapping[str, Any]) -> dict[str, Any]:
    """Of rotary positions, and the context that they reach."""
    context, head_size = c.whole("max_position_embeddings"), width_and_heads(c)["head_size"]
    theta, found = traits.get("rope_theta", 10_000.0), {}
    if local := traits.get("local_theta"):
        theta, scaling, found["local_theta"] = rope_scaling.read_layers(c, head_size, theta, local)
    else:
        theta, scaling = rope_scaling.read(c, head_size, theta)
    if scaling.get("short_factor") != scaling.get("long_factor"):
        # A longer text has other wavelengths, from its first token on; what is cached of it cannot follow.
        context = min(context, scaling["original_max_position_embeddings"])
    rope = rotary.scaled(scaling, theta, head_size, context)
    return found | {
        "context": context,
        "rope_theta": theta,
        "rope_divisors": rope.divisors,
        "rope_scale": rope.scale,
    }


def _activation(c: Fields, key: str, default: str) -> str:
    return _ACTIVATIONS[c.text(key, default, _ACTIVATIONS)]


def _refuse_others(c: Fields) -> None:
    """Raises `UserError` if the file is a drafter's, or of a model whose weights are quantised."""
    for key in ("draft_vocab_size", "speculators_model_type"):
        if c.given(key):
            raise c.wrong(key, "a target's config; this is a drafter's, which config.drafter.path takes")
    quantised.refuse_scheme(c)


def _no_code(c: Fields) -> None:
    """Raises `UserError` if the model has code of its own."""
    code = c.group("auto_map")
    own = [name for name in code.values if name.startswith("AutoModel")] if code else []
    if own:
        expected = f"no code of the model's own; it is not run, so remove this if {c.of} computes the same"
        raise c.wrong("auto_map", expected)


def _biases(c: Fields) -> dict[str, Any]:
    """Of queries, keys, values and output."""
    biased = c.flag("attention_bias")
    return {"attention_bias": biased, "out_bias": biased}


def _window(c: Fields) -> int:
    """How many tokens a layer with a window sees; 0: the file says that there is none."""
    return c.whole("sliding_window", 0 if "sliding_window" in c.values else _WINDOW)


def no_window(c: Fields) -> None:
    """Raises `UserError` if the file asks for a window, which a family without one would not have."""
    used, span = c.flag("use_sliding_window", True), c.whole("sliding_window", 0, least=0)
    if used and 0 < span < c.whole("max_position_embeddings", WHOLE):
        raise c.wrong("sliding_window", f"null: {c.of} has no window")
    _spans(c, 0, lambda layer: False)


def _spans(c: Fields, span: int, local: Callable[[int], bool]) -> tuple[int, ...]:
    """Of every layer: from `layer_types`, or by a rule where the file does not list them."""
    layers = c.whole("num_hidden_layers", 1, most=MOST_LAYERS)
    kinds = c.listed("layer_types", str, default=None)
    if kinds is None:
        return tuple(span if local(layer) else 0 for layer in range(layers))
    if len(kinds) != layers:
        raise c.error(f"found {len(kinds)} {c.prefix}layer_types, expected {layers}, one a layer")
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            raise c.error(f"found {kind!r} in {c.prefix}layer_types, expected {_FULL} or {_SLIDING}")
    if _SLIDING in kinds and not span:
        raise c.error(f"found {_SLIDING!r} in {c.prefix}layer_types, but no sliding_window that is in use")
    return tuple(span if kind == _SLIDING else 0 for kind in kinds)
