"""Matrix product of values of one bit, 32 to a word: XOR, then a count of ones.

A bit is 1 for +1 (and for 0, as the sign of a sum) and 0 for -1; bit j of word t is column 32 t + j, and the last word
is filled with zeros. Activations may have a third value, 0, told by a second plane of bits. Results are exact integers;
scales are the caller's. There is no gradient: what trains keeps its real weights (see `research.layers.binary`).

On all platforms this is `reference.py`, compiled by XLA.
"""

import jax
import jax.numpy as jnp

from research.kernels.binary_matmul import reference
from research.kernels.binary_matmul.reference import WORD, pack_bits, pack_signs, unpack_signs, words

__all__ = ["WORD", "binary_matmul", "pack_bits", "pack_signs", "unpack_signs", "words"]


def binary_matmul(a: jax.Array, b: jax.Array, k: int, nonzero: jax.Array | None = None) -> jax.Array:
    """The product of (..., k) by (k, n) values of +1 and -1, and 0 on the left: packed -> (..., n) int32.

    Args:
      a: signs (..., words(k)) uint32, see `pack_signs`.
      b: signs of the n columns, (n, words(k)) uint32.
      k: number of values in a row; any, also one that leaves the last word half empty.
      nonzero: ones where `a` has a value other than 0, (..., words(k)) uint32, from `pack_bits(x != 0)`; none has by
        default.
    Raises:
      ValueError: operands that are no uint32 words of k values.
    """
    planes = {"a": a, "b": b} | ({} if nonzero is None else {"nonzero": nonzero})
    for name, plane in planes.items():
        if plane.dtype != jnp.uint32 or plane.shape[-1:] != (words(k),):
            raise ValueError(
                f"{name}: {plane.dtype} of shape {plane.shape} is no array of {words(k)} uint32 words a row, which "
                f"{k} values fill: make it with pack_signs or pack_bits"
            )
    if b.ndim != 2 or (nonzero is not None and nonzero.shape != a.shape):
        shape = None if nonzero is None else nonzero.shape
        raise ValueError(f"shapes do not fit: a {a.shape}, nonzero {shape} (as a), b {b.shape} (two axes)")
    flat = lambda plane: None if plane is None else plane.reshape(-1, words(k))
    return reference.binary_matmul(flat(a), b, k, flat(nonzero)).reshape(*a.shape[:-1], b.shape[0])
