"""Pooling with PyTorch's conventions at the border. All maps are (B, H, W, C)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research.layers.norm import accumulation_dtype


def max_pool(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
    """Maximum over `window` x `window`, padded symmetrically with -inf."""
    return nn.max_pool(x, (window, window), (stride, stride), ((padding, padding),) * 2)


def avg_pool_ceil(x: jax.Array) -> jax.Array:
    """Mean over 2 x 2 at stride 2; a last odd row or column is averaged alone.

    PyTorch's `AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`.
    """
    height, width = x.shape[1:3]
    padding = ((0, height % 2), (0, width % 2))
    wide = x.astype(accumulation_dtype(x))
    total = nn.pooling.pool(wide, 0.0, jax.lax.add, (2, 2), (2, 2), padding)
    rows, columns = (np.minimum(2, size - 2 * np.arange((size + 1) // 2)) for size in (height, width))
    return (total / jnp.asarray(np.outer(rows, columns), wide.dtype)[None, :, :, None]).astype(x.dtype)


def global_mean(x: jax.Array) -> jax.Array:
    """(B, H, W, C) -> (B, C), summed in float32 or better, in the dtype of `x`.

    Raises:
      ValueError: a map without pixels, whose mean would be NaN: the image was too small for the network's strides.
    """
    height, width = x.shape[1:3]
    if not height * width:
        raise ValueError(f"the image is too small: a {height}x{width} map is left to average; give larger images")
    return jnp.mean(x, axis=(1, 2))


def adaptive_max_pool(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maxima over `size` windows that cover the map evenly, (B, H, W, C) -> (B, *size, C).

    PyTorch's `AdaptiveMaxPool2d`: window i of n along an axis of length L is [floor(i L / n), ceil((i + 1) L / n)), so
    neighbours overlap where n does not divide L.
    """
    for axis, count in zip((1, 2), size, strict=True):
        length = x.shape[axis]
        starts = np.arange(count) * length // count
        ends = -(-np.arange(1, count + 1) * length // count)
        # Shorter windows meet their last entry again, which is as good as once.
        where = np.minimum(starts[:, None] + np.arange(np.max(ends - starts))[None], ends[:, None] - 1)
        x = jnp.max(jnp.take(x, jnp.asarray(where), axis=axis), axis=axis + 1)
    return x
