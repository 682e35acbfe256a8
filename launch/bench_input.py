"""What the real input pipeline costs training: `python -m launch.bench input --model deit_s --batch 8`.

Trains the same model in the engine's loop on one synthetic batch, and on JPEG images read from shards, decoded and
augmented, in turns within one run; prints the ratio of the speeds round by round, how long the loop waited for data,
and how many images a second one core feeds: the limit of the pipeline. Without --path, 500x375 JPEGs are made up and
converted to shards first. On CPU, model and pipeline share the cores, so the pipeline's work is part of the cost.
"""

import argparse
import contextlib
import io
import itertools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from launch import bench_data, bench_train, shards
from research import backbones
from research.core import errors, loop, runner, writers
from research.data import base, convert, pipeline, sources, store, transforms

SYNTHETIC, REAL = "synthetic batch", "input pipeline"
WIDTH, HEIGHT = 500, 375  # the average photograph of ImageNet


class Bench(NamedTuple):
    """What was measured.

    Attributes:
      model, batch: the variant and examples a step.
      seconds: {SYNTHETIC, REAL, AHEAD: seconds a step in each round}.
      waited: {SYNTHETIC, REAL, AHEAD: seconds a step that the loop waited for a batch, in each round}.
      core: images a second of CPU time of one core, decoding and augmenting.
      cores: cores of this machine.
    """

    model: str
    batch: int
    seconds: dict[str, list[float]]
    waited: dict[str, list[float]]
    core: float
    cores: int

    def rate(self, name: str) -> float:
        """Examples/s, the median over the rounds."""
        return self.batch / statistics.median(self.seconds[name])

    def ratios(self, name: str) -> list[float]:
        """Speed over that with synthetic data, in each round, smallest first."""
        return sorted(a / b for a, b in zip(self.seconds[SYNTHETIC], self.seconds[name], strict=True))

    def share(self, name: str) -> float:
        """The part of the time in which the loop waited for data, the median over the rounds."""
        pairs = zip(self.waited[name], self.seconds[name], strict=True)
        return statistics.median(waited / seconds for waited, seconds in pairs)


def photograph(seed: int) -> bytes:
    """A made-up JPEG of the size of an average photograph, about 100 kB: smooth shapes under noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = np.clip(smooth + rng.integers(-48, 49, (HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def made_up(folder: pathlib.Path, count: int) -> str:
    """Shards of `count` made-up photographs of ten classes in a folder, written by the converter."""
    for number in range(count):
        file = folder / "images" / f"class{number % 10}" / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(photograph(number))
    opened = {convert.UNSPLIT: sources.source("folder", str(folder / "images"))}
    shards.run(opened, store.Store(folder / "shards"), 4, convert.Options(), workers=1)
    return str(folder / "shards")


def measure(options: argparse.Namespace, source: base.Source) -> Bench:
    """Times windows of steps on each kind of batches in turns, in one training of the engine's loop."""
    engine = runner.build(bench_train.classification(bench_train.network_of(options)))
    transform = transforms.build(size=options.size, **bench_data.RECIPES[options.recipe])
    seconds: dict[str, list[float]] = {SYNTHETIC: [], REAL: []}
    waited: dict[str, list[float]] = {SYNTHETIC: [], REAL: []}
    # What was read ahead during another kind's turn must be used up before a window is timed.
    buffered = 2 * options.workers + 4 if options.workers else pipeline.cores() + 4
    unseen = -(-buffered // options.steps)

    def window(found: Iterator[dict]) -> Iterator[dict]:
        begin, spent = time.perf_counter(), 0.0
        for _ in range(options.steps):
            asked = time.perf_counter()
            batch = next(found)
            spent += time.perf_counter() - asked
            yield batch
        # Here the loop has taken its steps, fetched their metrics and written them.
        return (time.perf_counter() - begin) / options.steps, spent / options.steps

    def turns(kinds: dict[str, Iterator[dict]], last: dict) -> Iterator[dict]:
        for found in kinds.values():  # compiles and warms up
            yield from window(found)
        for _ in range(options.rounds):
            for name, found in kinds.items():
                for _ in range(unseen if name != SYNTHETIC else 0):
                    yield from window(found)
                time_of_step, wait = yield from window(found)
                seconds[name].append(time_of_step)
                waited[name].append(wait)
        yield last

    def read() -> pipeline.Batches:
        return pipeline.train_batches(
            source, transform, batch_size=options.batch, seed=0, workers=options.workers, threads=options.threads
        )

    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        batch = synthetic(options)
        kinds: dict[str, Iterator[dict]] = {SYNTHETIC: itertools.repeat(batch), REAL: stack.enter_context(read())}
        windows = len(kinds) + options.rounds * (len(kinds) + unseen * (len(kinds) - 1))
        plan = loop.Plan(options.steps * windows + 1, options.batch, log_every=options.steps)
        writer = writers.Writer(folder, steps=plan.steps, batch_size=plan.batch_size, stream=io.StringIO())
        stack.callback(writer.close)
        loop.fit(engine, plan, key=jax.random.PRNGKey(0), train_batches=lambda _: turns(kinds, batch), writer=writer)
    core = 1e3 / bench_data.steps(source, transform, options.seconds)[1]
    return Bench(options.model, options.batch, seconds, waited, core, pipeline.cores())


def synthetic(options: argparse.Namespace) -> dict[str, np.ndarray]:
    """One batch of noise, as the pipeline gives them."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (options.batch, options.size, options.size, 3), dtype=np.uint8),
        "label": rng.integers(0, options.classes, options.batch, dtype=np.int32),
        "mask": np.ones(options.batch, np.float32),
        "index": np.arange(options.batch, dtype=np.int32),
    }


def report(bench: Bench, console: Console) -> None:
    """Prints the figures as a table, the ratios and the pipeline's limit below it."""
    table = Table("", "examples/s", "ms/step", "waiting for data")
    for name in bench.seconds:
        rate = bench.rate(name)
        table.add_row(name, f"{rate:.4g}", f"{1e3 * bench.batch / rate:.4g}", f"{100 * bench.share(name):.1f} %")
    console.print(table)
    ratios = bench.ratios(REAL)
    middle = statistics.median(ratios)
    console.print(f"{REAL}: {middle:.3f} of synthetic ({ratios[0]:.3f} to {ratios[-1]:.3f} by round)")
    limit = bench.core * bench.cores
    console.print(f"one core feeds {bench.core:.4g} images/s; {bench.cores} cores, doing nothing else, {limit:.4g}")
    need = bench.rate(SYNTHETIC) / bench.core
    console.print(f"this model at its synthetic speed needs {need:.2g} cores for its input")
    if jax.default_backend() == "cpu":
        console.print(
            f"sharing {bench.cores} cores with the model, the ratio is at most {1 / (1 + need / bench.cores):.3f}"
        )


def parser() -> argparse.ArgumentParser:
    """The options of `bench input`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench input", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--model", default="deit_s", help="variant, or short: deit_s, r50 (python -m research.backbones)"
    )
    found.add_argument("--batch", type=int, default=8, help="examples a step, over all devices (8)")
    found.add_argument("--size", type=int, default=0, help="side of the images in pixels (0: the variant's)")
    found.add_argument("--classes", type=int, default=1000)
    found.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype (float32)")
    found.add_argument("--recipe", default="a2", choices=bench_data.RECIPES, help="augmentation (a2)")
    found.add_argument("--path", help="shards, folder or zip to read (made up otherwise)")
    found.add_argument("--split", help="the part to read, where it has parts")
    found.add_argument("--images", type=int, default=256, help="photographs to make up (256)")
    found.add_argument("--workers", type=int, default=0, help="decoding processes (0: threads)")
    found.add_argument("--threads", type=int, help="decoding threads (one for each core)")
    found.add_argument("--steps", type=int, default=10, help="steps a window (10)")
    found.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    found.add_argument("--seconds", type=float, default=2.0, help="time to measure one core's decoding (2)")
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    return found


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.model = bench_train.full_name(options.model)
    options.size = options.size or backbones.input_spec(options.model).size
    for name in ("batch", "steps", "rounds", "classes", "size", "images"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        path = options.path or made_up(pathlib.Path(folder), options.images)
        source = sources.source(path=path, split=options.split)
        first = source[0]["image"]
        kind = f"{len(first) / 1e3:.0f} kB files" if isinstance(first, bytes) else "arrays"
        console.print(f"{options.model}, batch {options.batch}; {len(source)} images ({kind}), recipe {options.recipe}")
        bench = measure(options, source)
    report(bench, console)
    if options.json:
        options.json.write_text(json.dumps(bench._asdict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
