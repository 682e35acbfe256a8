"""How weights of 1 to 8 bits lie in memory for `lowbit_matmul`: planes of 32-bit words along the inputs.

A weight (K, N) of b bits becomes one array for each power of two in b (3 bits are a plane of 2 and one of 1), so that
every value is found by one shift and one mask and b bits are really b bits. A plane of p bits holds 32 / p values a
word, (K p / 32, N) int32. Rows come in blocks of R = `block_rows(K)`: word t of a block holds in its bits
[p j, p j + p) the value of row t + j R p / 32 of the block, so that shift j of all words is a run of neighbouring rows
and nothing has to move between lanes. 8 bits need no words: they are int8, row by row.

Codes are stored as unsigned numbers u. With zero points a weight is s (u - z). Without, it is s c with c = u - 2^(b-1),
or c = 2 u - 1 for 1 bit. The int8 of 8 bits are u - 128. Rows are filled up to `padded_rows(K)`, a multiple of 32: a
kernel gives them inputs of 0.
"""

import jax
import jax.numpy as jnp
from flax import struct

WORD = 32
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
BLOCK = 256  # 8 words of 1 bit: a whole tile of a TPU's registers in every plane


@struct.dataclass
class Packed:
    """A weight (K, N) in few bits, a pytree.

    Attributes:
      planes: the arrays of codes, see above; planes[i] has PLANES[bits][i] bits a value.
      scales: (ceil(K / group), N), or (1, 1) for one of all weights; floating.
      zeros: integers of the shape and dtype of `scales`; None where codes are signed.
      order: None, or (K,) int32: row i of the codes belongs to input order[i].
      bits: of a code.
      group: inputs to a scale, 1 <= group <= K.
      length: K.
    """

    planes: tuple[jax.Array, ...]
    scales: jax.Array
    zeros: jax.Array | None
    order: jax.Array | None
    bits: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.planes[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


def padded_rows(k: int) -> int:
    """Rows that K inputs are filled up to."""
    return -(-k // WORD) * WORD


def block_rows(k: int) -> int:
    """Rows of a block: 256, or the largest power of two that divides the filled-up rows."""
    rows = padded_rows(k)
    return min(BLOCK, rows & -rows)


def pack_codes(codes: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """Unsigned codes (K, N) below 2^bits, of any integer dtype -> planes."""
    k, n = codes.shape
    rows, block = padded_rows(k), block_rows(k)
    codes = jnp.pad(codes.astype(jnp.uint32), ((0, rows - k), (0, 0)))
    if bits == 8:
        return ((codes.astype(jnp.int32) - 128).astype(jnp.int8),)
    planes, low = [], 0
    for width in PLANES[bits]:
        values = WORD // width
        part = (codes >> low) & (2**width - 1)
        places = width * jnp.arange(values, dtype=jnp.uint32).reshape(1, values, 1, 1)
        words = jnp.sum(part.reshape(rows // block, values, block // values, n) << places, axis=1, dtype=jnp.uint32)
        planes.append(jax.lax.bitcast_convert_type(words.reshape(rows // values, n), jnp.int32))
        low += width
    return tuple(planes)


def unpack_codes(planes: tuple[jax.Array, ...], bits: int, k: int) -> jax.Array:
    """The inverse: planes -> unsigned codes (K, N), int32."""
    if bits == 8:
        return planes[0][:k].astype(jnp.int32) + 128
    rows, block, low = padded_rows(k), block_rows(k), 0
    codes = jnp.zeros((rows, planes[0].shape[1]), jnp.int32)
    for width, words in zip(PLANES[bits], planes, strict=True):
        values = WORD // width
        places = width * jnp.arange(values, dtype=jnp.int32).reshape(1, values, 1, 1)
        part = (words.reshape(rows // block, 1, block // values, -1) >> places) & (2**width - 1)
        codes = codes | (part.reshape(rows, -1) << low)
        low += width
    return codes[:k]


def codes_of(weight: Packed) -> jax.Array:
    """What the scales multiply, before zero points: (K, N) int32, signed where there are no zero points."""
    codes = unpack_codes(weight.planes, weight.bits, weight.length)
    if weight.zeros is not None:
        return codes
    return 2 * codes - 1 if weight.bits == 1 else codes - 2 ** (weight.bits - 1)
