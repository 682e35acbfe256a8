"""`lowbit_matmul` on CPUs, in jnp, written so that XLA's compiler for CPUs makes vector code of it.

A few tokens (`FEW`): one fused loop over the words, which is bound by arithmetic, 8 MiB of words instead of 64 MiB of
float32 being read for 4096 x 4096 weights. Of each word and value it takes a mask, a conversion and a multiply-add on
vectors of outputs: a code is masked where it stands in the word, and the power of two that it is too large by goes into
the input, which is exact. Sums over `TERMS` inputs are written out term by term and are the loop's results, for XLA
vectorises neither a reduction over rows nor a loop of a few rows; a product with ones adds them.

More tokens: tiles of at most `TILE` rows and columns, which stay in caches, are dequantised and multiplied one after
the other, so that no more than one is in real numbers. From some 32 tokens on that costs as much as a real product.

Quantised activations are integers in floating numbers. No sum of less than 2^24 / 128 / 127 = 1,032 of their products
is ever rounded; those of `TERMS` inputs or of a tile's rows are fewer. Sums of these are rounded to floating numbers.
"""

import math

import jax
import jax.numpy as jnp

from research.kernels.lowbit_matmul import reference
from research.kernels.lowbit_matmul.layout import PLANES, WORD, Packed, block_rows, padded_rows
from research.layers.norm import accumulation_dtype

FEW = 8  # tokens: a product by tiles costs as much as about 9 fused ones (4096 x 4096, 4 bits, AVX-512)
TERMS = 64  # 32 and 128 take a tenth longer
TILE = 256, 4096  # rows and columns at most, 4 MiB of float32


def refusal(x: jax.Array, weight: Packed, bits: int | None) -> str | None:
    """Why these operands are left to XLA's form, None if they are not."""
    block = block_rows(weight.length)
    if len(weight.scales) > 1 and weight.group % block and block % weight.group:
        return f"groups of {weight.group} inputs and blocks of {block} do not divide one another"
    return None


def product(x: jax.Array, weight: Packed, bias: jax.Array | None, bits: int | None) -> jax.Array:
    """(M, K) by a weight (K, N), whose order the inputs are in, plus (N,) -> (M, N), float32 or better."""
    if bits is None:
        out = _multiply(x.astype(accumulation_dtype(x)), weight, exact=False)
    else:
        tokens = reference.quantize_tokens(x, bits)
        out = tokens.scales * _multiply(tokens.codes.astype(tokens.scales.dtype), weight, exact=True)
    return out if bias is None else out + bias.astype(out.dtype)[None]


def _multiply(x: jax.Array, weight: Packed, exact: bool) -> jax.Array:
    """sum_g s_g (sum_k x_k u_k - z_g sum_k x_k) of the numbers u that planes hold."""
    scales, zeros = _grid(weight, x.dtype)
    rows, groups = padded_rows(weight.length), len(scales)
    if weight.bits == 8:
        weight = weight.replace(planes=(_to_rows(weight.planes[0], rows),))
    # Inputs that fill up are 0, whatever their codes and scales.
    filled = jnp.pad(x, ((0, 0), (0, rows - weight.length)))
    of_rows = scales if groups == 1 else _to_rows(scales, max(groups, rows // weight.group))
    if len(x) <= FEW and _fuses(weight):
        out = _fused(filled, weight, of_rows)
    else:
        out = _tiled(filled, weight, of_rows, exact)
    if zeros is None:
        return out
    sums = reference.group_sums(x, weight) if groups > 1 else jnp.sum(x, axis=1, keepdims=True)
    return out - sums @ (scales * zeros)


def _grid(weight: Packed, dtype) -> tuple[jax.Array, jax.Array | float | None]:
    """Scales and zero points of the numbers that planes hold."""
    scales, bits = weight.scales.astype(dtype), weight.bits
    if weight.zeros is not None:
        return scales, weight.zeros.astype(dtype) - (128 if bits == 8 else 0)
    if bits == 1:
        return 2 * scales, 0.5
    return scales, None if bits == 8 else 2.0 ** (bits - 1)


def _to_rows(array: jax.Array, rows: int) -> jax.Array:
    return jnp.pad(array, ((0, rows - len(array)), (0, 0)))


def _values(width: int) -> int:
    """Of a plane's word: 8 bits are no words."""
    return 1 if width == 8 else WORD // width


def _block(weight: Packed) -> int:
    """Rows of a block of `_fused`, in which groups begin or which begin in groups."""
    if weight.bits != 8:
        return block_rows(weight.length)
    return math.gcd(TERMS, padded_rows(weight.length), weight.group if len(weight.scales) > 1 else TERMS)


def _fuses(weight: Packed) -> bool:
    """Whether all rows that a shift finds in a block have one scale, and a sum has terms enough."""
    block = _block(weight)
    runs = [block // _values(width) for width in PLANES[weight.bits]]
    return block >= WORD // 4 and (len(weight.scales) == 1 or all(weight.group % run == 0 for run in runs))


def _fused(x: jax.Array, weight: Packed, scales: jax.Array) -> jax.Array:
    m, n, block = len(x), weight.shape[1], _block(weight)
    blocks, chunks, single = x.shape[1] // block, max(1, block // TERMS), len(scales) == 1
    groups = 1 if single else max(1, block // weight.group)  # in a block
    sums, low = [jnp.zeros((m, blocks, chunks, n), x.dtype)] * groups, 0
    for width, plane in zip(PLANES[weight.bits], weight.planes, strict=True):
        values = _values(width)
        words = plane.reshape(1, blocks, chunks, -1, n)
        powers = jnp.asarray([2.0 ** (low - (width * j if j + 1 < values else 0)) for j in range(values)], x.dtype)
        inputs = x.reshape(m, blocks, values, chunks, -1, 1) * powers.reshape(1, 1, -1, 1, 1, 1)
        for j in range(values):
            for t in range(words.shape[3]):  # rows are taken first: what is used but once is computed within the loop
                found = _masked(words[:, :, :, t], width, j).astype(x.dtype)
                sums[j * groups // values] += found * inputs[:, :, j, :, t]
        low += width
    if not single:
        of_blocks = scales if groups > 1 else jnp.repeat(scales, weight.group // block, axis=0)[:blocks]
        of_blocks = of_blocks.reshape(1, blocks, 1, groups, n)
        sums = [found * of_blocks[:, :, :, g] for g, found in enumerate(sums)]
    # Not jnp.sum, nor a product of two axes: XLA would fuse either with the loop, and then not vectorise it.
    ones = jnp.ones((m, 1, blocks * chunks), x.dtype)
    out = jnp.einsum("mic,mcn->min", ones, sum(sums[1:], sums[0]).reshape(m, -1, n))[:, 0]
    return out * scales if single else out


def _masked(words: jax.Array, width: int, j: int) -> jax.Array:
    """Values j of words, 2^(width j) too large but for the last, which is shifted for the sign's sake."""
    if width == 8:
        return words
    if j == WORD // width - 1:
        return jax.lax.shift_right_logical(words, jnp.int32(width * j))
    return words & jnp.int32((2**width - 1) << (width * j))


def _tiled(x: jax.Array, weight: Packed, scales: jax.Array, exact: bool) -> jax.Array:
    """Tiles have their scales before they are multiplied, or, for `exact`, their products have."""
    m, n = len(x), weight.shape[1]
    single = len(scales) == 1
    rows = _tile_rows(x.shape[1], weight, single)
    columns = _tile_columns(n)
    groups = 1 if single else max(1, rows // weight.group)  # in a tile

    def of_columns(start):
        def add(i, total):
            tile = _codes(weight, i * rows, rows, start, columns, x.dtype)
            inputs = jax.lax.dynamic_slice_in_dim(x, i * rows, rows, axis=1)
            if single:
                return total + inputs @ tile
            mine = jax.lax.dynamic_slice(scales, (i * rows // weight.group, start), (groups, columns))
            if not exact:
                split = tile.reshape(groups, -1, columns) * mine[:, None]
                return total + inputs @ split.reshape(rows, columns)
            # Not one product with groups as an axis, which XLA computes group by group on one core.
            parts = zip(jnp.split(inputs, groups, axis=1), jnp.split(tile, groups), mine, strict=True)
            return total + sum((part @ codes) * scale[None] for part, codes, scale in parts)

        return jax.lax.fori_loop(0, x.shape[1] // rows, add, jnp.zeros((m, columns), x.dtype))

    out = jax.lax.map(of_columns, columns * jnp.arange(n // columns)).swapaxes(0, 1).reshape(m, n)
    return out * scales if single else out


def _tile_rows(rows: int, weight: Packed, single: bool) -> int:
    """As many as there may be: blocks that divide the rows, and that groups divide or that divide groups."""
    block, group = block_rows(weight.length), rows if single else weight.group
    fit = lambda count: rows % count == 0 and (single or count % group == 0 or group % count == 0)
    return max(count for count in range(block, max(block, TILE[0]) + 1, block) if count == block or fit(count))


def _tile_columns(n: int) -> int:
    """An equal part of the columns of at most `TILE[1]`, or all of them where no small number of parts is equal."""
    least = -(-n // TILE[1])
    return next((n // parts for parts in range(least, 4 * least + 1) if n % parts == 0), n)


def _codes(weight: Packed, row: jax.Array, rows: int, column: jax.Array, columns: int, dtype) -> jax.Array:
    """(rows, columns) of what planes hold."""
    block, low = block_rows(weight.length), 0
    codes = jnp.zeros((rows, columns), dtype)
    for width, plane in zip(PLANES[weight.bits], weight.planes, strict=True):
        values = _values(width)
        words = jax.lax.dynamic_slice(plane, (row // values, column), (rows // values, columns))
        if values > 1:
            places = width * jnp.arange(values, dtype=jnp.int32).reshape(1, -1, 1, 1)
            words = words.reshape(rows // block, 1, block // values, columns) >> places & (2**width - 1)
        codes = codes + words.reshape(rows, columns).astype(dtype) * 2.0**low
        low += width
    return codes
