"""Rotary position embedding: rotation, and the wavelengths that a model's files ask for.

Shape letters: E head size.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppow_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Wavelengths of a rotary position embedding.

    Attributes:
      theta: base of their geometric series.
      divisors: of each of the E / 2 frequencies, for contexts beyond the original one; empty: all 1.
    """

    theta: float
    divisors: tuple[float, ...] = ()


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
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


def rotary(c: Mapping[str, Any]) -> tuple[float, Mapping[str, Any]]:
    """Base and scaling of the wavelengths of layers that see everything, from newer or older keys."""
    about = c.get("rope_parameters") or {}
    about = about.get("full_attention", about)
    theta = float(about.get("rope_theta") or c.get("rope_theta") or 10_000.0)
    return theta, about or c.get("rope_scaling") or {}


def divisors(scaling: Mapping[str, Any], theta: float, head_size: int) -> tuple[float, ...]:
    """See `Rotary`; of `rope_scaling` or `rope_parameters`, {}: no scaling.

    Raises:
      UserError: a kind of scaling that is not supported.
    """
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return ()
    if kind == "linear":
        return (float(scaling["factor"]),) * (head_size // 2)
    if kind == "llama3":
        sizes = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return llama3_divisors(theta, head_size, *(scaling[key] for key in sizes))
    raise UserError(f"found rotary scaling {kind!r}, expected default, linear or llama3")


def llama3_divisors(
    theta: float, head_size: int, factor: float, low: float, high: float, original: int
) -> tuple[float, ...]:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones not, those between in part.

    A wavelength is long if fewer than `low` of it fit into the `original` context, short from `high` on.
    """
    half = head_size // 2
    fitting = original * theta ** (-np.arange(half) / half) / (2 * np.pi)  # wavelengths in the context
    kept = np.clip((fitting - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - kept) / factor + kept)).tolist())
