"""Rotary positions: queries and keys turned by angles that grow with the position, so scores know distances alone.

Source: RoFormer, Su et al. 2021 (arXiv 2104.09864), equation 34, with the halves of a head as the two coordinates of
its planes, the layout of Hugging Face's LLaMA (Meta's own files interleave them).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.layers.norm import accumulation_dtype

SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, (..., N, D/2) of float32 or better, broadcast over heads."""

    cos: jax.Array
    sin: jax.Array


def frequencies(dim: int, base: float = 10000.0, scaling: Mapping | None = None) -> np.ndarray:
    """Radians that each of the `dim` / 2 planes turns per position: base^(-2i/dim), float64.

    Args:
      scaling: how a model was made to read longer texts, as `rope_scaling` in Hugging Face's config: `rope_type`
        `linear` divides all frequencies by `factor` (Chen et al. 2023); `llama3` divides those whose wavelength exceeds
        `original_max_position_embeddings / low_freq_factor`, keeps those below the same over `high_freq_factor`, and
        goes from one to the other in between (Llama 3.1).
    Raises:
      ValueError: `dim` is odd, a `rope_type` that is not known, or one without its numbers.
    """
    if dim % 2:
        raise ValueError(f"rotary positions need an even number of channels a head, not {dim}")
    plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = dict(scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in SCALINGS:
        raise ValueError(f"rope_scaling: rope_type {kind!r} is none of {', '.join(SCALINGS)}")
    missing = [key for key in SCALINGS[kind] if key not in scaling]
    if missing:
        raise ValueError(f"rope_scaling: {kind} needs {', '.join(missing)}")
    if kind == "default":
        return plain
    slow = plain / scaling["factor"]
    if kind == "linear":
        return slow
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * slow + kept * plain


def rotation(positions: jax.Array, frequency: np.ndarray) -> Rotation:
    """How far `positions` (..., N) int turn planes of `frequency` (D/2,), with an axis for heads: (..., 1, N, D/2).

    Angles are float32, or float64 under x64, whatever the model computes in: bfloat16 cannot tell 256 from 257.
    """
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    shape = (1,) * positions.ndim + frequency.shape
    angle = positions.astype(wide)[..., None] * jnp.asarray(frequency, wide).reshape(shape)
    return Rotation(jnp.cos(angle)[..., None, :, :], jnp.sin(angle)[..., None, :, :])


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """x (..., heads, N, D) with its halves taken as D/2 planes, turned; computed in float32 or better."""
    half, wide = x.shape[-1] // 2, accumulation_dtype(x)
    cos, sin = (part.astype(wide) for part in by)
    first, second = x[..., :half].astype(wide), x[..., half:].astype(wide)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)
