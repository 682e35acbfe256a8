"""How fast products with weights of few bits are: `python -m launch.bench matmul`.

Times `lowbit_matmul` at the shapes of LLaMA-7B's layers against XLA's products in bfloat16 and float32 and, where they
are installed, against qwix (`dot_general` of its QArrays) and tokamax (`ragged_dot` of one group). W4A16 has 4 bits for
weights and real activations, W4A8 quantises these to 8 bits, token by token. Weights of up to 4 bits have a scale for
each `--group` inputs, those of 8 bits one for each output; those of W?A16 have zero points in our form, which qwix has
not.

A call runs `--layers` products with weights of their own one after the other, as a network does, so that caches do not
hold what a network would read from memory. All are timed in the same run, in turns, and compared round by round. GB/s
are those of the weights' bytes as they are stored, scales and zero points included; TOP/s count two a multiply-add. The
peaks are those of `research.core.peaks`: of int8 products for quantised activations, else of bfloat16, and measured in
float32 on CPUs, where all products are taken in it.

`--aot v5e:2x2` times nothing: it prints what TPU compilers expect, see `launch.bench_matmul_aot`.
"""

import argparse
import functools
import importlib
import json
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from rich.console import Console
from rich.table import Table

from launch.bench_backbones import in_turns, spread
from research.core import errors, peaks
from research.kernels.lowbit_matmul import lowbit_matmul
from research.pods import chips
from research.quantize.grids import Form
from research.quantize.quantized import pack, quantize

BF16, F32 = "bfloat16 XLA", "float32 XLA"
PEERS = ("qwix", "tokamax")
SHAPES = "4096x4096,4096x11008,11008x4096"
FORMATS = "W4A16,W3A16,W2A16,W8A8,W4A8,W4A4"
_FORMAT = re.compile(r"W([1-8])A([2-8]|16)")
CONTRACTION = (((1,), (0,)), ((), ()))


class Product(NamedTuple):
    """A way to multiply.

    Fields:
      call: (x, weight) -> y.
      weight: a pytree.
    """

    call: Callable
    weight: object


class Case(NamedTuple):
    """What was measured of one shape and batch size.

    Fields:
      shape: (K, N) of the weight.
      batch: rows of the activations.
      nbytes: {name: bytes of a weight as it is stored}.
      seconds: {name: seconds a product in each round}.
      peaks: {name: (bytes/s, OP/s) of the device at most}.
      notes: what could not be timed, and why.
    """

    shape: tuple[int, int]
    batch: int
    nbytes: dict[str, int]
    seconds: dict[str, list[float]]
    peaks: dict[str, tuple[float, float]]
    notes: list[str]

    def bandwidth(self, name: str) -> float:
        """Bytes of weights a second."""
        return self.nbytes[name] / statistics.median(self.seconds[name])

    def rate(self, name: str) -> float:
        """Operations a second, two a multiply-add."""
        return 2 * self.batch * self.shape[0] * self.shape[1] / statistics.median(self.seconds[name])

    def ratios(self, name: str, other: str) -> list[float]:
        """Speed of one over that of another in each round."""
        return [b / a for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]


def bits_of(name: str, option: str = "--formats") -> tuple[int, int | None]:
    """(bits of weights, bits of activations or None) of "W4A16".

    Args:
      option: of the command line, for the message.
    Raises:
      UserError: another form.
    """
    found = _FORMAT.fullmatch(name)
    if not found:
        raise errors.UserError(f"{option}: {name!r} is not of the form W4A16 or W4A8")
    return int(found[1]), None if found[2] == "16" else int(found[2])


def ours(kernel: jax.Array, name: str, group: int, form: str) -> Product:
    """`lowbit_matmul` by a kernel (K, N) in a format."""
    bits, activations = bits_of(name)
    rule = "gptq" if activations is None and bits < 8 else ("sign" if bits == 1 else "absmax")
    few = Form(bits, group=group if group and bits < 8 else None, rule=rule, pad=True)
    weight = jax.jit(lambda kernel: pack(quantize(kernel, few)))(kernel)
    return Product(functools.partial(_lowbit, bits=activations, form=form), weight)


def _lowbit(x, weight, bits, form):
    return lowbit_matmul(x, weight, activation_bits=bits, form=form)


def qwix(kernel: jax.Array, name: str, group: int) -> Product:
    """The same by qwix; raises what it raises."""
    library = importlib.import_module("qwix")
    bits, activations = bits_of(name)
    tiles = {0: group} if group and bits < 8 else None
    weight = library.quantize(kernel, f"int{bits}", channelwise_axes=(1,), tiled_axes=tiles)

    def call(x, weight):
        x = library.quantize(x, f"int{activations}", channelwise_axes=(0,)) if activations else x
        return library.dot_general(x, weight, CONTRACTION)

    return Product(call, weight)


def tokamax(kernel: jax.Array, name: str, group: int) -> Product:
    """The same by tokamax's `ragged_dot`, of qwix's QArrays; raises what it raises."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])  # tokamax would parse our options
    library, arrays = (importlib.import_module(module) for module in ("tokamax", "qwix"))
    bits, activations = bits_of(name)
    tiles = {1: group} if group and bits < 8 else None
    weight = arrays.quantize(kernel[None], f"int{bits}", channelwise_axes=(0, 2), tiled_axes=tiles)

    def call(x, weight):
        sizes = jnp.asarray([len(x)], jnp.int32)
        x = arrays.quantize(x, f"int{activations}", channelwise_axes=(0,)) if activations else x
        return library.ragged_dot(x, weight, sizes)

    return Product(call, weight)


def products(kernel: jax.Array, options: argparse.Namespace, notes: list[str]) -> dict[str, Product]:
    """All ways to multiply by a kernel (K, N); what does not exist here is noted."""
    found = {dtype: Product(jnp.matmul, kernel.astype(dtype.split()[0])) for dtype in (BF16, F32)}
    for name in options.formats:
        found[name] = ours(kernel, name, options.group, options.form)
    makers = {"qwix": qwix, "tokamax": tokamax}
    for peer in options.peers:
        for name in options.formats:
            try:
                found[f"{name} {peer}"] = makers[peer](kernel, name, options.group)
            except ModuleNotFoundError as error:
                notes.append(f"{peer}: not installed (no module {error.name})")
                break
            except Exception as error:  # whatever another library thinks of these operands
                notes.append(_refused(f"{name} {peer}", error))
    return found


def _refused(name: str, error: Exception) -> str:
    return f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def chained(call: Callable) -> Callable:
    """(x, weights) -> a number, by one product after the other: each has to wait for the one before."""

    def run(x, weights):
        for weight in weights:
            y = call(x, weight)
            x = x + 0 * y[:, :1].astype(x.dtype)
        return jnp.sum(x)

    return jax.jit(run)


def measure(options: argparse.Namespace) -> Iterator[Case]:
    """Every shape and batch size."""
    for k, n in options.shapes:
        kernel = jax.random.normal(jax.random.key(0), (k, n)) / k**0.5
        notes: list[str] = []
        made = products(kernel, options, notes)
        copies = lambda weight: [weight, *(jax.tree.map(jnp.copy, weight) for _ in range(options.layers - 1))]
        weights = {name: copies(product.weight) for name, product in made.items()}
        for batch in options.batch:
            yield _case((k, n), batch, made, weights, options, list(notes))


def _case(shape, batch, made, weights, options, notes) -> Case:
    x, windows = jax.random.normal(jax.random.key(batch), (batch, shape[0])), {}
    for name, product in made.items():
        dtype = {F32: jnp.float32, BF16: jnp.bfloat16}.get(name, options.dtype)
        window = functools.partial(_window, chained(product.call), x.astype(dtype), weights[name])
        try:
            window(1)
        except Exception as error:  # as above; ours must not fail
            if name.split()[-1] not in options.peers:
                raise
            notes.append(_refused(name, error))
        else:
            windows[name] = window
    seconds = in_turns(windows, options.passes, options.rounds)
    seconds = {name: [second / options.layers for second in taken] for name, taken in seconds.items()}
    sizes = {name: stored(made[name].weight) for name in seconds}
    return Case(shape, batch, sizes, seconds, {name: _peaks(name, options) for name in seconds}, notes)


def _window(run: Callable, x: jax.Array, weights: list, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        found = run(x, weights)
    jax.block_until_ready(found)
    return time.perf_counter() - begin


def stored(weight) -> int:
    """Bytes of a pytree on a device, where int4 takes half of one."""
    width = lambda dtype: jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize
    return sum(leaf.size * width(leaf.dtype) // 8 for leaf in jax.tree.leaves(weight))


def _peaks(name: str, options: argparse.Namespace) -> tuple[float, float]:
    if jax.devices()[0].platform == "cpu":
        dtype = jnp.float32
    else:
        few = name not in (BF16, F32) and bits_of(name.split()[0])[1] is not None
        dtype = jnp.int8 if few else (jnp.float32 if name == F32 else jnp.bfloat16)
    return peaks.peak_bandwidth(), peaks.peak_flops(dtype=dtype)


def report(case: Case, console: Console) -> None:
    """Prints a row for each way to multiply."""
    (k, n), of_peak = case.shape, lambda figure, peak: f"{100 * figure / peak:.0f} %"
    columns = ("", "MiB", "ms", f"speed over {BF16}", f"over {F32}", "GB/s", "of peak", "TOP/s", "of peak")
    table = Table(*columns, title=f"{k} x {n}, batch {case.batch}", title_justify="left")
    for name, seconds in case.seconds.items():
        figures = case.bandwidth(name), case.rate(name)
        cells = [f"{case.nbytes[name] / 2**20:.4g}", f"{1e3 * statistics.median(seconds):.4g}"]
        cells += ["" if name == other else spread(case.ratios(name, other)) for other in (BF16, F32)]
        for figure, unit, peak in zip(figures, (1e9, 1e12), case.peaks[name], strict=True):
            cells += [f"{figure / unit:.4g}", of_peak(figure, peak)]
        table.add_row(name, *cells)
    console.print(table)
    for note in case.notes:
        console.print(note, markup=False)


def parser() -> argparse.ArgumentParser:
    """The options of `bench matmul`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench matmul", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    listed = lambda text: tuple(filter(None, text.split(",")))
    found.add_argument("--shapes", type=listed, default=SHAPES, help=f"KxN of weights, commas between ({SHAPES})")
    found.add_argument("--batch", type=listed, default="1,4,16,64,512", help="rows, commas between (1,4,16,64,512)")
    found.add_argument("--formats", type=listed, default=FORMATS, help=f"commas between ({FORMATS})")
    found.add_argument("--group", type=int, default=128, help="inputs to a scale below 8 bits; 0 for all (128)")
    found.add_argument("--form", choices=("kernel", "xla", "mosaic_gpu"), default="kernel", help="of ours (kernel)")
    found.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of activations (float32 on CPU, else bfloat16)"
    )
    found.add_argument("--peers", type=listed, default="qwix,tokamax", help="'' for none (qwix,tokamax)")
    found.add_argument("--layers", type=int, help="products a call, each with its own weights (2 on CPU, else 8)")
    found.add_argument("--passes", type=int, default=4, help="calls a round (4)")
    found.add_argument("--rounds", type=int, default=7, help="rounds, of which the median counts (7)")
    found.add_argument("--aot", type=listed, default="", metavar="TOPOLOGIES", help="e.g. v5e:2x2,v6e:2x2 (none)")
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    return found


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with what depends on the machine filled in; raises UserError for names and numbers that do not do."""
    on_cpu = jax.devices()[0].platform == "cpu"
    options.layers = (2 if on_cpu else 8) if options.layers is None else options.layers
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    for name in ("layers", "passes", "rounds"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    shapes = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) for text in options.shapes]
    if not shapes or not all(shapes):
        raise errors.UserError(f"--shapes {','.join(options.shapes)}: must be such as {SHAPES}")
    options.shapes = tuple((int(shape[1]), int(shape[2])) for shape in shapes)
    options.batch = tuple(int(text) if text.isdecimal() else 0 for text in options.batch)
    if not options.batch or not all(options.batch):
        raise errors.UserError("--batch: must be numbers of 1 or more, commas between")
    if unknown := set(options.peers) - set(PEERS):
        raise errors.UserError(f"--peers: no {', '.join(sorted(unknown))} (there are {', '.join(PEERS)})")
    for name in options.formats:
        bits_of(name)
    for name in options.aot:
        if (platform := chips.parse(name).chip.platform) != "tpu":
            raise errors.UserError(f"--aot {name}: kernels compile ahead of time for TPUs, not for {platform}")
    if options.group < 0:
        raise errors.UserError(f"--group {options.group}: must be 0 or more")
    return options


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options = checked(parser().parse_args(argv))
    console = Console(highlight=False)
    if options.aot:
        from launch import bench_matmul_aot  # what compiles for TPUs, which nothing else here needs

        formats = {name: bits_of(name) for name in options.formats}
        expected = bench_matmul_aot.measure(options.aot, options.shapes, options.batch, formats, options.group)
        bench_matmul_aot.report(list(expected), console)
        return 0
    device = jax.devices()[0]
    console.print(f"{device.device_kind}, activations in {options.dtype}, {options.layers} layers, form {options.form}")
    cases = []
    for case in measure(options):
        report(case, console)
        cases.append(case._asdict())
    if options.json:
        options.json.write_text(json.dumps(cases, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
