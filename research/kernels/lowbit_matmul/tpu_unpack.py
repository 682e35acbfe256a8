"""How TPU kernels take codes out of the words of `layout.py`: several at once, in the fields of a 32-bit word.

A shift and a mask leave one code in each field of a word: two of 16 bits, four of 8 or eight of 4. In a register such
words are two, four or eight rows of the type of that width, so that a bitcast, which costs nothing, makes them operands
of a matrix unit: int8 and int4 as they are, bfloat16 by laying a code of b bits at the top of the fraction, under the
exponent of 2^b: that is 2^b + code, exactly. What is left to do to a weight is less than two operations.

The price is the order of rows: fields lie beside each other that are far apart in a block. `order` tells it, and inputs
are brought into it. Everything is by the chunk, 256 rows of a weight.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from research.kernels.lowbit_matmul.layout import BLOCK, PLANES, WORD, block_rows

CHUNK = BLOCK
FRACTION, EXPONENT = 7, 127  # bits of a bfloat16's fraction, the exponent of 1


class Fields(NamedTuple):
    """What a product takes of the planes of a weight.

    Fields:
      planes: their positions in `Packed.planes`.
      widths: bits of a value in each.
      lows: where those bits lie in a code; of a single plane 0.
      bits: of what the planes make together.
      factor: what the product counts.
      dtype: of the operand that is made.
      bias: the operand is a code plus this.
    """

    planes: tuple[int, ...]
    widths: tuple[int, ...]
    lows: tuple[int, ...]
    bits: int
    factor: int
    dtype: jnp.dtype
    bias: int


def products(bits: int, k: int, dtype) -> tuple[Fields, ...]:
    """What products a weight of `bits` and K inputs takes: one, or where blocks are short one for each plane.

    Planes of different widths share the order of their rows only in blocks of 256.

    Args:
      dtype: bfloat16, int8, or int4 for 4 bits.
    """
    widths, dtype = PLANES[bits], jnp.dtype(dtype)
    if bits == 8:
        return (Fields((0,), (8,), (0,), 8, 1, dtype, -128),)
    bias = lambda bits: {jnp.dtype(jnp.bfloat16): 2**bits, jnp.dtype(jnp.int8): 0, jnp.dtype(jnp.int4): -8}[dtype]
    lows = tuple(sum(widths[:i]) for i in range(len(widths)))
    if block_rows(k) == BLOCK:
        return (Fields(tuple(range(len(widths))), widths, lows, bits, 1, dtype, bias(bits)),)
    return tuple(
        Fields((i,), (width,), (0,), width, 2**low, dtype, bias(width))
        for i, (width, low) in enumerate(zip(widths, lows, strict=True))
    )


def order(fields: Fields, k: int) -> np.ndarray:
    """(256,): which row of a chunk each row of the operand is that `unpack` makes."""
    rows, width, side = np.arange(CHUNK), fields.widths[0], _side(fields)
    if width == 8:
        return rows
    block = block_rows(k)
    split = (CHUNK // block, side, WORD // side // width, block * width // WORD)
    return rows.reshape(split).transpose(2, 0, 3, 1).reshape(-1)


def words(width: int) -> int:
    """Rows of a plane in a chunk."""
    return CHUNK if width == 8 else CHUNK * width // WORD


def unpack(planes: list[jax.Array], fields: Fields) -> jax.Array:
    """A chunk's words (words(width), n) of each plane -> operand (256, n): codes plus `fields.bias`."""
    if fields.widths == (8,):
        return planes[0].astype(fields.dtype)
    side, codes = _side(fields), None
    if fields.dtype == jnp.int4:
        return pltpu.bitcast(planes[0] ^ _repeated(8, side), jnp.int4)
    top = FRACTION - fields.bits if fields.dtype == jnp.bfloat16 else 0
    for plane, width, low in zip(planes, fields.widths, fields.lows, strict=True):
        low += top
        mask = _repeated((2**width - 1) << low, side)
        shifts = [width * i - low for i in range(WORD // side // width)]
        part = jnp.concatenate([_shifted(plane, by) & mask for by in shifts])
        codes = part if codes is None else codes | part
    if fields.dtype == jnp.bfloat16:
        codes = codes | _repeated((EXPONENT + fields.bits) << FRACTION, side)
    return pltpu.bitcast(codes, fields.dtype)


def _side(fields: Fields) -> int:
    """Fields of a word."""
    return {jnp.dtype(jnp.bfloat16): 2, jnp.dtype(jnp.int8): 4, jnp.dtype(jnp.int4): 8}[fields.dtype]


def _repeated(value: int, side: int) -> jax.Array:
    """A word of `side` equal fields."""
    word = sum(value << (WORD // side * i) for i in range(side))
    return jnp.int32(word - 2**WORD if word >= 2 ** (WORD - 1) else word)


def _shifted(words: jax.Array, by: int) -> jax.Array:
    return words if by == 0 else words >> by if by > 0 else words << -by
