"""SmoothQuant: outliers of activations are moved into the weights that follow, before anything is rounded.

Source: Xiao et al. 2023 (arXiv 2211.10438, equation 4) and the official `smoothquant/smooth.py` (commit c61476d7).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from research.quantize.grids import SMALLEST


def factors(activations: jax.Array, kernels: Sequence[jax.Array], alpha: float = 0.5) -> jax.Array:
    """By what each channel of activations is divided: max|X|^alpha / max|W|^(1 - alpha), (K,).

    Args:
      activations: largest magnitudes of the channels, (K,).
      kernels: all that read them, (K, N...) each.
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(w.reshape(w.shape[0], -1)), axis=1) for w in kernels]), axis=0)
    weights = jnp.maximum(largest, SMALLEST)
    return jnp.maximum(activations**alpha / weights ** (1 - alpha), SMALLEST)


def fold(norm: Sequence[jax.Array], kernels: Sequence[jax.Array], factors: jax.Array) -> tuple[list, list]:
    """(parameters of what makes the activations, kernels that read them) with the same products.

    Args:
      norm: arrays (..., K): scale and bias of a norm, kernel and bias of a dense layer; kernels: (K, N...).
    """
    scaled = [w * factors.astype(w.dtype).reshape(-1, *[1] * (w.ndim - 1)) for w in kernels]
    return [p / factors.astype(p.dtype).reshape(*[1] * (p.ndim - 1), -1) for p in norm], scaled
