"""Learned positions of one image size resampled for another, on the host, as timm does on import."""

import math

import numpy as np

Grid = tuple[int, int]


def cubic_weights(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of bicubic interpolation between grids of `old` and `new` cells over the same length.

    Keys' kernel with a = -1/2, widened where the grid shrinks (antialiasing), cut and renormalised at the border: what
    Pillow and PyTorch's `interpolate(mode="bicubic", antialias=True)` compute.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(old) - centres[:, None]) / stretch
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0.0))
    return weights / weights.sum(axis=1, keepdims=True)


def sharp_cubic_weights(old: int, new: int) -> np.ndarray:
    """`cubic_weights` without antialiasing, with a = -3/4 and the border repeated.

    What PyTorch's `interpolate(mode="bicubic")` and OpenCV compute.
    """
    centres = (np.arange(new) + 0.5) * (old / new) - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        at = np.floor(centres) + tap
        distance = np.abs(centres - at)
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        columns = np.clip(at, 0, old - 1).astype(int)
        np.add.at(weights, (np.arange(new), columns), np.where(distance < 1, near, np.where(distance < 2, far, 0.0)))
    return weights


def absolute(
    embedding: np.ndarray, grid: Grid, prefix: int, old: Grid | None = None, weights=cubic_weights
) -> np.ndarray:
    """Position embeddings (1, prefix + old rows x columns, C) for a grid of (rows, columns) tokens.

    The first `prefix` entries (class and distillation tokens) are kept. The old grid is square unless stated. `weights`
    interpolates: `cubic_weights` as timm does on import, `sharp_cubic_weights` as DeiT and EViT do.

    Raises:
      ValueError: the old grid is neither square nor stated.
    """
    tokens, patches = embedding[:, :prefix], embedding[:, prefix:]
    old = old or (math.isqrt(patches.shape[1]),) * 2
    if old[0] * old[1] != patches.shape[1]:
        raise ValueError(
            f"{patches.shape[1]} position embeddings do not form a square grid: state the old grid (rows, columns)"
        )
    rows, columns = (weights(before, after) for before, after in zip(old, grid, strict=True))
    values = patches.reshape(*old, -1).astype(np.float64)
    values = np.einsum("hi,wj,ijc->hwc", rows, columns, values).reshape(1, -1, embedding.shape[-1])
    return np.concatenate([tokens, values.astype(embedding.dtype)], axis=1)


def relative(table: np.ndarray, window: Grid, extra: int) -> np.ndarray:
    """Relative position biases ((2r-1)^2 + extra, heads) for a window of (rows, columns) tokens.

    Distances are laid out in a geometric progression, so that near neighbours keep their fine resolution and the far
    end of the old table meets that of the new one, with linear interpolation between (Bao et al. 2022, BEiT; linear as
    in timm). The last `extra` rows, those of a class token, are kept.

    Raises:
      ValueError: the old table is not of a square window.
    """
    biases, kept = table[: len(table) - extra], table[len(table) - extra :]
    side = math.isqrt(len(biases))
    if side * side != len(biases) or side % 2 == 0:
        raise ValueError(f"{len(biases)} relative position biases are not those of a square window")
    rows, columns = (_geometric_weights(side, 2 * size - 1) for size in window)
    values = biases.reshape(side, side, -1).astype(np.float64)
    values = np.einsum("hi,wj,ijc->hwc", rows, columns, values).reshape(-1, table.shape[-1])
    return np.concatenate([values.astype(table.dtype), kept])


def window(length: int, grid: Grid) -> tuple[Grid, int]:
    """(rows, columns) of the window, and rows of a class token, of a relative position table of `length` rows.

    The window is the whole `grid` of tokens if that fits, else a square.

    Raises:
      ValueError: neither fits.
    """
    for extra in (0, 3):
        side = (math.isqrt(length - extra) + 1) // 2 if length > extra else 0
        for rows, columns in (grid, (side, side)):
            if (2 * rows - 1) * (2 * columns - 1) + extra == length:
                return (rows, columns), extra
    raise ValueError(f"a table of {length} relative positions is neither that of a {grid} window nor of a square one")


def _geometric_weights(old: int, new: int) -> np.ndarray:
    """(new, old) matrix of linear interpolation at -new//2..new//2 between points in geometric progression."""
    if old == new:
        return np.eye(old)
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio ** (old // 2)) / (1 - ratio) > new // 2:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum(ratio ** np.arange(old // 2))
    points = np.concatenate([-positive[::-1], [0.0], positive])
    targets = np.arange(new) - new // 2
    return np.stack([np.interp(targets, points, column) for column in np.eye(old)], axis=1)
