"""What TPU compilers expect of the kernels of token reduction: `python -m launch.bench token_kernels --aot v5e:2x2`.

Compiles XLA's form and the Pallas form of each op, without a TPU, in the middle of the dense layers that stand around
it in a vision transformer, for one chip. Of both it prints the compiler's estimate in cycles of all fused operations,
which leaves out sorts and kernels; of a kernel the instructions of its loop in the compiler's final schedule times the
loop's turns, which count neither waits for memory nor stalls. Their sum is a bound from below, no measurement.
"""

import argparse
import functools
import multiprocessing
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from research.core import errors, sharding
from research.kernels.ppt_reduce import ppt_reduce
from research.kernels.token_attention import token_attention
from research.kernels.token_matching import token_matching
from research.kernels.token_select import token_select
from research.layers.token_scores import head_mean
from research.pods import chips, hlo


class Expected(NamedTuple):
    """What the compiler expects of one op in one form on one chip.

    Fields:
      op, form: "matching", "pallas".
      chip: name of the topology.
      cycles: the estimate of all operations but sorts and kernels.
      sorts: how many of these there are.
      instructions, turns: of the kernel's loop; 0 without a kernel.
    """

    op: str
    form: str
    chip: str
    cycles: int
    sorts: int
    instructions: int = 0
    turns: int = 0

    @property
    def total(self) -> int:
        """Cycles that are known of."""
        return self.cycles + self.instructions * self.turns


class Block(NamedTuple):
    """Operands of a block: tokens (B, N, C), its attention's result, weights of dense layers, scores, sizes (B, N)."""

    x: jax.Array
    y: jax.Array
    qkv: jax.Array
    proj: jax.Array
    dense: jax.Array
    scores: jax.Array
    size: jax.Array


class Op(NamedTuple):
    """An op in a block.

    Fields:
      before: (block, heads) -> its operands, by what stands before it.
      call: (operands, tokens that go, form) -> its results.
      after: (block, results) -> what stands behind it makes of them.
    """

    before: Callable
    call: Callable
    after: Callable


def _heads(block: Block, heads: int) -> list[jax.Array]:
    batch, count, width = block.x.shape
    split = (block.x @ block.qkv).reshape(batch, count, 3, heads, width // heads)
    return [split[:, :, i].swapaxes(1, 2) for i in range(3)]


def _reducing(block: Block, heads: int) -> tuple:
    """Tokens with attention's result added, scores, sizes, head-mean keys."""
    return block.x + block.y @ block.proj, block.scores, block.size, head_mean(_heads(block, heads)[1])


def _attended(block: Block, seen) -> tuple:
    out = seen.out.swapaxes(1, 2).reshape(block.x.shape)
    return out @ block.proj, seen.keys, seen.weighted


def _reduced(block: Block, done) -> tuple:
    """The normalisation and the dense layer that the tokens meet next."""
    wide = done.x.astype(jnp.float32)
    wide = (wide - jnp.mean(wide, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(wide, -1, keepdims=True) + 1e-6)
    return done.x, wide.astype(done.x.dtype) @ block.dense, done.size


def _attention(operands: tuple, r: int, form: str):
    return token_attention(*operands, form=form)


def _select(operands: tuple, r: int, form: str):
    x, scores, size, _ = operands
    return token_select(x, scores, scores.shape[1] - r, size, form=form)


def _fuse(operands: tuple, r: int, form: str):
    x, scores, _, _ = operands
    return token_select(x, scores[:, 1:], scores.shape[1] - 1 - r, fuse=True, form=form)


def _matching(operands: tuple, r: int, form: str):
    x, _, size, metric = operands
    return token_matching(x, metric, r, size, class_token=True, form=form)


def _ppt(operands: tuple, r: int, form: str):
    x, scores, size, metric = operands
    return ppt_reduce(x, size, scores, metric, r, 7e-5, form=form)


OPS = {
    "token_attention": Op(lambda block, heads: (*_heads(block, heads), block.size), _attention, _attended),
    "token_select": Op(_reducing, _select, _reduced),
    "token_select_fused": Op(_reducing, _fuse, _reduced),
    "token_matching": Op(_reducing, _matching, _reduced),
    "ppt_reduce": Op(_reducing, _ppt, _reduced),
}


def shapes(options: argparse.Namespace, place: NamedSharding | None = None) -> Block:
    """A block of the sizes that were asked for."""
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)
    batch, count, width = options.batch, options.tokens, options.width
    dense = [shaped(options.dtype, width, times * width) for times in (3, 1, 4)]
    rows = [shaped("float32", batch, count)] * 2
    return Block(*[shaped(options.dtype, batch, count, width)] * 2, *dense, *rows)


def measure(options: argparse.Namespace) -> Iterator[tuple[Expected, Expected]]:
    """XLA's form and the Pallas form of every op for every chip.

    Schedules come from a process of their own, as libtpu is told to write them when it is loaded, and then takes very
    long for what is not a kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        dumps = pathlib.Path(folder)
        context = multiprocessing.get_context("spawn")
        with futures.ProcessPoolExecutor(1, context, initializer=_tell, initargs=(folder,)) as other:
            for chip in options.aot:
                for name in options.op:
                    loop = other.submit(scheduled, name, chip, options, dumps)
                    xla = Expected(name, "xla", chip, *_estimated(name, chip, options, "xla"))
                    around = _estimated(name, chip, options, "pallas")
                    yield xla, Expected(name, "pallas", chip, *around, *loop.result())


def _place(chip: str) -> NamedSharding:
    return NamedSharding(sharding.mesh({"data": 1}, chips.devices(chips.parse(chip))[:1]), PartitionSpec())


def _estimated(name: str, chip: str, options: argparse.Namespace, form: str) -> tuple[int, int]:
    """(the compiler's cycles of a block, sorts that it leaves out)."""
    op = OPS[name]

    def run(block):
        return op.after(block, op.call(op.before(block, options.heads), options.remove, form))

    # Layouts of what comes in and goes out are the compiler's choice, as they are inside of a network.
    place = _place(chip)
    free = Format(Layout.AUTO, place)
    compiled = jax.jit(run, in_shardings=free, out_shardings=free).lower(shapes(options)).compile()
    text = compiled.as_text()
    return hlo.parse(text).cycles, len(re.findall(r"= \(?\S.* sort\(", text))


def _tell(folder: str) -> None:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()


def scheduled(name: str, chip: str, options: argparse.Namespace, dumps: pathlib.Path) -> tuple[int, int]:
    """(instructions of the loop, its turns) of an op's kernel, which is compiled alone.

    Raises:
      UserError: libtpu has written no schedule to `dumps`, or not as the one did that this was made for.
    """
    op, place, old = OPS[name], _place(chip), set(dumps.iterdir())
    operands = jax.eval_shape(functools.partial(op.before, heads=options.heads), shapes(options))
    operands = sharding.placed_shapes(operands, jax.tree.map(lambda _: place, operands))
    jax.jit(lambda *operands: op.call(operands, options.remove, "pallas")).lower(*operands).compile()
    for file in set(dumps.iterdir()) - old:
        if re.search(r"-(token|ppt)_\w+(\.\d+)?-\d+-final_bundles", file.name):
            text = file.read_text()
            instructions = len(re.findall(r"^ *(?:0x)?[0-9a-f]+ +(?:[A-Z]{2})? *: >+ ", text, re.MULTILINE))
            turns = re.search(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test", text)
            if instructions and turns:
                return instructions, int(turns[1])
    raise errors.UserError(f"libtpu wrote no schedule of {name} that can be read: try the version of the README")


def report(found: Sequence[tuple[Expected, Expected]], console: Console) -> None:
    """Prints a row for every op and chip."""
    columns = ("", "chip", "XLA", "of it sorts, unpriced", "around the kernel", "kernel", "Pallas, sum", "quotient")
    table = Table(*columns, title="thousands of cycles", title_justify="left")
    for xla, pallas in found:
        kernel = pallas.instructions * pallas.turns
        figures = [f"{value / 1e3:,.1f}" for value in (pallas.cycles, kernel, pallas.total)]
        quotient = f"{pallas.total / xla.total:.2f}"
        table.add_row(xla.op, xla.chip, f"{xla.total / 1e3:,.1f}", str(xla.sorts), *figures, quotient)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The options of `bench token_kernels`; sizes are DeiT-S's."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench token_kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--aot", default="v5e:2x2,v6e:2x2", help="topologies, commas between (v5e:2x2,v6e:2x2)")
    found.add_argument("--op", action="append", choices=list(OPS), help="may be repeated (all)")
    found.add_argument("--batch", type=int, default=64)
    found.add_argument("--tokens", type=int, default=197)
    found.add_argument("--width", type=int, default=384)
    found.add_argument("--heads", type=int, default=6)
    found.add_argument("--remove", type=int, default=50, help="tokens that go (50)")
    found.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of tokens (bfloat16)")
    return found


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with their topologies parsed; raises UserError for those that no TPU has."""
    options.op, options.aot = options.op or list(OPS), tuple(options.aot.split(","))
    for name in options.aot:
        if (platform := chips.parse(name).chip.platform) != "tpu":
            raise errors.UserError(f"--aot {name}: kernels compile ahead of time for TPUs, not for {platform}")
    if options.width % options.heads:
        raise errors.UserError(f"--heads {options.heads}: --width {options.width} does not divide by it")
    if not 1 <= options.remove <= (options.tokens - 1) // 2:
        raise errors.UserError(f"--remove {options.remove}: between 1 and half of the {options.tokens - 1} patches go")
    return options


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options = checked(parser().parse_args(argv))
    found = list(measure(options))
    report(found, Console(highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
