"""What token reduction gains on this machine: `python -m launch.bench tokens --model deit_s --batch 1,32`.

Times the forward pass of a dense ViT and of the same with fewer tokens, jitted, in turns, and compares round by round,
so that a busy machine disturbs all alike. Prints images/s, the speed-up over the dense network, the ratio of their
multiply-adds (`research.tokens.budget`), and the speed-up over that ratio, of which 1 would be the best. Weights are
random, which time does not depend on: where PPT decides image by image it computes both policies.

With `--target 120` it looks for the reductions that reach 120 images/s at each batch size, the `r` of PPT and ToMe or
the `keep_rate` of EViT, and prints them as `--reduce` takes them. What the methods say of these is replaced.
"""

import argparse
import dataclasses
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
from research.layers import reduction
from research.tokens import budget

DENSE = "dense"
# Those of the papers for DeiT-S at 224 pixels.
METHODS = ("ppt:r=50,blocks=3+6+9", "tome:r=13", "evit:keep_rate=0.7,blocks=3+6+9")


# What sets how many tokens a method takes away, and what it may be in a network of so many patches.
CHOICES: dict[str, Callable[[int], Sequence[int | float]]] = {
    "r": range,
    "keep_rate": lambda patches: [percent / 100 for percent in range(100, 0, -1)],
}


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
    networks = {DENSE: _network(options, **sizes)}
    networks |= {text: _network(options, reduce=tokens.parse(text), **sizes) for text in options.reduce}
    macs = {name: budget.macs(network.module).total for name, network in networks.items()}
    variables = jax.jit(networks[DENSE].init)(jax.random.PRNGKey(0))
    passes = {name: jax.jit(lambda *a, n=network: n.apply(*a)[0]) for name, network in networks.items()}
    found = []
    for batch in options.batch:
        inputs = (*variables, _images(options, batch))
        timed = {name: functools.partial(window, call=call, inputs=inputs) for name, call in passes.items()}
        seconds = in_turns(timed, max(1, options.passes // batch), options.rounds)
        found.append(Gain(options.model, batch, macs, seconds))
    return found


class Solved(NamedTuple):
    """The reduction of one method that reaches a target at one batch size.

    Fields:
      reduce: as `--reduce` takes it.
      macs: multiply-adds of an image.
      rate: images/s.
      timed: how many networks were compiled and timed for it.
    """

    batch: int
    reduce: str
    macs: int
    rate: float
    timed: int


def solve(options: argparse.Namespace, **sizes) -> list[Solved]:
    """One Solved for each batch size and method, by `budget.solve_throughput`; `sizes` replace the model's own.

    Raises:
      UserError: a method that has neither `r` nor `keep_rate`.
      ValueError: no plain ViT, or a target that a method does not reach.
    """
    dense, found = _network(options, **sizes), []
    starts = {text: reduction.build(tokens.parse(text)) for text in options.reduce}
    knobs = {text: _knob(text, start) for text, start in starts.items()}
    variables = jax.jit(dense.init)(jax.random.PRNGKey(0))
    for batch in options.batch:
        speed = functools.partial(_rate, options, (*variables, _images(options, batch)), batch, dense)
        for text, start in starts.items():
            make = functools.partial(_changed, start, knobs[text])
            values = CHOICES[knobs[text]](budget.tokens(dense.module)[0][0])
            value, macs, rates = budget.solve_throughput(dense.module, options.target, make, values, speed)
            found.append(Solved(batch, _written(text, knobs[text], value), macs.total, rates[value], len(rates)))
    return found


def _network(options: argparse.Namespace, **fields) -> classify.Network:
    return classify.network(
        options.model, options.classes, options.size, dtype=options.dtype, img_size=options.size, **fields
    )


def _images(options: argparse.Namespace, batch: int) -> jax.Array:
    images = bench_train.synthetic(batch, options.size, options.classes)["image"]
    return jax.device_put(images.astype(np.float32) / 255)


def _knob(text: str, start: reduction.Reduction) -> str:
    """The name of what sets how many tokens a method takes away."""
    for name in CHOICES:
        if hasattr(start, name):
            return name
    raise errors.UserError(f"--reduce {text}: --target solves for {' or '.join(CHOICES)}, of which it has none")


def _changed(start: reduction.Reduction, knob: str, value: int | float) -> reduction.Reduction:
    return dataclasses.replace(start, **{knob: value})


def _written(text: str, knob: str, value: int | float) -> str:
    """A method's text with `knob` at another value."""
    method, _, rest = text.partition(":")
    others = [item for item in rest.split(",") if item and item.partition("=")[0] != knob]
    return f"{method}:{','.join([f'{knob}={value:g}', *others])}"


def _rate(options: argparse.Namespace, inputs: tuple, batch: int, dense: classify.Network, module) -> float:
    """Images a second of the network with another module, the median of the rounds."""
    call = jax.jit(lambda *a: dense._replace(module=module).apply(*a)[0])
    timed = {"": functools.partial(window, call=call, inputs=inputs)}
    return batch / statistics.median(in_turns(timed, max(1, options.passes // batch), options.rounds)[""])


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


def report_solved(found: Sequence[Solved], target: float, console: Console) -> None:
    """Prints a row for every method and batch size."""
    columns = ("--reduce", "batch", "images/s", "G multiply-adds", "networks timed")
    table = Table(*columns, title=f"{target:g} images/s", title_justify="left")
    for one in found:
        table.add_row(one.reduce, str(one.batch), f"{one.rate:.4g}", f"{one.macs / 1e9:.4g}", str(one.timed))
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
    found.add_argument("--target", type=float, metavar="IMAGES/S", help="find the reductions that reach a throughput")
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
    if options.target is not None and not options.target > 0:
        raise errors.UserError(f"--target {options.target:g}: must be above 0")
    if not hasattr(backbones.create(options.model), "reduce"):
        raise errors.UserError(f"--model: {options.model} has no tokens to reduce; vit_* and deit* have")
    return options


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options, console = checked(parser().parse_args(argv)), Console(highlight=False)
    console.print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, {options.dtype}, {options.size} pixels")
    found = measure(options) if options.target is None else solve(options)
    if options.target is None:
        for gain in found:
            report(gain, console)
    else:
        report_solved(found, options.target, console)
    if options.json:
        options.json.write_text(json.dumps([entry._asdict() for entry in found], indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
