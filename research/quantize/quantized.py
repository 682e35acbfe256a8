"""Arrays of few bits.

    q = quantize(kernel, Form(bits=4, group=128))        # (K, N): codes one a byte, to compute with
    dequantize(q)                                        # (K, N) again
    packed = pack(q)                                     # what `research.kernels.lowbit_matmul` multiplies by

Per output channel: `Form(bits)`; per group: `Form(bits, group=g)`; per tensor: `Form(bits, per_tensor=True)`;
activations per token: `Form(bits, axis=-1, rule="absmax")`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from research.kernels.lowbit_matmul.layout import Packed, codes_of, pack_codes
from research.layers.norm import accumulation_dtype
from research.quantize import grids
from research.quantize.grids import Form, Grid


@struct.dataclass
class Quantized:
    """An array in few bits, a pytree; `dequantize` gives s (q - z), or s q without zero points.

    Attributes:
      codes: q. uint8 from 0 to 2^bits - 1 where there are zero points; else int8 from -(2^(bits-1) - 1), or with a code
        more as checkpoints of other programs have it, to 2^(bits-1) - 1, and -1 or 1 for one bit.
      scales: s, floating, of the rank of `codes`: along `axis` one for each group of codes, along others one or all.
      zeros: z, integers of the shape and dtype of `scales`, or None.
      order: None, or (length,) int32: entry i of the codes along `axis` belongs to entry order[i] of the array. GPTQ
        with act-order makes groups of inputs that are no neighbours.
      bits: of a code, 1 to 8.
      axis: along which codes share scales, from 0.
      group: codes to a scale along `axis`; all of the axis for scales per channel, token or tensor.
      length: entries of the array along `axis`; what codes there are beyond it fill up the last group.

    Invariants (`check`): codes.shape[axis] = groups * group, groups = scales.shape[axis], length in the last group.
    """

    codes: jax.Array
    scales: jax.Array
    zeros: jax.Array | None
    order: jax.Array | None
    bits: int = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)
    group: int = struct.field(pytree_node=False)
    length: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.codes.shape[: self.axis], self.length, *self.codes.shape[self.axis + 1 :])


def check(q: Quantized) -> Quantized:
    """Returns `q` if it keeps what its class promises of shapes and dtypes.

    Raises:
      ValueError: which it does not.
    """
    Form(q.bits, q.axis, group=q.group)
    size, others = q.codes.shape[q.axis], [i for i in range(q.codes.ndim) if i != q.axis]
    promises = {
        "codes are int8, or uint8 with zero points": q.codes.dtype == (jnp.int8 if q.zeros is None else jnp.uint8),
        "scales are floating": jnp.issubdtype(q.scales.dtype, jnp.floating),
        "scales have the rank of the codes": q.scales.ndim == q.codes.ndim,
        "groups fill the axis": q.scales.ndim == q.codes.ndim and q.scales.shape[q.axis] * q.group == size,
        "length lies in the last group": size - q.group < q.length <= size,
        "scales are one or all along other axes": q.scales.ndim == q.codes.ndim
        and all(q.scales.shape[i] in (1, q.codes.shape[i]) for i in others),
        "zeros are like scales": q.zeros is None or (q.zeros.shape, q.zeros.dtype) == (q.scales.shape, q.scales.dtype),
        "order has an entry for each of the array's": q.order is None or q.order.shape == (q.length,),
    }
    broken = [promise for promise, kept in promises.items() if not kept]
    if broken:
        raise ValueError(
            f"no quantised array: it does not hold that {'; '.join(broken)} (codes {q.codes.dtype} {q.codes.shape}, "
            f"scales {q.scales.dtype} {q.scales.shape}, axis {q.axis}, group {q.group}, length {q.length})"
        )
    return q


def quantize(x: jax.Array, form: Form, grid: Grid | None = None) -> Quantized:
    """Rounds an array to the nearest codes of a grid, by default of its own by `grids.fit`.

    Args:
      grid: scales and zero points in the shapes of `grids.fit`; they are kept in their dtype, so that scales which are
        to be stored in 16 bits are rounded before the codes are found.
    Raises:
      ValueError: a group that does not divide the axis.
    """
    grid = grids.fit(x, form) if grid is None else grid
    axis, wide = form.axis % x.ndim, accumulation_dtype(grid.scales)
    parts = grids.blocks(x.astype(wide), form)
    of_groups = jax.tree.map(lambda array: jnp.expand_dims(array.astype(wide), axis + 1), grid)
    codes = grids.nearest(parts, of_groups, form.bits).astype(jnp.int8 if grid.zeros is None else jnp.uint8)
    codes = codes.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return check(Quantized(codes, *grid, None, form.bits, axis, parts.shape[axis + 1], x.shape[axis]))


def dequantize(q: Quantized, dtype=None) -> jax.Array:
    """The array that codes stand for, computed in float32 or better and cast to `dtype`."""
    wide, groups = accumulation_dtype(q.scales), q.scales.shape[q.axis]
    split = lambda a: a.reshape(*a.shape[: q.axis], groups, -1, *a.shape[q.axis + 1 :]).astype(wide)
    grid = Grid(split(q.scales), None if q.zeros is None else split(q.zeros))
    array = grids.values(split(q.codes), grid).reshape(q.codes.shape)
    array = jax.lax.slice_in_dim(array, 0, q.length, axis=q.axis)
    if q.order is not None:
        array = jnp.take(array, jnp.argsort(q.order), axis=q.axis)
    return array if dtype is None else array.astype(dtype)


def pack(q: Quantized) -> Packed:
    """The form of a weight (K, N) that `lowbit_matmul` takes.

    Raises:
      ValueError: `q` is no matrix quantised along its first axis.
    """
    if q.codes.ndim != 2 or q.axis != 0:
        raise ValueError(f"only a matrix (K, N) quantised along axis 0 packs, not {q.shape} along axis {q.axis}")
    codes = q.codes[: q.length].astype(jnp.int32)
    if q.zeros is None:
        codes = (codes + 1) // 2 if q.bits == 1 else codes + 2 ** (q.bits - 1)
    columns = 1 if q.scales.size == 1 else q.codes.shape[1]
    grid = jax.tree.map(lambda a: jnp.broadcast_to(a, (a.shape[0], columns)), Grid(q.scales, q.zeros))
    return Packed(pack_codes(codes, q.bits), *grid, q.order, q.bits, min(q.group, q.length), q.length)


def unpack(packed: Packed) -> Quantized:
    """The inverse of `pack`."""
    codes = codes_of(packed).astype(jnp.int8 if packed.zeros is None else jnp.uint8)
    filled = jnp.pad(codes, ((0, packed.scales.shape[0] * packed.group - packed.length), (0, 0)))
    arrays = filled, packed.scales, packed.zeros, packed.order
    return check(Quantized(*arrays, packed.bits, 0, packed.group, packed.length))
