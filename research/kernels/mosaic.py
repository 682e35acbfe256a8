"""What TPU kernels do with the rows of one image: rank them by counting, take and join them by products with 0/1.

There is no sort and no gather by index inside of a kernel. A rank is the number of those that come before, one
comparison of all pairs and a sum; a row is taken by a product with a matrix of zeros and a one. Such products are
exact in float32: `parts` splits a number into three of bfloat16, which a matrix unit multiplies as they are. Positions
and ranks are counted in float32, as sums are, exactly to 2^24.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
SUBLANES = 8
DTYPES = (jnp.float32, jnp.bfloat16)


class Blocks(NamedTuple):
    """Sizes of a program.

    Fields:
      images: most images of one program; it takes as many as divide the batch and fit.
      vmem: bytes of VMEM that it may take. A core of v5p has 64 MiB, of v5e and v6e 128.
    """

    images: int = 4
    vmem: int = 32 * 2**20


class Rows(NamedTuple):
    """A result of every image: (height, width) of a dtype."""

    height: int
    width: int
    dtype: jnp.dtype = jnp.dtype("float32")


def by_image(
    name: str,
    kernel: Callable,
    operands: Sequence[jax.Array],
    results: Sequence[Rows],
    blocks: Blocks,
    interpret: bool,
) -> list[jax.Array]:
    """Results (B, height, width) of a kernel that is given references to those of a few images.

    Operands are (B, height, width) in VMEM or (B,) in SMEM, where a program sees those of the whole batch. Products of
    the tallest result and the tallest operand with the widest operand are what the cost is estimated by.
    """
    batch = operands[0].shape[0]
    matrices = [x.shape[1:] for x in operands if x.ndim == 3]
    moved = sum(tile(*x.shape[1:]) * x.dtype.itemsize for x in operands if x.ndim == 3)
    moved += sum(tile(r.height, r.width) * r.dtype.itemsize for r in results)
    fits = lambda images: not batch % images and vmem_bytes(matrices[0], moved, images) <= blocks.vmem
    images = max(filter(fits, range(1, blocks.images + 1)), default=1)
    block = lambda height, width: pl.BlockSpec((images, height, width), lambda b: (b, 0, 0))
    scalars = pl.BlockSpec(memory_space=pltpu.SMEM)
    accessed = sum(x.nbytes for x in operands) + batch * sum(r.height * r.width * r.dtype.itemsize for r in results)
    flops = 2 * batch * max(r.height for r in results) * max(h for h, _ in matrices) * max(w for _, w in matrices)
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((batch, r.height, r.width), r.dtype) for r in results],
        grid=(batch // images,),
        in_specs=[block(*x.shape[1:]) if x.ndim == 3 else scalars for x in operands],
        out_specs=[block(r.height, r.width) for r in results],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=blocks.vmem),
        cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=accessed),
        interpret=interpret,
        name=name,
    )(*operands)


def vmem_bytes(tokens: tuple[int, int], moved: int, images: int) -> int:
    """Bytes of VMEM of a program of `images` images, whose operands and results take `moved` bytes each.

    Those twice, as they are fetched for one program while another computes, and of one image's tokens (N, C) four
    arrays of all channels and six of all pairs in float32.
    """
    return 2 * images * moved + 4 * (4 * tile(*tokens) + 6 * tile(tokens[0], tokens[0]))


def refusal(x: jax.Array, others: Sequence[jax.Array], blocks: Blocks) -> str | None:
    """Why no kernel takes tokens (B, N, C) with `others` (B, N, ...), numbers that say something of each token."""
    if x.dtype not in DTYPES or any(other.dtype != jnp.float32 for other in others):
        told = ", ".join(str(other.dtype) for other in others)
        return f"it takes tokens in float32 or bfloat16 and the rest in float32, not {x.dtype} and {told}"
    _, count, width = x.shape
    moved = 2 * tile(count, width) * x.dtype.itemsize + 4 * 4 * tile(1, count)
    moved += sum(4 * tile(*((count, other.shape[2]) if other.ndim == 3 else (1, count))) for other in others)
    if (needed := vmem_bytes((count, width), moved, 1)) > blocks.vmem:
        return f"{count} tokens of {width} channels need {needed} bytes of VMEM of {blocks.vmem}"
    return None


def rows(height: int, width: int) -> jax.Array:
    """(height, width): the number of each row."""
    return jax.lax.broadcasted_iota(jnp.int32, (height, width), 0).astype(jnp.float32)


def columns(height: int, width: int) -> jax.Array:
    """(height, width): the number of each column."""
    return jax.lax.broadcasted_iota(jnp.int32, (height, width), 1).astype(jnp.float32)


def standing(row: jax.Array) -> jax.Array:
    """(1, N) -> (N, 1): each number alone in its row of N x N, where sums along the row find it."""
    count = row.shape[1]
    alone = rows(count, count) == columns(count, count)
    return jnp.sum(jnp.where(alone, row, 0.0), axis=1, keepdims=True)


def lying(column: jax.Array) -> jax.Array:
    """(N, 1) -> (1, N)."""
    count = column.shape[0]
    alone = rows(count, count) == columns(count, count)
    return jnp.sum(jnp.where(alone, column, 0.0), axis=0, keepdims=True)


def ranks(scores: jax.Array) -> jax.Array:
    """(1, N) -> (1, N): how many come before, by descending score, equal ones by position, NaN with the lowest."""
    scores = jnp.where(scores == scores, scores, -jnp.inf)
    count, others = scores.shape[1], standing(scores)
    earlier = rows(count, count) < columns(count, count)
    return _total((others > scores) | ((others == scores) & earlier))


def before(marked: jax.Array) -> jax.Array:
    """(1, N) of 0 or 1 -> (1, N): how many marked ones have a lower position."""
    count = marked.shape[1]
    return _total((standing(marked) > 0) & (rows(count, count) < columns(count, count)))


def listed(slots: jax.Array, values: jax.Array, count: int, first: int = 0) -> jax.Array:
    """(1, count): of `values` (N, 1) the one whose slot (N, 1) is `first`, first + 1 ...; 0 where there is none."""
    found = slots == columns(slots.shape[0], count) + first
    return jnp.sum(jnp.where(found, values, 0.0), axis=0, keepdims=True)


def joins(places: jax.Array, count: int) -> jax.Array:
    """Places (1, N) -> (count, N), bfloat16: 1 where a row goes. Places outside of 0 ... count - 1 are none."""
    return jnp.where(places == rows(count, places.shape[1]), 1.0, 0.0).astype(jnp.bfloat16)


def joined(taken: jax.Array, x: jax.Array, pieces: int = 3) -> jax.Array:
    """Matrix of 0 and 1 (M, N) by rows (N, C), in float32: with three pieces exact where a row of it has one 1.

    All of `x` must be finite, also the rows that are not taken.
    """
    product = lambda part: jnp.dot(taken, part, preferred_element_type=jnp.float32)
    return sum(product(part) for part in reversed(parts(x, pieces)))


def parts(x: jax.Array, pieces: int = 3) -> tuple[jax.Array, ...]:
    """Arrays of bfloat16 whose sum is `x`: itself, or of float32 the upper, middle and lower 8 bits of the fraction.

    Fewer pieces round to 8 bits each.
    """
    if x.dtype == jnp.bfloat16:
        return (x,)
    found = []
    for _ in range(pieces - 1):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32)
        upper = jax.lax.bitcast_convert_type(bits & jnp.int32(-(2**16)), jnp.float32)
        found.append(upper.astype(jnp.bfloat16))
        x = x - upper
    return *found, x.astype(jnp.bfloat16)


def merged(x: jax.Array, size: jax.Array, places: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Rows (N, C), sizes and places (1, N) -> means weighted with the sizes (count, C), and sizes (1, count).

    Means are in the dtype of `x`. Of bfloat16 the products with the sizes are kept to 16 bits, which is all of them
    for sizes up to 256.
    """
    wide = x.astype(jnp.float32) * standing(size)
    total = joined(joins(places, count), wide, 2 if x.dtype == jnp.bfloat16 else 3)
    sizes = jnp.sum(jnp.where(places == rows(count, places.shape[1]), size, 0.0), axis=1, keepdims=True)
    return (total / sizes).astype(x.dtype), lying(sizes)


def tile(height: int, width: int) -> int:
    """Elements that height x width take in VMEM."""
    return -(-height // SUBLANES) * SUBLANES * -(-width // LANES) * LANES


def _total(truth: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(truth, 1.0, 0.0), axis=0, keepdims=True)
