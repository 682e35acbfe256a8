"""How fast images are decoded and augmented: `python -m launch.bench data --path FOLDER_OR_ZIP --recipe a2`.

Prints images a second of one core (by CPU time, pinned to it) and of all cores (by the clock), by threads and by worker
processes; where torch and timm are installed, also the ratio to a PyTorch DataLoader with timm's same transforms.
Everything is timed in the same run, in turns, and compared round by round, so that a busy machine disturbs all alike.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.table import Table

from launch import bench_peer
from launch.bench_peer import Peer
from research.core import errors
from research.data import base, pipeline, sources, transforms

RECIPES = {
    "a2": dict(train=True, auto="rand-m7-mstd0.5"),
    "plain": dict(train=True),
    "eval": dict(train=False, crop=0.95),
}
CORE, THREADS, WORKERS = "one core", "threads", "workers"
TORCH_CORE, TORCH_WORKERS = "PyTorch, one core", "PyTorch, workers"
AGAINST = {CORE: TORCH_CORE, THREADS: TORCH_WORKERS, WORKERS: TORCH_WORKERS}


def torch_peer(options: argparse.Namespace) -> Peer:
    """PyTorch's DataLoader with the same transforms."""
    words = [options.path, "--recipe", options.recipe, "--size", options.size, "--batch", options.batch]
    return Peer(options.python, "bench_torch_data.py", words)


def rate(
    source: base.Source, transform, options: argparse.Namespace, clock=time.perf_counter, **parallel: int
) -> float:
    """Images a second of the pipeline, by the given clock, counted once the buffers are drained."""
    with pipeline.train_batches(source, transform, batch_size=options.batch, seed=0, **parallel) as batches:
        for _ in range(2 * parallel.get("workers", 0) + 3):
            next(batches)
        begin = clock()
        for count in itertools.count(1):
            next(batches)
            spent = clock() - begin
            if spent > options.seconds:
                return count * options.batch / spent


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Pins this process, and what it starts, to one core; does nothing where the system cannot."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, everywhere)


def steps(source: base.Source, transform, seconds: float) -> tuple[float, float]:
    """CPU milliseconds an image takes to (decode, decode and transform) in a plain loop."""
    spent = []
    for step in (lambda example, rng: transforms.decode(example["image"]), transform):
        begin = time.process_time()
        for count in itertools.count(1):
            step(source[count % len(source)], np.random.default_rng(count))
            if time.process_time() - begin > seconds:
                break
        spent.append(1e3 * (time.process_time() - begin) / count)
    return spent[0], spent[1]


def measure(source: base.Source, transform, options: argparse.Namespace, peer: Peer | None) -> dict[str, list[float]]:
    """Images a second of every way of loading, in each round."""
    cores = pipeline.cores()

    def alone() -> float:
        with one_core():
            return rate(source, transform, options, clock=time.process_time, threads=1)

    # What is compared stands side by side.
    ways: dict[str, Callable[[], float]] = {
        CORE: alone,
        TORCH_CORE: lambda: peer.ask(0, options.seconds)["rate"],
        THREADS: lambda: rate(source, transform, options, threads=cores),
        TORCH_WORKERS: lambda: peer.ask(cores, options.seconds)["rate"],
        WORKERS: lambda: rate(source, transform, options, workers=cores),
    }
    ways = {name: way for name, way in ways.items() if peer or name not in (TORCH_CORE, TORCH_WORKERS)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


def report(found: dict[str, list[float]], cores: int, console: Console) -> None:
    """Prints the figures as a table and the ratios below it."""
    table = Table("", "cores", "images/s", "images/s a core")
    for name, rates in found.items():
        used = 1 if name in (CORE, TORCH_CORE) else cores
        speed = statistics.median(rates)
        table.add_row(name, str(used), f"{speed:.4g}", f"{speed / used:.4g}")
    console.print(table)
    for name, other in AGAINST.items():
        if other in found:
            ratios = sorted(a / b for a, b in zip(found[name], found[other], strict=True))
            line = (
                f"{name}: {statistics.median(ratios):.2f} times {other} ({ratios[0]:.2f} to {ratios[-1]:.2f} by round)"
            )
            console.print(line)


def parser() -> argparse.ArgumentParser:
    """The options of `bench data`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--path", required=True, help="folder or zip of class folders of JPEG or PNG files")
    found.add_argument("--split", help="the part to read, where it has parts")
    found.add_argument(
        "--recipe", default="a2", choices=RECIPES, help="A2's augmentation, only crop and flip, or eval (a2)"
    )
    found.add_argument("--size", type=int, default=224, help="side of the result in pixels (224)")
    found.add_argument("--batch", type=int, default=32, help="images a batch (32)")
    found.add_argument("--seconds", type=float, default=1.0, help="time of each measurement (1)")
    found.add_argument("--rounds", type=int, default=7, help="rounds, of which the median counts (7)")
    bench_peer.add_options(found)
    return found


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    source = sources.source(path=options.path, split=options.split)
    transform = transforms.build(size=options.size, **RECIPES[options.recipe])
    for name in ("batch", "rounds"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    console = Console(highlight=False)
    decode, whole = steps(source, transform, options.seconds)
    console.print(f"{source.name}: {len(source)} images; recipe {options.recipe} at {options.size} pixels")
    console.print(f"one image, one core: decoding {decode:.2f} ms, with the transform {whole:.2f} ms")
    peer = torch_peer(options) if options.python else None
    if peer and peer.reason:
        console.print(f"PyTorch: not compared ({peer.reason})", markup=False)
    try:
        found = measure(source, transform, options, peer if peer and not peer.reason else None)
    finally:
        if peer:
            peer.close()
    report(found, pipeline.cores(), console)
    if peer and peer.version:
        console.print(peer.version, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
