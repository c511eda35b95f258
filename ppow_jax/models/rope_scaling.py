"""What a model's files say of its rotary wavelengths, in newer keys (`rope_parameters`) or older ones.

The keys are those of Hugging Face transformers; what is missing means what it means there.
"""

from typing import Any

from ppow_jax.models.fields import Fields

_THETA = 10_000.0
KINDS = ("default", "linear", "llama3", "yarn", "longrope")
_HARMLESS = ("finetuned",)  # says how the weights came about


def read(c: Fields, head_size: int, theta: float = _THETA) -> tuple[float, dict[str, Any]]:
    """Base of the wavelengths, and their scaling with all the keys that `rotary.scaled` takes; {}: none.

    Args:
      c: of `config.json`.
      head_size: of the model.
      theta: the base where the file names none.

    Raises:
      UserError: a kind of scaling that is not supported, keys that are missing, unknown or of a wrong type,
        or newer and older keys that say two things.
    """
    older, newer = c.group("rope_scaling"), c.group("rope_parameters")
    return _agreed(c, older, newer, head_size, theta)


def read_layers(c: Fields, head_size: int, theta: float, local: float) -> tuple[float, dict[str, Any], float]:
    """As `read`, for a model whose layers with a window have wavelengths of their own; and those' base.

    Raises:
      UserError: as `read`; or the wavelengths of layers with a window are scaled, which is not supported.
    """
    older, newer = c.group("rope_scaling"), c.group("rope_parameters")
    base = c.number("rope_local_base_freq", None, above=1)
    inner = newer and newer.group("sliding_attention")
    if inner:
        inner.only("rope_type", "default")
        inner.only("type", "default")
        found = inner.number("rope_theta", base or local, above=1)
        if base and found != base:
            raise c.wrong("rope_local_base_freq", f"that of {inner.prefix}rope_theta, {found}, or neither")
        base = found
        inner.rest(_HARMLESS.__contains__)
    full = newer and newer.group("full_attention")
    if newer:
        newer.rest(_HARMLESS.__contains__)
    return *_agreed(c, older, full, head_size, theta), base or local


def _agreed(
    c: Fields, older: Fields | None, newer: Fields | None, head_size: int, theta: float
) -> tuple[float, dict[str, Any]]:
    """What both groups say; where there are two, they must say the same."""
    outside = c.number("rope_theta", None, above=1)
    groups = [group for group in (newer, older) if group and group.values]
    found = [(g.number("rope_theta", outside or theta, above=1), _scaling(g, c, head_size)) for g in groups]
    if not found:
        c.only("partial_rotary_factor", 1.0)
        return outside or theta, {}
    if outside and groups[0].given("rope_theta") and found[0][0] != outside:
        raise c.wrong(
            "rope_theta", f"as in {groups[0].prefix}rope_theta, {found[0][0]}, or one of them alone"
        )
    both_named = len(found) == 2 and all(group.given("rope_theta") for group in groups)
    if len(found) == 2 and (found[0][1] != found[1][1] or (both_named and found[0][0] != found[1][0])):
        raise c.wrong("rope_scaling", "what rope_parameters says too, or one of them alone")
    return found[0]


def _scaling(group: Fields, c: Fields, head_size: int) -> dict[str, Any]:
    """The scaling that one group describes."""
    kind = group.text("rope_type", None, KINDS)
    older = group.text("type", None, KINDS)
    kind = kind or older or "default"
    group.number("rope_theta", None, above=1)
    group.only("partial_rotary_factor", 1.0)
    c.only("partial_rotary_factor", 1.0)
    found: dict[str, Any] = {} if kind == "default" else {"rope_type": kind}
    group.of = f"a scaling of the kind {kind!r}"
    if kind in ("linear", "llama3"):
        found["factor"] = group.number("factor")
    elif kind in ("yarn", "longrope"):
        found |= _with_attention(group, c, kind)
    if kind == "llama3":
        found |= {key: group.number(key) for key in ("low_freq_factor", "high_freq_factor")}
        if found["high_freq_factor"] <= found["low_freq_factor"]:
            raise group.wrong("high_freq_factor", f"more than low_freq_factor, {found['low_freq_factor']}")
        found["original_max_position_embeddings"] = group.whole("original_max_position_embeddings")
    elif kind == "longrope":
        for key in ("short_factor", "long_factor"):
            found[key] = group.listed(key, float, head_size // 2)
    elif kind == "yarn":
        for key in ("mscale", "mscale_all_dim", "beta_fast", "beta_slow"):
            if value := group.number(key, None, zero=True):  # 0 is as if it were missing
                found[key] = value
        if not group.flag("truncate", True):
            found["truncate"] = False
    group.rest(_HARMLESS.__contains__)
    return found


def _with_attention(group: Fields, c: Fields, kind: str) -> dict[str, Any]:
    """Keys that yarn and longrope share. What is missing is filled in: it depends on the model's context."""
    context = c.whole("max_position_embeddings", 0)
    original = group.whole("original_max_position_embeddings", context or None, least=2)
    original = c.whole("original_max_position_embeddings", original, least=2)  # which goes first
    if original is None:
        raise group.error(f"found no {group.prefix}original_max_position_embeddings; add it")
    # the ratio of the contexts, unless it is said; yarn wants that said too, as null
    optional = context and (kind == "longrope" or "factor" in group.values)
    factor = group.number("factor", context / original) if optional else group.number("factor")
    found = {"factor": factor, "original_max_position_embeddings": original}
    attention = group.number("attention_factor", None)
    return found | ({} if attention is None else {"attention_factor": attention})
