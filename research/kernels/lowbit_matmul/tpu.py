"""`lowbit_matmul` for TPUs: a program for a few hundred outputs, with all inputs, whose weights are unpacked in VMEM.

What is multiplied are codes plus a constant, exact in bfloat16, int8 or int4 (see `tpu_unpack.py`), by inputs in
bfloat16 (float32 as three rows of it, whose sum it is) or by codes of inputs. Scales and zero points come after the
product: rows of inputs are repeated for every group of a chunk of 256 rows, with zeros in the place of other groups'
inputs, so that sums of groups stand in rows of their own. A matrix unit takes weights slower than rows: a few more
cost nothing. Zero points and the constant are taken off by sums of the same inputs, in float32.

The first program of each core quantises the inputs, by their largest magnitude over all of K, repeats them and keeps
them in VMEM for the others. Codes of both are multiplied in int8, in int4 where weights have 4 bits and inputs no more,
and where a TPU has no such unit in bfloat16, whose sums over 256 products of codes are exact in float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from research.kernels.lowbit_matmul import tpu_unpack
from research.kernels.lowbit_matmul.layout import Packed
from research.kernels.lowbit_matmul.reference import SMALLEST
from research.kernels.lowbit_matmul.tpu_plan import BLOCKS, DTYPES, Blocks, Plan, plan, refusal, up
from research.kernels.lowbit_matmul.tpu_unpack import CHUNK
from research.kernels.mosaic import LANES, parts

__all__ = ["BLOCKS", "Blocks", "Plan", "plan", "product", "refusal"]


def product(
    x: jax.Array, weight: Packed, bias: jax.Array | None, bits: int | None, blocks: Blocks, interpret: bool = False
) -> jax.Array:
    """(M, K) by a weight (K, N) without `order` -> (M, N) in the dtype of x."""
    (m, k), (_, n) = x.shape, weight.shape
    p = plan(x, weight, bits, blocks)
    orders = [tpu_unpack.order(fields, k) for fields in p.fields]
    lanes = [order[None] // min(weight.group, CHUNK) for order in orders]
    places = [] if weight.bits == 8 else [_places(order) for order in orders]
    row = lambda a: a if a.dtype in DTYPES else a.astype(jnp.float32)
    grid = [row(weight.scales)] + ([row(weight.zeros)] if p.zeros else [])
    biases = [] if bias is None else [row(bias)[None]]
    inner = pl.cdiv(pl.cdiv(n, p.columns), p.cores)
    column = lambda i, c, j: (0, jnp.minimum(c * inner + j, pl.cdiv(n, p.columns) - 1))
    columns = lambda rows: pl.BlockSpec((rows, p.columns), column)
    some = pl.BlockSpec((p.tokens, p.chunks * CHUNK), lambda i, c, j: (i, 0))
    whole = lambda rows, width: pl.BlockSpec((rows, width), lambda i, c, j: (0, 0))
    planes = [plane for fields in p.fields for plane in fields.planes]
    widths = [width for fields in p.fields for width in fields.widths]
    stored = up(max(len(weight.scales), p.chunks * p.groups), p.unit)
    return pl.pallas_call(
        functools.partial(_kernel, p=p, biased=bias is not None, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        grid=(pl.cdiv(m, p.tokens), p.cores, inner),
        in_specs=[
            some,
            *[whole(1, CHUNK)] * len(lanes),
            *[whole(CHUNK, CHUNK)] * len(places),
            *[columns(p.chunks * tpu_unpack.words(width)) for width in widths],
            *[columns(len(a)) if a.shape[1] == n else whole(*a.shape) for a in (*grid, *biases)],
        ],
        out_specs=pl.BlockSpec((p.tokens, p.columns), lambda i, c, j: (i, column(i, c, j)[1])),
        scratch_shapes=[
            pltpu.VMEM((len(p.fields), p.chunks, p.rows, CHUNK), p.fields[0].dtype),
            pltpu.VMEM((p.tokens, stored), jnp.float32),
            pltpu.VMEM((p.tokens, LANES), jnp.float32),
            pltpu.VMEM((stored, p.columns), jnp.float32),
            pltpu.VMEM((stored, p.columns), jnp.float32),
            pltpu.VMEM(_sums(p), _sum_dtype(p)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * n * k, transcendentals=0, bytes_accessed=weight.nbytes + x.nbytes + m * n * x.dtype.itemsize
        ),
        interpret=interpret,
        name="lowbit_matmul",
    )(x, *lanes, *places, *[weight.planes[i] for i in planes], *grid, *biases)


def _places(order: np.ndarray) -> np.ndarray:
    """(256, 256) of 0 and 1, bfloat16: a product with it brings columns into an order."""
    return (np.arange(CHUNK)[:, None] == order[None]).astype(jnp.bfloat16)


def _sums(p: Plan) -> tuple[int, int]:
    """Shape of the running sums: all rows, or those of a token (of a token's groups where there is one token)."""
    return (p.unit if p.groups and p.tokens == 1 else p.tokens if p.groups else p.rows), p.columns


def _sum_dtype(p: Plan):
    return jnp.int32 if p.bits is not None and not p.groups else jnp.float32


def _kernel(*refs, p: Plan, biased: bool, interpret: bool):
    x, *rest = refs
    take = lambda count: [rest.pop(0) for _ in range(count)]
    lanes, places = take(len(p.fields)), take(0 if p.fields[0].widths == (8,) else len(p.fields))
    words = take(sum(len(fields.planes) for fields in p.fields))
    (scales,), zeros, bias = take(1), take(p.zeros), take(biased)
    out, lhs, sums, of_token, scale, zero, total = rest

    @pl.when(pl.program_id(2) == 0)
    def _():
        if p.bits is not None:
            of_token[...] = _token_scales(x, p)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)
        for i in range(len(p.fields)):
            repeat = functools.partial(_repeat, i, x, lanes[i], places, lhs, sums, of_token, p)
            jax.lax.fori_loop(0, p.chunks, repeat, None)

    _keep(scale, scales, p)
    if p.factor != 1:
        scale[...] *= p.factor
    if p.zeros:
        _keep(zero, zeros[0], p)
        zero[...] = (zero[...] + p.zero) * scale[...]
    total[...] = jnp.zeros(total.shape, total.dtype)

    def turn(first, count):
        for c in range(count):
            _chunk(jnp.asarray(first + c, jnp.int32), words, lhs, scale, total, p, interpret)

    turns, left = divmod(p.chunks, p.unrolled)
    jax.lax.fori_loop(0, turns, lambda t, _: turn(t * p.unrolled, p.unrolled), None)
    turn(turns * p.unrolled, left)
    found = total[...].astype(jnp.float32)
    if not p.groups:
        found = sum(found[i * p.unit : i * p.unit + p.tokens] for i in range(p.pieces)) * scale[:1]
    elif p.tokens == 1:
        found = jnp.sum(found, axis=0, keepdims=True)
    if p.zeros or p.zero:
        taken = zero[...] if p.zeros else scale[...] * p.zero
        exact = jax.lax.Precision.HIGHEST
        found = found - jnp.dot(sums[...], taken, precision=exact, preferred_element_type=jnp.float32)
    if p.bits is not None:
        found = found * _wide(of_token[...], p)
    if biased:
        found = found + bias[0][...].astype(jnp.float32)
    out[...] = found.astype(out.dtype)


def _chunk(c, words, lhs, scale, total, p: Plan, interpret: bool):
    """Adds the products of chunk c."""
    words, made = list(words), 0
    for i, fields in enumerate(p.fields):
        mine = [words.pop(0) for _ in fields.planes]
        sizes = [tpu_unpack.words(width) for width in fields.widths]
        chunk = [ref[pl.ds(c * size, size), :] for ref, size in zip(mine, sizes, strict=True)]
        left, right = lhs[i, c], tpu_unpack.unpack(chunk, fields)
        if interpret and fields.dtype == jnp.int4:  # CPUs have no products of it
            left, right = left.astype(jnp.int8), right.astype(jnp.int8)
        dtype = jnp.float32 if fields.dtype == jnp.bfloat16 else jnp.int32
        made += fields.factor * jnp.dot(left, right, preferred_element_type=dtype)
    if not p.groups:
        total[...] += made.astype(total.dtype)
        return
    made = made.astype(jnp.float32)
    made = sum(made[i * p.unit : (i + 1) * p.unit] for i in range(p.pieces))
    first = _first(c, p)
    if p.tokens == 1:
        own = pl.ds(pl.multiple_of(first - jax.lax.rem(first, p.unit), p.unit), p.unit)
        total[...] += made * scale[own, :]
        return
    for g in range(p.groups):
        total[...] += made[g * p.tokens : (g + 1) * p.tokens] * scale[pl.ds(first + g, 1), :]


def _keep(kept, given, p: Plan):
    """Scales or zero points in float32, zero beyond the last."""
    count = len(given)
    kept[:count] = jnp.broadcast_to(given[...].astype(jnp.float32), (count, p.columns))
    if count < len(kept):
        kept[count:] = jnp.zeros((len(kept) - count, p.columns), jnp.float32)


def _first(c, p: Plan):
    """The number of chunk c's first group."""
    return c * p.groups if p.spans == 1 else jax.lax.div(c, p.spans)


def _wide(column: jax.Array, p: Plan) -> jax.Array:
    """(rows, 128) of equal lanes -> (rows, columns)."""
    return jnp.concatenate([column] * (p.columns // LANES), axis=1)


def _token_scales(x, p: Plan) -> jax.Array:
    """(tokens, 128) of equal lanes."""
    largest = lambda c, most: jnp.maximum(most, jnp.abs(_inputs(x, c, p)))
    most = jax.lax.fori_loop(0, p.chunks, largest, jnp.zeros((p.tokens, CHUNK), jnp.float32))
    most = jnp.max(most, axis=1, keepdims=True)
    return jnp.broadcast_to(jnp.maximum(most, SMALLEST) / (2 ** (p.bits - 1) - 1), (p.tokens, LANES))


def _inputs(x, c, p: Plan) -> jax.Array:
    """Those of chunk c (tokens, 256) in float32, zero beyond the last."""
    first = pl.multiple_of(c * CHUNK, CHUNK)
    found = x[:, pl.ds(first, CHUNK)].astype(jnp.float32)
    if p.length % CHUNK == 0:
        return found
    return jnp.where(first + jax.lax.broadcasted_iota(jnp.int32, found.shape, 1) < p.length, found, 0.0)


def _repeat(i: int, x, lanes, places, lhs, sums, of_token, p: Plan, c, carried):
    """Keeps chunk c's inputs in the order of the operand's rows, repeated for each group, and their sums."""
    found = _inputs(x, c, p)
    if p.bits is not None:
        most = 2 ** (p.bits - 1) - 1
        found = jnp.clip(jnp.round(found / of_token[:, :1]), -most, most)
    pieces = parts(found, p.pieces) if p.pieces > 1 else (found.astype(jnp.bfloat16),)
    if places:
        pieces = [jnp.dot(piece, places[i][...], preferred_element_type=jnp.float32) for piece in pieces]
    rows = [_of_groups(piece.astype(jnp.float32), lanes[...], c, p) for piece in pieces]
    if i == 0:
        _add_sums(sums, jnp.sum(sum(rows), axis=1, keepdims=True), c, p)
    found = jnp.concatenate(rows)
    lhs[i, c] = (found if lhs.dtype == jnp.bfloat16 else found.astype(jnp.int32)).astype(lhs.dtype)
    return carried


def _add_sums(sums, rows: jax.Array, c, p: Plan):
    """Adds the sums (unit, 1) of chunk c's rows to those of its groups, (tokens, groups)."""
    first, group = _first(c, p) if p.groups else 0, jax.lax.broadcasted_iota(jnp.int32, (1, sums.shape[1]), 1)
    if p.tokens == 1:
        number = jax.lax.broadcasted_iota(jnp.int32, (p.unit, 1), 0)
        number += first - jax.lax.rem(first, p.unit) if p.groups else 0
        sums[...] += jnp.sum(jnp.where(number == group, rows, 0.0), axis=0, keepdims=True)
        return
    for g in range(max(p.groups, 1)):
        sums[...] += jnp.where(group == first + g, rows[g * p.tokens : (g + 1) * p.tokens], 0.0)


def _of_groups(x: jax.Array, group: jax.Array, c, p: Plan) -> jax.Array:
    """(tokens, 256) -> (unit, 256): for each group the tokens, zero in other groups' columns."""
    if p.tokens == 1:
        # A group's row is that of its scale among as many neighbours as a product has rows.
        own = group + jax.lax.rem(_first(c, p), p.unit) if p.groups else 0
        return jnp.where(jax.lax.broadcasted_iota(jnp.int32, (p.unit, CHUNK), 0) == own, x, 0.0)
    if p.groups <= 1:
        return x
    return jnp.concatenate([jnp.where(group == g, x, 0.0) for g in range(p.groups)])
