"""What TPU compilers expect of products with weights of few bits, without a TPU: `bench matmul --aot v5e:2x2`.

A kernel's figure is the number of instructions of its loops in the compiler's final schedule (libtpu's
`*final_bundles.txt`) times the loops' turns, and the compiler's estimate of what stands around it. It counts neither
waits for memory nor stalls. Memory's figure is the time that its bytes take at the bandwidth of the chip, in cycles:
packed weights, scales, zero points, inputs and results once. Both run at the same time, so the larger one bounds the
product from below. The bound of bfloat16 is the larger one of its bytes and of its products at the chip's peak; the
compiler's own estimate of XLA's product is printed beside it.
"""

import multiprocessing
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from research.core import sharding
from research.core.errors import UserError
from research.kernels.lowbit_matmul import Blocks, lowbit_matmul, tpu
from research.kernels.lowbit_matmul.layout import PLANES, Packed, padded_rows
from research.pods import chips, hlo

# bfloat16 FLOP a cycle of a chip: the compiler's estimates of a product of 4096^3 are 3 to 13 % above these.
FLOPS = {"v4": 2**18, "v5e": 2**17, "v5p": 2**18, "v6e": 2**19}


class Schedule(NamedTuple):
    """Instructions of a kernel's loop over programs, without those of the loops inside, of these, and its turns."""

    own: int
    inside: tuple[int, ...]
    turns: int


class Expected(NamedTuple):
    """What is expected of one product, in cycles of one core.

    Fields:
      name: "W4A16", or "bfloat16" of XLA's product.
      chip, tokens, shape: of the weight (K, N).
      instructions: of the kernel; the compiler's estimate where there is none.
      memory: the time that the bytes take.
      bound: of the product.
    """

    name: str
    chip: str
    tokens: int
    shape: tuple[int, int]
    instructions: float
    memory: float
    bound: float


def packed(k: int, n: int, bits: int, group: int, zeros: bool, place=None) -> Packed:
    """The shapes of a weight whose scales are in bfloat16."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    plane = lambda width: of(jnp.int8, k, n) if width == 8 else of(jnp.int32, padded_rows(k) * width // 32, n)
    grid = of(jnp.bfloat16, -(-k // group), n)
    return Packed(tuple(map(plane, PLANES[bits])), grid, grid if zeros else None, None, bits, group, k)


def measure(
    topologies: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int],
    formats: Mapping[str, tuple[int, int | None]],
    group: int,
) -> Iterator[Expected]:
    """XLA's product in bfloat16, then each format's, for every chip, shape and number of tokens.

    Args:
      formats: {name: (bits of weights, bits of activations or None)}. Weights below 8 bits have a scale for each
        `group` inputs, 0 for all, others one for each output; there are zero points where activations have no bits.
    Raises:
      UserError: a topology of which cycles are not known; a schedule that cannot be read.
    """
    for name in topologies:
        if (kind := chips.parse(name).chip.name) not in FLOPS:
            raise UserError(f"--aot {name}: cycles are known of {', '.join(FLOPS)}, not of {kind}")
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own: libtpu is told to write schedules when it is loaded, and takes long for what is
        # not a kernel then.
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(1, context, initializer=_tell, initargs=(folder,)) as other:
            for chip in topologies:
                for shape in shapes:
                    for tokens in batches:
                        yield _bfloat16(chip, tokens, shape)
                        for name, bits in formats.items():
                            yield other.submit(_few, name, bits, group, chip, tokens, shape, folder).result()


def report(found: Sequence[Expected], console: Console) -> None:
    """Prints a row for every product."""
    columns = ("chip", "K x N", "tokens", "", "instructions", "memory", "bound", "bfloat16's bound over it")
    table = Table(*columns, title="thousands of cycles", title_justify="left")
    for row in found:
        if row.name == "bfloat16":
            dense = row
        figures = [f"{value / 1e3:.1f}" for value in (row.instructions, row.memory, row.bound)]
        place = row.chip, f"{row.shape[0]} x {row.shape[1]}", str(row.tokens), row.name
        table.add_row(*place, *figures, f"{dense.bound / row.bound:.2f}")
    console.print(table)


def rates(chip: str) -> tuple[float, float]:
    """(bytes of memory, bfloat16 FLOP) a cycle of a chip."""
    kind = chips.parse(chip).chip
    return kind.bandwidth * FLOPS[kind.name] / kind.flops, FLOPS[kind.name]


def read(text: str) -> Schedule | None:
    """A schedule of `*final_bundles.txt`; None if it is none of a kernel's. Marks of depth lead its lines."""
    own, inside = 0, []
    for mark, depth in re.findall(r"^ *(?:0x)?[0-9a-f]+ +([A-Z]{2})? *: (>+) ", text, re.MULTILINE):
        if len(depth) == 1:
            own += 1
            continue
        if mark == "LB" and len(depth) == 2:
            inside.append(0)
        inside[-1] += 1
    turns = re.search(r": > \{.*scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test", text)
    return Schedule(own, tuple(inside), int(turns[1]) - 2) if own and turns else None  # two turns fill and empty it


def _tell(folder: str) -> None:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def _place(chip: str) -> tuple[jax.Device, NamedSharding]:
    device = chips.devices(chips.parse(chip))[0]
    return device, NamedSharding(sharding.mesh({"data": 1}, [device]), PartitionSpec())


def _bfloat16(chip: str, tokens: int, shape: tuple[int, int]) -> Expected:
    (k, n), (_, place) = shape, _place(chip)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    text = jax.jit(jnp.matmul).lower(of(tokens, k), of(k, n)).compile().as_text()
    bandwidth, flops = rates(chip)
    memory = 2 * (k * n + tokens * (k + n)) / bandwidth
    return Expected(
        "bfloat16", chip, tokens, shape, hlo.parse(text).cycles, memory, max(memory, 2 * tokens * k * n / flops)
    )


def _few(name, bits, group: int, chip: str, tokens: int, shape: tuple[int, int], folder: str) -> Expected:
    (k, n), (of_weights, of_inputs) = shape, bits
    device, place = _place(chip)
    group = k if of_weights == 8 or group == 0 else group
    weight = packed(k, n, of_weights, group, of_inputs is None, place)
    x = jax.ShapeDtypeStruct((tokens, k), jnp.bfloat16, sharding=place)
    blocks = tpu.BLOCKS.get(device.device_kind, Blocks())
    old = set(pathlib.Path(folder).iterdir())
    call = jax.jit(lambda x, w: lowbit_matmul(x, w, activation_bits=of_inputs, form="kernel", blocks=blocks))
    around = hlo.parse(call.lower(x, weight).compile().as_text()).cycles
    files = [file for file in set(pathlib.Path(folder).iterdir()) - old if "-final_bundles" in file.name]
    schedules = [read(file.read_text()) for file in files if re.search(r"-lowbit_matmul[\w.]*-\d+-final", file.name)]
    plan = tpu.plan(x, weight, of_inputs, blocks)
    loops = (of_inputs is not None) + len(plan.fields) + 1
    if not schedules or schedules[0] is None or len(schedules[0].inside) != loops:
        raise UserError(
            f"libtpu wrote no schedule of {name} at {k}x{n} that can be read: it takes several programs and turns of "
            "their loops, 4096x1024 at least, and the version of the README"
        )
    instructions = around + _instructions(schedules[0], plan)
    memory = (weight.nbytes + 2 * tokens * (k + n)) / rates(chip)[0]
    return Expected(name, chip, tokens, shape, instructions, memory, max(memory, instructions))


def _instructions(schedule: Schedule, plan: tpu.Plan) -> float:
    """Of one core's programs, which are the loop's turns. The last loop inside runs in each; those before it once."""
    *first, last = schedule.inside
    each = schedule.own + last * (plan.chunks // plan.unrolled)
    return schedule.turns * each + sum(first) * plan.chunks
