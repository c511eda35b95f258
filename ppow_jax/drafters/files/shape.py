"""The shape of a drafter from its `config.json`, whoever of EAGLE, SpecForge or speculators wrote it.

Keys that no server reads either are left alone: many files carry those of their target.
"""

from collections.abc import Collection

from ppow_jax.drafters.eagle3 import DrafterConfig
from ppow_jax.drafters.files import dialects
from ppow_jax.errors import UserError
from ppow_jax.models import rope_scaling
from ppow_jax.models.fields import Fields
from ppow_jax.models.target import TargetConfig, default_taps
from ppow_jax.targets import families, quantised

_NORMS = {"fc_norm": "each", "norm_before_fc": "all"}
# what a drafter computes otherwise where these hold something else: in `eagle_config` and at the top
_NESTED = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
    "parallel_draft_step": 1,
}
_TOP = {
    "mlp_bias": False,
    "bias": False,
    "qkv_bias": False,
    "is_causal": True,
    "use_moe": False,
    "logit_scale": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "aux_hidden_state_layer_ids": None,
    "target_layer_ids": None,
    "speculators_model_type": "eagle3",
}


def shape(c: Fields, tensors: Collection[str], target: TargetConfig) -> tuple[DrafterConfig, tuple[int, ...]]:
    """The drafter's shape, and the target's layers whose inputs it sees.

    Args:
      c: what its `config.json` holds.
      tensors: the names of its tensors.
      target: shape of the target that will verify.

    Raises:
      UserError: weights that are quantised, a key that is missing, of a wrong type or not supported, or the
        drafter is for another target.
    """
    c.of = "an EAGLE-3 drafter"
    inner = c.group("transformer_layer_config") or c
    nested = c.group("eagle_config") or Fields({}, c.where, "eagle_config.")
    for part in (c, inner):
        quantised.refuse_scheme(part)
        for key, value in _TOP.items():
            part.only(key, value)
    for key, value in _NESTED.items():
        nested.only(key, value)
    families.no_window(inner)
    inner.text("hidden_act", "silu", ("silu",))
    _check_norm_output(c, nested)
    taps = _taps(c, nested, target)
    sizes = families.width_and_heads(inner)
    theta, scaling = rope_scaling.read(inner, sizes["head_size"])
    attention = f"{dialects.server_of(tensors).layer}.self_attn"
    config = DrafterConfig(
        vocab_size=_vocab_size(c, inner, target),
        taps_width=len(taps) * target.width,
        mlp_hidden=inner.whole("intermediate_size"),
        rope_theta=theta,
        norm_epsilon=inner.number("rms_norm_eps", 1e-6, zero=True),
        embedding_size=target.vocab_size if dialects.EMBEDDING in tensors else 0,
        layers=inner.whole("num_hidden_layers", 1, most=families.MOST_LAYERS),
        rope_scaling=tuple(scaling.items()),
        rope_context=target.context if scaling.get("rope_type") == "longrope" else 0,
        attention_bias=f"{attention}.q_proj.bias" in tensors,
        out_bias=f"{attention}.o_proj.bias" in tensors,
        head_norms=f"{attention}.q_norm.weight" in tensors,
        taps=len(taps),
        tap_norms=next((norm for key, norm in _NORMS.items() if _either(c, nested, key)), ""),
        normed_residual=_either(c, nested, "norm_before_residual"),
        feeds_normed=_either(c, nested, "norm_output"),
        **sizes,
    )
    _check_target(c, inner, config, target)
    if inner.flag("attention_bias", config.attention_bias) != config.attention_bias:
        raise inner.wrong("attention_bias", f"{str(config.attention_bias).lower()}, as its tensors have it")
    return config, taps


def _either(c: Fields, nested: Fields, key: str) -> bool:
    """A flag that stands at the top or in `eagle_config`."""
    return c.flag(key, nested.flag(key))


def _check_norm_output(c: Fields, nested: Fields) -> None:
    meant = c.given("transformer_layer_config") or c.text("trained_with", "") == dialects.US
    if _either(c, nested, "norm_output") and not meant:
        raise c.error(
            "found norm_output true, which SpecForge (a norm before the head) and the servers (the normed "
            "state is fed on) take to mean two things; remove it if SpecForge wrote the file"
        )


def _vocab_size(c: Fields, inner: Fields, target: TargetConfig) -> int:
    """Of the draft vocabulary."""
    whole = inner.whole("vocab_size", target.vocab_size)
    if whole != target.vocab_size:
        raise inner.wrong(
            "vocab_size", f"the target's {target.vocab_size}; this drafter is for another target"
        )
    found = c.whole("draft_vocab_size", whole)
    if found > whole:
        raise c.wrong("draft_vocab_size", f"at most the target's vocab_size, {whole}")
    return found


def _check_target(c: Fields, inner: Fields, config: DrafterConfig, target: TargetConfig) -> None:
    """Raises `UserError` if the drafter is for a target of another width."""
    if c.whole("target_hidden_size", target.width) != target.width:
        raise c.wrong(
            "target_hidden_size", f"the target's {target.width}; this drafter is for another target"
        )
    if not config.embedding_size and config.width != target.width:
        raise UserError(
            f"{c.where}: found hidden_size {config.width} and no {dialects.EMBEDDING}; the target's "
            f"embedding, which it would read, is {target.width} wide"
        )


def _taps(c: Fields, nested: Fields, target: TargetConfig) -> tuple[int, ...]:
    """The tapped layers, by their inputs."""
    inputs = c.listed(dialects.IDS, int, default=()) or ()
    outputs = nested.listed(dialects.IDS, int, default=()) or ()
    found = inputs or tuple(layer + 1 for layer in outputs) or default_taps(target.layers)
    n, said = target.layers, c if inputs else nested
    if not found:
        raise c.error(f"found no {dialects.IDS}, which a drafter for {n} layers has; add it")
    if list(found) != sorted(set(found)) or found[0] < 0 or found[-1] > n:
        limits = f"0 to {n}, by their inputs" if inputs else f"-1 to {n - 1}, by their outputs"
        raise said.wrong(dialects.IDS, f"ascending layers of the target, from {limits}")
    if inputs and outputs and tuple(layer + 1 for layer in outputs) != inputs:
        raise nested.wrong(dialects.IDS, f"outputs of the layers before {list(inputs)}, as at the top")
    if c.whole("num_aux_hidden_states", len(found)) != len(found):
        raise c.wrong("num_aux_hidden_states", f"{len(found)}, the number of tapped layers")
    return found
