"""Windows of a map that shift from block to block, as Swin transformers attend in (Liu et al. 2021, section 3.2)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# What the official networks add to the scores of tokens that only the cyclic shift made neighbours.
OTHER_REGION = -100.0


class Layout(NamedTuple):
    """How a map is cut: (rows, columns) of a window, and by how many it is rolled first."""

    window: tuple[int, int]
    shift: tuple[int, int]


def layout(size: tuple[int, int], window: tuple[int, int], shifted: bool) -> Layout:
    """The window cut to a map of `size`, and the shift: half a window, and none along a side the window covers."""
    cut = tuple(min(side, w) for side, w in zip(size, window, strict=True))
    half = tuple(w // 2 if shifted and side > w else 0 for side, w in zip(size, window, strict=True))
    return Layout(cut, half)


def partition(x: jax.Array, window: tuple[int, int]) -> jax.Array:
    """Windows of a map: (B, H, W, C) -> (B, windows, tokens of a window, C), both in row-major order."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window[0], window[0], width // window[1], window[1], channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, window[0] * window[1], channels)


def merge(windows: jax.Array, window: tuple[int, int], size: tuple[int, int]) -> jax.Array:
    """The map of `size` (H, W) whose `partition` is `windows`."""
    batch, _, _, channels = windows.shape
    x = windows.reshape(batch, size[0] // window[0], size[1] // window[1], *window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *size, channels)


def shift_mask(size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> jax.Array:
    """What to add to the scores within each window of a map rolled by `shift`: (windows, tokens, tokens) float32.

    Tokens that the roll brought together from opposite sides of the image do not see each other.
    """

    def band(side, window, shift):
        edges = (side - window, side - shift) if shift else ()
        return np.searchsorted(edges, np.arange(side), side="right")

    rows, columns = (band(*axis) for axis in zip(size, window, shift, strict=True))
    regions = jnp.asarray(3 * rows[:, None] + columns, jnp.int32)[None, :, :, None]
    regions = partition(regions, window)[0, :, :, 0]
    return jnp.where(regions[:, :, None] == regions[:, None, :], 0.0, OTHER_REGION)


def attended(x: jax.Array, layout: Layout, bias: jax.Array, attention: Callable) -> jax.Array:
    """A map (B, H, W, C) with `attention(tokens, bias)` within its windows.

    Maps are rolled first and padded with zeros to whole windows afterwards; padding takes part in the attention, as in
    the official networks.

    Args:
      bias: by relative position, (heads, tokens, tokens); the mask of the shift is added to it.
      attention: function of tokens (B, windows, tokens, C) and a bias with trailing axes (windows, heads, tokens,
        tokens) that keeps the shape of its tokens.
    """
    (window, shift), size = layout, x.shape[1:3]
    x = jnp.roll(x, (-shift[0], -shift[1]), axis=(1, 2)) if any(shift) else x
    padding = [-side % w for side, w in zip(size, window, strict=True)]
    x = jnp.pad(x, ((0, 0), (0, padding[0]), (0, padding[1]), (0, 0))) if any(padding) else x
    padded = x.shape[1:3]
    if any(shift):
        bias = bias[None] + shift_mask(padded, window, shift).astype(bias.dtype)[:, None]
    x = merge(attention(partition(x, window), bias), window, padded)[:, : size[0], : size[1]]
    return jnp.roll(x, shift, axis=(1, 2)) if any(shift) else x


def neighbours(x: jax.Array) -> jax.Array:
    """Every 2x2 neighbours as one token: (B, H, W, C) -> (B, ceil(H/2), ceil(W/2), 4C).

    Neighbours (row, column) are in the order (0, 0), (1, 0), (0, 1), (1, 1). Odd sides are padded with zeros.
    """
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    x = x.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, channels)
    return x.transpose(0, 1, 3, 4, 2, 5).reshape(batch, (height + 1) // 2, (width + 1) // 2, 4 * channels)
