"""`lowbit_matmul` of real activations for NVIDIA Hopper (sm_90, Mosaic GPU): weights are unpacked in registers.

The product is taken transposed, out^T = W^T x^T: tensor cores (`wgmma`) take their left operand from registers, and
words of a plane that are loaded across its rows lie there as the instruction wants a matrix of outputs by inputs. So a
shift of all words, `layout.py`, is the codes of 32 neighbouring inputs, and nothing has to move. Written into the lower
bits of 128 a code is a bfloat16, exactly, and so is it less its zero point. Sums over a group are multiplied with its
scale in float32: nothing is rounded but what float32 sums round.

A program holds `columns` outputs of `tokens` rows of x, and walks over a share of the inputs; blocks of words ahead are
fetched by TMA meanwhile. Where outputs are too few to fill the device, several programs share the inputs, and XLA adds
what they found. Quantised activations are XLA's.

Not run on hardware.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from research.kernels import dispatch
from research.kernels.lowbit_matmul.layout import PLANES, WORD, Packed, block_rows, padded_rows

SCALES = (jnp.float32, jnp.float16, jnp.bfloat16)
SLICE = 32  # inputs that one shift unpacks: as many words lie side by side
UNIT = 128  # the most inputs whose codes wait in registers for the tensor cores
LEAST = 16  # tokens of a program, of which fewer are filled up
SHARED = 226 * 1024  # bytes of shared memory that a program may take, sm_90, less some for barriers
HIGH = 0x4300  # 128 as the bits of a bfloat16; its lower 7 bits are those that count ones


class Blocks(NamedTuple):
    """Sizes of a program.

    Fields:
      columns: outputs; a multiple of 64.
      tokens: most rows of x; a multiple of 16, at most 256.
      stages: blocks of inputs in shared memory at a time.
      programs: inputs are shared out until there are about as many programs; two for each processor of an H200.
    """

    columns: int = 64
    tokens: int = 64
    stages: int = 4
    programs: int = 264


# By `device_kind`, see `dispatch.sizes`; none has been tuned on hardware.
BLOCKS: dict[str, Blocks] = {}


class Plan(NamedTuple):
    """How programs walk over a weight.

    Fields:
      bits: of a code.
      group: inputs to a scale; 0 where there is one for all.
      rows: inputs of a block, one step of a program.
      unit: inputs of a block that are summed before they are scaled.
      steps: blocks of all inputs.
      splits: programs that share them.
      stages: blocks in shared memory at a time.
    """

    bits: int
    group: int
    rows: int
    unit: int
    steps: int
    splits: int
    stages: int

    def height(self, width: int) -> int:
        """Rows that a block takes of the plane of so many bits."""
        return self.rows if width == 8 else self.rows * width // WORD


def refusal(x: jax.Array, weight: Packed, blocks: Blocks | None = None) -> str | None:
    """Why the kernel cannot take x (M, K) and a weight (K, N); None where it can."""
    blocks = blocks or dispatch.sizes(BLOCKS, Blocks())
    if x.dtype != jnp.bfloat16 or weight.scales.dtype not in SCALES:
        return f"it takes bfloat16 and scales of 32 or 16 bits, not {x.dtype} and {weight.scales.dtype}"
    if not x.size or not weight.shape[1]:
        return "there is nothing to multiply"
    if blocks.columns % 64 or blocks.tokens % LEAST or blocks.tokens > 256 or min(blocks) < 1:
        return f"{blocks}: it takes columns by 64, tokens by 16 up to 256, a stage and a program or more"
    if _plan(x, weight, blocks).unit % SLICE:
        return f"it takes groups of a multiple of {SLICE} inputs, not {weight.group}"
    if (needed := shared_bytes(x, weight, blocks)) > SHARED:
        return f"{blocks} need {needed} bytes of shared memory of {SHARED}"
    return None


def shared_bytes(x: jax.Array, weight: Packed, blocks: Blocks) -> int:
    """Bytes of shared memory of one program, but for barriers."""
    plan, tokens = _plan(x, weight, blocks), _tokens(x, blocks)
    words = sum(plan.rows if width == 8 else 4 * SLICE for width in PLANES[plan.bits])
    scales = plan.rows // plan.unit * weight.scales.dtype.itemsize * (1 if weight.zeros is None else 2)
    return plan.stages * (blocks.columns * (words + scales) + 2 * plan.rows * tokens) + 4 * blocks.columns * tokens


def weight_only(x: jax.Array, weight: Packed, blocks: Blocks | None = None, interpret: Any = None) -> jax.Array:
    """As `reference.weight_only`, of operands without `refusal`: (M, K) by (K, N) -> (M, N) float32.

    The columns of x are in the order of the weight's rows. Where N is no multiple of `blocks.columns`, the program
    copies the weight to fill it up.

    Args:
      interpret: parameters of Mosaic GPU's interpreter, on any platform, slowly, for tests.
    """
    blocks = blocks or dispatch.sizes(BLOCKS, Blocks())
    (count, k), n = x.shape, weight.shape[1]
    plan, tokens = _plan(x, weight, blocks), _tokens(x, blocks)
    height, width = _up(count, tokens), _up(n, blocks.columns)
    turned = jnp.pad(x.T, ((0, padded_rows(k) - k), (0, height - count)))
    filled = lambda array: jnp.pad(array, ((0, 0), (0, width - n)))
    groups = [filled(jnp.broadcast_to(a, (len(a), n))) for a in (weight.scales, weight.zeros) if a is not None]
    sums = plgpu.kernel(
        functools.partial(_kernel, plan=plan, machine=_INTERPRETED if interpret else _HOPPER),
        out_type=jax.ShapeDtypeStruct((plan.splits, width, height), jnp.float32),
        grid=(width // blocks.columns, plan.splits, height // tokens),
        grid_names=("column", "split", "token"),
        scratch_types={"scratch": _scratch(plan, blocks.columns, tokens, [a.dtype for a in groups])},
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret,
        kernel_name="lowbit_matmul",
    )(turned, *groups, *map(filled, weight.planes))
    return jnp.sum(sums, axis=0)[:n, :count].T


def _tokens(x: jax.Array, blocks: Blocks) -> int:
    """Rows of x of one program."""
    return min(blocks.tokens, _up(x.shape[0], LEAST))


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _plan(x: jax.Array, weight: Packed, blocks: Blocks) -> Plan:
    rows, group = block_rows(weight.length), 0 if weight.scales.shape[0] == 1 else weight.group
    steps = padded_rows(weight.length) // rows
    parts = pl.cdiv(x.shape[0], _tokens(x, blocks)) * pl.cdiv(weight.shape[1], blocks.columns)
    splits = min(steps, max(1, blocks.programs // parts))
    stages = min(blocks.stages, -(-steps // splits))
    return Plan(weight.bits, group, rows, math.gcd(group, rows, UNIT), steps, splits, stages)


def _scratch(plan: Plan, columns: int, tokens: int, of_groups: list) -> list:
    """The result, inputs, scales and zero points or not, words of each plane; barriers of stages."""
    units, planes = plan.rows // plan.unit, PLANES[plan.bits]
    staged = lambda shape, dtype, layout=(): plgpu.SMEM((plan.stages, *shape), dtype, transforms=layout)
    width = math.gcd(tokens, SLICE)
    layout = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    words = lambda width: ((plan.rows, columns), jnp.int8) if width == 8 else ((SLICE, columns), jnp.int32)
    copies = 1 + units * len(of_groups) + sum(max(1, SLICE // plan.height(width)) for width in planes)
    return [
        plgpu.SMEM((columns, tokens), jnp.float32),
        staged((plan.rows, tokens), jnp.bfloat16, layout),
        [staged((units, columns), dtype) for dtype in of_groups],
        [staged(*words(width)) for width in planes],
        plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages),
    ]


def _kernel(x, *refs, scratch, plan: Plan, machine: "_Machine"):
    """Inputs x (K, M), scales and zero points or not (G, N), planes -> sums (splits, N, M)."""
    result, inputs, own_groups, own_planes, ready = scratch
    groups, planes, out = refs[: len(own_groups)], refs[len(own_groups) : -1], refs[-1]
    widths = PLANES[plan.bits]
    column, split, token = (lax.axis_index(name) for name in ("column", "split", "token"))
    columns, tokens = result.shape
    across, along = pl.ds(column * columns, columns), pl.ds(token * tokens, tokens)
    start = lambda split: lax.div(split * plan.steps, jnp.int32(plan.splits))
    first, count = start(split), start(split + 1) - start(split)

    def fetch(step, stage):
        copy = lambda source, target: plgpu.copy_gmem_to_smem(source, target, ready.at[stage])
        block = first + step
        copy(x.at[pl.ds(block * plan.rows, plan.rows), along], inputs.at[stage])
        for source, target in zip(groups, own_groups, strict=True):
            for unit in range(target.shape[1]):
                row = lax.div(block * plan.rows + unit * plan.unit, jnp.int32(plan.group)) if plan.group else 0
                copy(source.at[pl.ds(row, 1), across], target.at[stage, pl.ds(unit, 1)])
        for source, target, width in zip(planes, own_planes, widths, strict=True):
            height = plan.height(width)
            for place in range(0, target.shape[1], height):  # fewer than 32 words are there several times
                copy(source.at[pl.ds(block * height, height), across], target.at[stage, pl.ds(place, height)])

    def take(step, total):
        stage = lax.rem(step, jnp.asarray(plan.stages, step.dtype))
        plgpu.barrier_wait(ready.at[stage])
        of_planes = (
            _slices(words.at[stage], width, plan, machine) for words, width in zip(own_planes, widths, strict=True)
        )
        slices = list(zip(*of_planes, strict=True))
        for unit in range(plan.rows // plan.unit):
            row = lambda ref, unit=unit: machine.cast(ref[stage, unit], plgpu.Layout.WGMMA.reduce(1))
            scales, *zeros = (row(ref).astype(jnp.float32) for ref in own_groups)
            above = _above(plan.bits, *zeros)
            own = range(unit * plan.unit // SLICE, (unit + 1) * plan.unit // SLICE)
            codes = [_codes(slices[i], plan.bits, signed=not zeros) - above for i in own]
            product = machine.product(codes, [inputs.at[stage, pl.ds(i * SLICE, SLICE)] for i in own])
            total += product * lax.broadcast_in_dim(scales, product.shape, (0,))
        # The products are done, and nothing reads the stage any more.
        pl.when(step + plan.stages < count)(lambda: fetch(step + plan.stages, stage))
        return total

    for stage in range(plan.stages):
        pl.when(stage < count)(functools.partial(fetch, stage, stage))
    none = machine.cast(jnp.zeros((columns, tokens), jnp.float32), plgpu.Layout.WGMMA)
    result[...] = lax.fori_loop(jnp.int32(0), count, take, none)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[split, across, along])
    plgpu.wait_smem_to_gmem(0)


def _slices(words, width: int, plan: Plan, machine: "_Machine") -> list[jax.Array]:
    """A block of one plane, an array (outputs, 32) for every 32 inputs: codes in the lowest bits, anything above."""
    if width == 8:
        return [machine.turned(words.at[pl.ds(place, SLICE)]) for place in range(0, plan.rows, SLICE)]
    bits, height = machine.turned(words), plan.height(width)
    if height < SLICE:  # of each time that a word is there the next code comes first
        place = machine.cast(lax.broadcasted_iota(jnp.int32, bits.shape, 1), plgpu.Layout.WGMMA)
        bits = bits >> ((place >> (height.bit_length() - 1)) * width)
    return [bits >> first for first in range(0, WORD, width * SLICE // height)]


def _codes(parts: tuple[jax.Array, ...], bits: int, signed: bool) -> jax.Array:
    """Codes of one slice, bfloat16: int8 as it is; fewer bits plus 128, a sign's bit twice, so that 1 is its middle."""
    if bits == 8:
        return parts[0].astype(jnp.bfloat16)
    codes, low = parts[0], PLANES[bits][0]
    for part, width in zip(parts[1:], PLANES[bits][1:], strict=True):
        codes, low = (codes & (2**low - 1)) | (part << low), low + width
    twice = int(signed and bits == 1)
    codes = (codes << twice).astype(jnp.int16) & jnp.int16((2**bits - 1) << twice)
    return lax.bitcast_convert_type(codes | jnp.int16(HIGH), jnp.bfloat16)


def _above(bits: int, zeros: jax.Array | None = None) -> jax.Array:
    """How far `_codes` are above what scales multiply: one number, or (outputs, 32) by zero points (outputs,)."""
    more = -128.0 if bits == 8 else 128.0
    if zeros is None:
        return jnp.bfloat16(2.0 ** (bits - 1) + more)
    return lax.broadcast_in_dim((zeros + more).astype(jnp.bfloat16), (len(zeros), SLICE), (0,))


class _Machine(NamedTuple):
    """What JAX's interpreter cannot do as Hopper does it.

    Fields:
      cast: names the layout of registers.
      turned: reads a matrix of shared memory, transposed.
      product: matrices in registers by matrices in shared memory, added up in float32.
    """

    cast: Callable
    turned: Callable
    product: Callable


# As `Layout.WGMMA`, but every register is read alone: neighbours in it do not lie beside each other in memory.
_SINGLE = plgpu.Layout.TILED(
    plgpu.Tiling(((64, 8), (16, 8), (8, 8), (2,), (1,))), warp_dims=(-8,), lane_dims=(-4, -3), vector_dim=-1
)
# JAX 0.10 asks for an index, which 0.11 warns of.
_INDEX = ((),) if inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty else ()


def _turned(ref) -> jax.Array:
    words = plgpu.load(ref.transpose((1, 0)), *_INDEX, layout=_SINGLE, optimized=False)
    return plgpu.layout_cast(words, plgpu.Layout.WGMMA)


def _product(left: list[jax.Array], right: list) -> jax.Array:
    def multiply(sums):
        for a, b in zip(left, right, strict=True):
            plgpu.wgmma(sums, a, b)
        return sums[...]  # waits for all of them: until then registers of the left operands must stay

    return pl.run_scoped(multiply, plgpu.ACC((left[0].shape[0], right[0].shape[1]), jnp.float32))


def _dots(left: list[jax.Array], right: list) -> jax.Array:
    return sum(jnp.dot(a, b[...], preferred_element_type=jnp.float32) for a, b in zip(left, right, strict=True))


_HOPPER = _Machine(plgpu.layout_cast, _turned, _product)
_INTERPRETED = _Machine(lambda x, layout: x, lambda ref: ref[...].T, _dots)
