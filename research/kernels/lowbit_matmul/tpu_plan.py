"""What is known of a product for TPUs before it runs: its sizes, its operands' form, and why there may be none."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from research.kernels.lowbit_matmul import tpu_unpack
from research.kernels.lowbit_matmul.layout import Packed
from research.kernels.lowbit_matmul.tpu_unpack import CHUNK, Fields
from research.kernels.mosaic import LANES, SUBLANES

DTYPES = (jnp.float32, jnp.bfloat16)


class Blocks(NamedTuple):
    """Sizes of a program.

    Fields:
      columns: outputs of a program, a multiple of 128.
      rows: most rows of inputs of a product, repeated ones counted.
      unrolled: chunks of 256 rows of one turn of the loop.
      cores: of a device, which share the outputs.
      integers: whether the matrix units take int8 and int4.
      vmem: bytes of VMEM that a program may take. A core of v5p has 64 MiB, of v5e and v6e 128.
    """

    columns: int = 512
    rows: int = 256
    unrolled: int = 8
    cores: int = 1
    integers: bool = True
    vmem: int = 48 * 2**20


# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {
    "TPU v4": Blocks(cores=2, integers=False),
    "TPU v5": Blocks(cores=2),
    "TPU7x": Blocks(integers=False),
}
# Most rows that groups may add to a product of many tokens: beyond it XLA's product of a dequantised weight, for which
# about 10 bytes a weight move, takes less time than their products on the TPUs there are (240 FLOP a byte and more).
ADDED_ROWS = 1024


class Plan(NamedTuple):
    """What is known of a product before it runs.

    Fields:
      fields: the products of each chunk.
      chunks: of 256 rows.
      groups: in a chunk; 0 where all weights of a column share one scale.
      spans: chunks to a group, 1 or more.
      tokens: of a program: 1, or a multiple of 8.
      unit: rows that the tokens take, repeated for each group.
      pieces: of an input: 3 of float32, 1 otherwise.
      bits: of activations, or None.
      zero: what is taken off codes beside zero points: half of their range, or nothing, and the operand's constant.
      zeros: whether there are zero points.
      factor: of scales.
      length: K.
      columns, cores, unrolled: see `Blocks`.
    """

    fields: tuple[Fields, ...]
    chunks: int
    groups: int
    spans: int
    tokens: int
    unit: int
    pieces: int
    bits: int | None
    zero: float
    zeros: bool
    factor: float
    length: int
    columns: int
    cores: int
    unrolled: int

    @property
    def rows(self) -> int:
        return self.pieces * self.unit


def plan(x: jax.Array, weight: Packed, bits: int | None, blocks: Blocks) -> Plan:
    (m, _), (k, n) = x.shape, weight.shape
    chunks = pl.cdiv(k, CHUNK)
    dtype = jnp.bfloat16
    if bits is not None and blocks.integers:
        dtype = jnp.int4 if weight.bits == 4 and bits <= 4 else jnp.int8
    fields = tpu_unpack.products(weight.bits, k, dtype)
    pieces = 3 if bits is None and x.dtype == jnp.float32 else 1
    groups = 0 if weight.group >= k else max(CHUNK // weight.group, 1)
    most = max(blocks.rows // (max(groups, 1) * pieces) // SUBLANES * SUBLANES, SUBLANES)
    tokens = 1 if m == 1 else min(up(m, SUBLANES), most)
    unit = up(max(groups, 1) * tokens, SUBLANES)
    zero = sum(f.factor * f.bias for f in fields)
    if weight.zeros is None:
        zero += 0.5 if weight.bits == 1 else 2 ** (weight.bits - 1)
    columns = min(blocks.columns, up(n, LANES))
    return Plan(
        fields,
        chunks,
        groups,
        max(weight.group // CHUNK, 1),
        tokens,
        unit,
        pieces,
        bits,
        zero,
        weight.zeros is not None,
        2.0 if weight.bits == 1 and weight.zeros is None else 1.0,
        k,
        columns,
        min(blocks.cores, pl.cdiv(n, columns)),
        blocks.unrolled,
    )


def refusal(x: jax.Array, weight: Packed, bits: int | None, blocks: Blocks) -> str | None:
    """Why the kernel cannot take these operands, or had better not; None where it can."""
    if x.dtype not in DTYPES:
        return f"it takes inputs in float32 or bfloat16, not {x.dtype}"
    group, (k, _) = weight.group, weight.shape
    if group < k and CHUNK % group and group % CHUNK:
        return f"groups of {group} inputs neither divide {CHUNK} nor are multiples of it"
    p = plan(x, weight, bits, blocks)
    if bits is None and (added := len(x) * (p.groups - 1)) > ADDED_ROWS:
        return f"{len(x)} tokens by groups of {group} inputs are {added} rows more than tokens, of {ADDED_ROWS}"
    if (needed := vmem_bytes(p, x, weight)) > blocks.vmem:
        return f"{k} inputs need {needed} bytes of VMEM of {blocks.vmem}"
    return None


def vmem_bytes(p: Plan, x: jax.Array, weight: Packed) -> int:
    """Bytes of VMEM of a program: what is fetched for the next one while it runs twice, and what it keeps."""
    inputs = up(p.tokens, 2 * SUBLANES) * p.chunks * CHUNK
    stored = up(len(weight.scales), 2 * SUBLANES) * p.columns
    words = sum(plane.dtype.itemsize * plane.shape[0] * p.columns for plane in weight.planes)
    moved = inputs * x.dtype.itemsize + words + stored * weight.scales.dtype.itemsize * (1 + p.zeros)
    lhs = len(p.fields) * p.chunks * up(p.rows, 4 * SUBLANES) * CHUNK * p.fields[0].dtype.itemsize
    sums = 4 * up(p.tokens, SUBLANES) * up(max(len(weight.scales), p.chunks * p.groups), LANES)
    unpacked = 2 * p.unrolled * CHUNK * p.columns
    made = 4 * (p.rows * 3 + up(p.tokens, SUBLANES)) * p.columns
    return 2 * (moved + CHUNK * CHUNK * 2) + lhs + sums + 8 * (stored + p.unit * p.columns) + unpacked + made


def up(count: int, multiple: int) -> int:
    """The next multiple."""
    return -(-count // multiple) * multiple
