"""Rotary position embedding: rotation, and the wavelengths that a model's files ask for.

Shape letters: E head size.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Wavelengths of a rotary position embedding.

    Attributes:
      theta: base of their geometric series.
      divisors: of each of the E / 2 frequencies, for contexts beyond the original one; empty: all 1.
      scale: of what is rotated, queries and keys alike.
    """

    theta: float
    divisors: tuple[float, ...] = ()
    scale: float = 1.0


def rotate(x: jax.Array, positions: jax.Array, rotary: Rotary) -> jax.Array:
    """Rotary position embedding (Su et al. 2021), halves convention, angles in float32.

    Args:
      x: `[..., heads, E]`.
      positions: int32 `[...]`, counted from 0.
      rotary: the wavelengths.
    """
    half = x.shape[-1] // 2
    frequencies = rotary.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rotary.divisors:
        frequencies /= jnp.array(rotary.divisors, jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rotary.scale != 1:
        cos, sin = cos * rotary.scale, sin * rotary.scale
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def scaled(scaling: Mapping[str, Any], theta: float, head_size: int, context: int = 0) -> Rotary:
    """The wavelengths that `rope_scaling` asks for, as transformers' `modeling_rope_utils` has them.

    Args:
      scaling: its keys and values, as `rope_scaling.read` gives them; {}: no scaling.
      theta, head_size: of the model.
      context: the longest text, in tokens; `longrope` alone depends on it.
    """
    values = dict(scaling)
    kind = values.pop("rope_type", None) or values.pop("type", "default")
    values.pop("type", None)
    if kind == "linear":
        return Rotary(theta, (float(values["factor"]),) * (head_size // 2))
    if kind == "llama3":
        sizes = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return Rotary(theta, llama3_divisors(theta, head_size, *(values[size] for size in sizes)))
    if kind == "yarn":
        return _yarn(theta, head_size, **values)
    if kind == "longrope":
        return _longrope(theta, context, **values)
    return Rotary(theta)


def llama3_divisors(
    theta: float, head_size: int, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones not, those between in part.

    A wavelength is long if fewer than `low` of it fit into the `original` context, short from `high` on.
    """
    half = head_size // 2
    fitting = original * theta ** (-np.arange(half) / half) / (2 * np.pi)  # wavelengths in the context
    return _stretched(factor, (fitting - low) / (high - low))


def _stretched(factor: float, kept: np.ndarray) -> tuple[float, ...]:
    """Divisors where `kept`, between 0 and 1, is the part of a frequency that is not stretched."""
    kept = np.clip(kept, 0, 1)
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())


def _yarn(
    theta: float,
    head_size: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
) -> Rotary:
    """YaRN (Peng et al. 2023): wavelengths that fit in less than `beta_slow` times into the original context
    are stretched, those of more than `beta_fast` not; attention gets sharper by the scale."""

    def dimension(rotations: float) -> float:
        """The (fractional) index, of E, of the wavelength that fits in so often."""
        fits = original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_size * math.log(fits) / (2 * math.log(theta))

    def sharper(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low or 0.001
    if attention_factor is None:
        attention_factor = sharper(1.0)
        if mscale and mscale_all_dim:
            attention_factor = sharper(mscale) / sharper(mscale_all_dim)
    stretched = np.clip((np.arange(head_size // 2) - low) / width, 0, 1)
    return Rotary(theta, _stretched(factor, 1 - stretched), attention_factor)


def _longrope(
    theta: float,
    context: int,
    *,
    factor: float,
    original_max_position_embeddings: int,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    attention_factor: float | None = None,
) -> Rotary:
    """LongRoPE (Ding et al. 2024): divisors for contexts up to the original one, and others beyond it."""
    original = original_max_position_embeddings
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return Rotary(theta, tuple(long_factor if context > original else short_factor), attention_factor)
