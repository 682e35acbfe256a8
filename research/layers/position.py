"""Relative positions on a grid of tokens, as a learned bias of attention scores."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


def relative_position_index(rows: int, columns: int, class_token: bool = False) -> np.ndarray:
    """Row of the bias table for every (query, key) pair of a grid of tokens, (N, N) int32.

    Entry (i, j) encodes the offset of token i from token j as `(dy + rows - 1) * (2 columns - 1) + dx + columns - 1`
    (Swin, Liu et al. 2021, section 3.2). With `class_token`, token 0 is one outside the grid with three rows of its own
    at the end: class to token, token to class, class to class (BEiT).
    """
    y, x = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    offsets = (y[:, None] - y + rows - 1) * (2 * columns - 1) + x[:, None] - x + columns - 1
    if class_token:
        offsets = np.pad(offsets, ((1, 0), (1, 0)))
        first = (2 * rows - 1) * (2 * columns - 1)
        offsets[0, :], offsets[:, 0], offsets[0, 0] = first, first + 1, first + 2
    return offsets.astype(np.int32)


class RelativePositionBias(nn.Module):
    """A learned bias for every relative position of a `window` (rows, columns) of tokens: () -> (heads, N, N)."""

    window: tuple[int, int]
    num_heads: int
    class_token: bool = False
    init: Callable = nn.initializers.zeros

    @nn.compact
    def __call__(self) -> jax.Array:
        index = relative_position_index(*self.window, self.class_token)
        shape = (int(index.max()) + 1, self.num_heads)
        table = self.param("relative_position_bias_table", self.init, shape)
        bias = jnp.take(table, index.ravel(), axis=0, mode="clip").reshape(*index.shape, self.num_heads)
        return jnp.moveaxis(bias, -1, 0)
