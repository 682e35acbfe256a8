"""What token reduction gains on this machine: `python -m launch.bench tokens --model deit_s --batch 1,32`.

Times the forward pass of a dense ViT and of the same with fewer tokens, jitted, in turns, and compares round by round,
so that a busy machine disturbs all alike. Prints images/s, the speed-up over the dense network, the ratio of their
multiply-adds (`research.tokens.budget`), and the speed-up over that ratio, of which 1 would be the best. Weights are
random, which time does not depend on: where PPT decides image by image it computes both policies.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from launch import bench_train
from launch.bench_backbones import in_turns, spread
from research import backbones, tokens
from research.backbones import classify
from research.core import errors
from research.tokens import budget

DENSE = "dense"
# Those of the papers for DeiT-S at 224 pixels.
METHODS = ("ppt:r=50,blocks=3+6+9", "tome:r=13", "evit:keep_rate=0.7,blocks=3+6+9")


class Gain(NamedTuple):
    """The times of one batch size: seconds a forward pass in each round, and multiply-adds an image, by method."""

    model: str
    batch: int
    macs: dict[str, int]
    seconds: dict[str, list[float]]

    def speedups(self, name: str) -> list[float]:
        """Speed of `name` over that of the dense network in each round."""
        return [dense / own for dense, own in zip(self.seconds[DENSE], self.seconds[name], strict=True)]

    def ratio(self, name: str) -> float:
        """Multiply-adds of the dense network over those of `name`."""
        return self.macs[DENSE] / self.macs[name]

    def quotient(self, name: str) -> float:
        """The median speed-up over the ratio of multiply-adds."""
        return statistics.median(self.speedups(name)) / self.ratio(name)


def measure(options: argparse.Namespace, **sizes) -> list[Gain]:
    """One Gain for each of the batch sizes; `sizes` replace the model's own.

    Raises:
      ValueError: a model that is no plain ViT, or reductions that do not fit it.
    """
    make = lambda **reduce: classify.network(
        options.model, options.classes, options.size, dtype=options.dtype, img_size=options.size, **sizes, **reduce
    )
    networks = {DENSE: make(), **{text: make(reduce=tokens.parse(text)) for text in options.reduce}}
    macs = {name: budget.macs(network.module).total for name, network in networks.items()}
    variables = jax.jit(networks[DENSE].init)(jax.random.PRNGKey(0))
    passes = {name: jax.jit(lambda *a, n=network: n.apply(*a)[0]) for name, network in networks.items()}
    found = []
    for batch in options.batch:
        images = bench_train.synthetic(batch, options.size, options.classes)["image"]
        images = jax.device_put(images.astype(np.float32) / 255)
        timed = {
            name: functools.partial(window, call=call, inputs=(*variables, images)) for name, call in passes.items()
        }
        seconds = in_turns(timed, max(1, options.passes // batch), options.rounds)
        found.append(Gain(options.model, batch, macs, seconds))
    return found


def window(count: int, call: Callable, inputs: tuple) -> float:
    """Seconds of `count` calls."""
    begin = time.perf_counter()
    for _ in range(count):
        found = call(*inputs)
    jax.block_until_ready(found)
    return time.perf_counter() - begin


def report(gain: Gain, console: Console) -> None:
    """Prints a row for every method."""
    title = f"{gain.model}, batch {gain.batch}"
    columns = ("", "images/s", "ms", "G multiply-adds", "speed-up", "their ratio", "speed-up / ratio")
    table = Table(*columns, title=title, title_justify="left")
    for name, seconds in gain.seconds.items():
        taken = statistics.median(seconds)
        cells = [f"{gain.batch / taken:.4g}", f"{1e3 * taken:.4g}", f"{gain.macs[name] / 1e9:.4g}"]
        if name != DENSE:
            cells += [spread(gain.speedups(name)), f"{gain.ratio(name):.3f}", f"{gain.quotient(name):.2f}"]
        table.add_row(name, *cells)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The options of `bench tokens`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", default="deit_s", help="a plain ViT or DeiT, or short: deit_s, vit_b (deit_s)")
    found.add_argument("--batch", default="1,32", help="batch sizes, commas between (1,32)")
    found.add_argument("--size", type=int, default=0, help="side of the images in pixels (0: the variant's)")
    found.add_argument("--classes", type=int, default=1000)
    found.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype (float32)")
    found.add_argument(
        "--reduce", action="append", metavar="METHOD:KEY=VALUE,…", help=f"may be repeated ({' '.join(METHODS)})"
    )
    found.add_argument("--passes", type=int, default=8, help="images a round at least (8)")
    found.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    return found


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with defaults filled in; raises UserError for names and numbers that do not do."""
    options.model = bench_train.full_name(options.model)
    options.size = options.size or backbones.input_spec(options.model).size
    options.reduce = options.reduce or list(METHODS)
    for name in ("passes", "rounds", "classes", "size"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    options.batch = tuple(int(text) if text.isdecimal() else 0 for text in options.batch.split(","))
    if not all(options.batch):
        raise errors.UserError("--batch: must be numbers of 1 or more, commas between")
    if not hasattr(backbones.create(options.model), "reduce"):
        raise errors.UserError(f"--model: {options.model} has no tokens to reduce; vit_* and deit* have")
    return options


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options, console = checked(parser().parse_args(argv)), Console(highlight=False)
    console.print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {options.dtype}, {options.size} pixels")
    found = measure(options)
    for gain in found:
        report(gain, console)
    if options.json:
        options.json.write_text(json.dumps([gain._asdict() for gain in found], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
