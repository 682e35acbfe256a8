"""`token_attention` for TPUs: one program for a block of an image's queries, with all heads and all keys in VMEM.

Operands are (B, N, H D): the heads of a token lie beside each other, as the layer before leaves them, and fill the
lanes whatever D is. The scores of one head, (queries, N) in float32, are the largest thing a program holds; nothing of
size N x N leaves it. Keys are never split, so N needs no padding and is bounded by VMEM (`vmem_bytes`).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from research.kernels.token_attention.reference import Parts, bias_refusal

LANES = 128
SUBLANES = 8
DTYPES = (jnp.float32, jnp.bfloat16)


class Blocks(NamedTuple):
    """Sizes of a program.

    Fields:
      queries: most queries of one program; a multiple of 16.
      vmem: bytes of VMEM that it may take. A core of v5p has 64 MiB, of v5e and v6e 128.
    """

    queries: int = 256
    vmem: int = 32 * 2**20


# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {}


def vmem_bytes(shape: tuple[int, ...], dtype, blocks: Blocks) -> int:
    """Bytes of VMEM of one program for queries, keys and values of a shape (B, H, N, D).

    All operands and results twice, as they are fetched for one program while another computes, and the scores of one
    head three times: as scores, exponentials, and exponentials in the dtype of the values.
    """
    _, heads, tokens, dim = shape
    queries = _queries(tokens, blocks)
    size = jnp.dtype(dtype).itemsize
    moved = 2 * (_tile(queries, heads * dim) + _tile(tokens, heads * dim)) * size
    moved += 4 * (_tile(tokens, dim) + _tile(heads, tokens) + 2 * _tile(1, tokens))
    return 2 * moved + 3 * 4 * _tile(queries, tokens)


def refusal(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, blocks: Blocks) -> str | None:
    """Why the kernel cannot take these operands; None where it can."""
    if {q.dtype, k.dtype, v.dtype} - {jnp.dtype(t) for t in DTYPES} or not q.dtype == k.dtype == v.dtype:
        return f"it takes float32 or bfloat16 throughout, not q {q.dtype}, k {k.dtype}, v {v.dtype}"
    if reason := bias_refusal(bias):
        return reason
    if (needed := vmem_bytes(q.shape, q.dtype, blocks)) > blocks.vmem:
        return f"{q.shape[2]} tokens of {q.shape[1]} heads need {needed} bytes of VMEM of {blocks.vmem}"
    return None


def token_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    bias: jax.Array | None,
    row: bool,
    blocks: Blocks,
    interpret: bool = False,
) -> Parts:
    """As `reference.token_attention`, of operands without `refusal`; scores are kept in float32 here.

    Args:
      interpret: on any platform, slowly, for tests.
    """
    batch, heads, tokens, dim = q.shape
    queries = _queries(tokens, blocks)
    joined = [x.swapaxes(1, 2).reshape(batch, tokens, heads * dim) for x in (q, k, v)]
    some = pl.BlockSpec((1, queries, heads * dim), lambda b, i: (b, i, 0))
    whole = lambda rows, columns: pl.BlockSpec((1, rows, columns), lambda b, i: (b, 0, 0))
    operands, in_specs = joined, [some, whole(tokens, heads * dim), whole(tokens, heads * dim)]
    if bias is not None:
        operands = [*joined, jnp.broadcast_to(bias[:, 0].astype(jnp.float32), (batch, 1, tokens))]
        in_specs = [*in_specs, whole(1, tokens)]
    shaped = lambda rows, columns, dtype=jnp.float32: jax.ShapeDtypeStruct((batch, rows, columns), dtype)
    out_shape = [shaped(tokens, heads * dim, v.dtype), shaped(tokens, dim)]
    out_specs = [some, whole(tokens, dim)]
    if row:
        out_shape += [shaped(heads, tokens), shaped(1, tokens)]
        out_specs += [whole(heads, tokens), whole(1, tokens)]
    out, *seen = pl.pallas_call(
        functools.partial(_kernel, heads=heads, biased=bias is not None),
        out_shape=out_shape,
        grid=(batch, pl.cdiv(tokens, queries)),
        in_specs=in_specs,
        out_specs=out_specs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem
        ),
        cost_estimate=_cost(q, row),
        interpret=interpret,
        name="token_attention",
    )(*operands)
    out = out.reshape(batch, tokens, heads, dim).swapaxes(1, 2)
    return Parts(out, seen[0], *((seen[1], seen[2][:, 0]) if row else ()))


def _kernel(q, k, v, *rest, heads: int, biased: bool):
    """A block of queries (1, M, H D) against all keys and values (1, N, H D) of its image."""
    bias, (out, keys, *seen) = (rest[0][0], rest[1:]) if biased else (None, rest)
    dim = q.shape[-1] // heads
    first = pl.program_id(1) == 0
    for head in range(heads):
        lanes = slice(head * dim, (head + 1) * dim)
        # Rows beyond the last query may hold anything: each is alone, and none of them is written.
        scores = _dot(q[0, :, lanes] * dim**-0.5, k[0, :, lanes], 1)
        scores = scores if bias is None else scores + bias
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        out[0, :, lanes] = (_dot(weights.astype(v.dtype), v[0, :, lanes], 0) / total).astype(out.dtype)
        if seen:
            pl.when(first)(functools.partial(_store_row, seen[0], head, weights, total))
    pl.when(first)(functools.partial(_store_means, k, v, keys, *seen[1:], heads=heads))


def _store_row(row, head: int, weights: jax.Array, total: jax.Array):
    row[0, head : head + 1, :] = weights[:1] / total[:1]


def _store_means(k, v, keys, squares=None, *, heads: int):
    """Head-mean keys, and squares of values: by a product with ones, which leaves tokens on the lanes."""
    dim = k.shape[-1] // heads
    keys[0] = sum(k[0, :, h * dim : (h + 1) * dim].astype(jnp.float32) for h in range(heads)) / heads
    if squares is not None:
        values = v[0].astype(jnp.float32)
        ones = jnp.ones((SUBLANES, values.shape[1]), jnp.float32)
        squares[0] = _dot(ones, values * values, 1, jax.lax.Precision.HIGHEST)[:1]


def _dot(a: jax.Array, b: jax.Array, axis: int, precision=None) -> jax.Array:
    """The last axis of a (M, K) by an axis of b, in float32."""
    numbers = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _queries(tokens: int, blocks: Blocks) -> int:
    """Queries of one program: all of them, or as many as the blocks say."""
    return tokens if tokens <= blocks.queries else blocks.queries


def _tile(rows: int, columns: int) -> int:
    """Elements that rows x columns take in VMEM."""
    return -(-rows // SUBLANES) * SUBLANES * -(-columns // LANES) * LANES


def _cost(q: jax.Array, row: bool) -> pl.CostEstimate:
    """What XLA may assume of the kernel, whose inside it does not see."""
    batch, heads, tokens, dim = q.shape
    seen = tokens * dim + (heads + 1) * tokens * row
    return pl.CostEstimate(
        flops=4 * batch * heads * tokens**2 * dim,
        transcendentals=batch * heads * tokens**2,
        bytes_accessed=4 * math.prod(q.shape) * q.dtype.itemsize + 4 * batch * seen,
    )
