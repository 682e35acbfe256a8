"""2:4 sparsity: two of every four neighbouring weights are kept.

Masks are uint8 of ones and zeros in the shape of the weight. Along one axis the best mask is that of the two largest
magnitudes; along both, so that the transposed weight is 2:4 too, a greedy mask may stop below half, and the best of the
90 patterns of 4 x 4 does not. Source: NVIDIA's apex, `contrib/sparsity/sparse_masklib.py` (commit 6424da3b), in which
a matrix is (outputs, inputs); ties go as there.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

M, KEPT = 4, 2
# Patterns of a row in the order in which the official code tries them (that of a Python set), where the first of equal
# sums wins.
PATTERNS_1D = ((0, 1, 0, 1), (1, 1, 0, 0), (0, 1, 1, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 0, 1, 1))


@struct.dataclass
class Compressed:
    """A matrix (N, K) of 2:4 sparsity along K.

    Attributes:
      values: what is kept, row by row, (N, K / 2).
      index: uint8 (N, K / 2), the place 0 to 3 of each within its four; two bits each.
    """

    values: jax.Array
    index: jax.Array


def best_1d(w: jax.Array) -> jax.Array:
    """The mask of a matrix (N, K) that keeps most magnitude in every four of a row ("m4n2_1d").

    Raises:
      ValueError: K is no multiple of 4.
    """
    patterns = jnp.asarray(PATTERNS_1D, w.dtype)
    sums = jnp.einsum("nbi,pi->nbp", jnp.abs(_fours(w)), patterns, precision="highest")
    return patterns.astype(jnp.uint8)[jnp.argmax(sums, axis=-1)].reshape(w.shape)


def greedy_2d(w: np.ndarray) -> np.ndarray:
    """The mask of a matrix (N, K) with at most two of four kept in rows and columns ("m4n2_2d_greedy").

    Entries of each 4 x 4 tile are taken from the largest on where row and column allow it. Rows and columns beyond the
    last whole tile are kept.
    """
    w = np.asarray(w)
    mask = np.ones(w.shape, np.uint8)
    rows, columns = (size // M * M for size in w.shape)
    tiles = np.abs(w[:rows, :columns]).reshape(rows // M, M, columns // M, M).swapaxes(1, 2).reshape(-1, M * M)
    order = np.argsort(tiles, axis=1)[:, ::-1]
    kept = np.zeros((len(tiles), M, M), np.uint8)
    each = np.arange(len(tiles))
    for entry in order.T:
        row, column = entry // M, entry % M
        free = (kept.sum(2)[each, row] < KEPT) & (kept.sum(1)[each, column] < KEPT)
        kept[each, row, column] = free
    mask[:rows, :columns] = kept.reshape(rows // M, columns // M, M, M).swapaxes(1, 2).reshape(rows, columns)
    return mask


def patterns_2d() -> np.ndarray:
    """The 90 masks of 4 x 4 with two ones in every row and column, (90, 4, 4)."""
    rows = [p for p in itertools.product((0, 1), repeat=M) if sum(p) == KEPT]
    squares = np.array(list(itertools.product(rows, repeat=M)))
    return squares[(squares.sum(axis=1) == KEPT).all(axis=1)]


def best_2d(w: jax.Array) -> jax.Array:
    """The mask of a matrix (N, K) with two of four kept in rows and columns that keeps most magnitude ("m4n2_2d_best").

    Raises:
      ValueError: N or K is no multiple of 4.
    """
    n, k = _fours(w.T).shape[1] * M, _fours(w).shape[1] * M
    patterns = jnp.asarray(patterns_2d())
    tiles = jnp.abs(w).reshape(n // M, M, k // M, M).swapaxes(1, 2)
    sums = jnp.einsum("abij,pij->abp", tiles, patterns.astype(w.dtype), precision="highest")
    mask = patterns.astype(jnp.uint8)[jnp.argmax(sums, axis=-1)]
    return mask.swapaxes(1, 2).reshape(n, k)


def of_inputs(mask: Callable, w: jax.Array) -> jax.Array:
    """The mask of a weight of any rank, (out, in), (out, in, width) or (out, in, height, width), along its inputs.

    As the official code, kernels of images are taken place by place; what is kept of one place says nothing of others.
    """
    if w.ndim == 4:  # places first
        rows = w.transpose(2, 3, 0, 1)
        return mask(rows.reshape(-1, w.shape[1])).reshape(rows.shape).transpose(2, 3, 0, 1)
    rows = jnp.moveaxis(w, 1, -1)
    return jnp.moveaxis(mask(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape), -1, 1)


def compress(w: jax.Array, mask: jax.Array) -> Compressed:
    """The kept values of a matrix (N, K) and their places; exact for masks with two of four.

    Fewer kept ones are filled up with masked entries as zeros.
    """
    masked = _fours(w * mask.astype(w.dtype))
    # Kept ones first, both sorts in the order of their places.
    places = jnp.sort(jnp.argsort(1 - _fours(mask), axis=-1, stable=True)[..., :KEPT], axis=-1)
    values = jnp.take_along_axis(masked, places, axis=-1)
    return Compressed(values.reshape(len(w), -1), places.astype(jnp.uint8).reshape(len(w), -1))


def decompress(compressed: Compressed) -> jax.Array:
    """The matrix (N, K) with its zeros."""
    n = len(compressed.values)
    values, places = (part.reshape(n, -1, KEPT) for part in (compressed.values, compressed.index.astype(jnp.int32)))
    ones = jax.nn.one_hot(places, M, dtype=values.dtype)
    return jnp.einsum("nbk,nbki->nbi", values, ones, precision="highest").reshape(n, -1)


def _fours(w: jax.Array) -> jax.Array:
    if w.shape[-1] % M:
        raise ValueError(f"2:4 sparsity is along axes of a multiple of {M}, not of {w.shape[-1]} (shape {w.shape})")
    return w.reshape(len(w), -1, M)
