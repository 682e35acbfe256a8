"""What stored labels save: `python -m launch.bench labels --path cifar10.zip --teacher resnet56 --student resnet8`.

Trains one student from a teacher that runs beside it, and from labels that this teacher has stored, in turns within one
process; prints the time of a step of either round by round, loading of data included, their ratio, and the
multiply-adds of the two networks. The labels, all classes of one view of each example, are made first in a folder for
the occasion. Weights are random: time does not depend on them. Without --path it trains on the embedded digits.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs import common
from launch import labels, train
from research.core import config as configs
from research.core import errors
from research.data.store import Store

ONLINE, STORED = "teacher beside", "stored labels"


class Bench(NamedTuple):
    """What was measured.

    Attributes:
      seconds: {ONLINE, STORED: seconds a step in each round}.
      macs: {"teacher", "student": multiply-adds of one image's forward pass}.
      labelling: seconds that it took to label the data.
    """

    seconds: dict[str, list[float]]
    macs: dict[str, int]
    labelling: float

    def ratios(self) -> list[float]:
        """Time of a step with the teacher over that without, in each round, smallest first."""
        return sorted(a / b for a, b in zip(self.seconds[ONLINE], self.seconds[STORED], strict=True))


def config(options: argparse.Namespace) -> ConfigDict:
    """The training that is measured: CIFAR's augmentation, SGD, temperature 4, no mixing."""
    c = common.base()
    c.experiment = "research.distill.vanilla_kd"
    c.batch_size, c.steps = options.batch, 1 << 20
    c.data.kind, c.data.path = ("zip", options.path) if options.path else ("digits", "")
    c.data.split = options.split
    c.data.workers = options.workers
    c.augment.size = c.eval.size = options.size
    c.augment.crop, c.augment.pad = "pad", 2
    c.optimizer.name, c.optimizer.lr = "nesterov", 0.01
    student = common.student(options.student, label_loss="ce", loss="kd", loss_options=dict(temperature=4.0))
    c.students = common.arms(student=student)
    c.teacher = common.teacher(options.teacher)
    c.teacher.weights = "random"
    return c


class Turn:
    """A training whose steps can be timed in windows."""

    def __init__(self, c: ConfigDict):
        data = train.open_data(c)
        self.config = train.resolve(c, data)
        self.experiment = train.build(self.config, data)
        self._bound = train.bind(self.experiment, self.config)
        self._state = self._bound.init(jax.random.PRNGKey(0))
        self.batches = train.batches(self.config, data)[0](0)

    def window(self, steps: int) -> float:
        """Seconds a step, from asking for the first batch to the end of the last step."""
        begin = time.perf_counter()
        for _ in range(steps):
            self._state, metrics = self._bound.train_step(self._state, self._bound.put(next(self.batches)))
        jax.block_until_ready((self._state, metrics))
        return (time.perf_counter() - begin) / steps


def measure(options: argparse.Namespace, folder: str) -> Bench:
    """Labels the data, then times windows of the two trainings in turns."""
    online = configs.freeze(config(options))
    begin = time.perf_counter()
    words = ["--config", "", "--output", folder, "--shards", "1", "--batch", str(options.batch)]
    job, label = labels.prepare(online, labels.parser().parse_args(words))
    labels.write(job, label, Store(folder), (0, 1))
    labelling = time.perf_counter() - begin
    stored = online.copy_and_resolve_references().unlock()
    stored.teacher.labels = folder
    turns = {ONLINE: Turn(online), STORED: Turn(configs.freeze(stored))}
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for name, window in _rounds(turns, options):
        seconds[name].append(window)
    for turn in turns.values():
        turn.batches.close()
    costs = turns[ONLINE].experiment.costs()
    return Bench(seconds, {name: costs[name]["macs"] for name in ("teacher", "student")}, labelling)


def _rounds(turns: dict[str, Turn], options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    for turn in turns.values():  # compiles
        turn.window(2)
    for _ in range(options.rounds):
        for name, turn in turns.items():
            turn.window(options.unseen)  # uses up what was read ahead during the other's turn
            yield name, turn.window(options.steps)


def report(bench: Bench, options: argparse.Namespace, console: Console) -> None:
    """Prints the figures as a table, the ratio and the costs below it."""
    table = Table("", "ms/step", "by round", "examples/s")
    for name, found in bench.seconds.items():
        middle = statistics.median(found)
        spread = f"{1e3 * min(found):.4g} to {1e3 * max(found):.4g}"
        table.add_row(name, f"{1e3 * middle:.4g}", spread, f"{options.batch / middle:.4g}")
    console.print(table)
    ratios = bench.ratios()
    console.print(f"{statistics.median(ratios):.2f}x faster a step ({ratios[0]:.2f} to {ratios[-1]:.2f} by round)")
    teacher, student = bench.macs["teacher"], bench.macs["student"]
    console.print(
        f"teacher {teacher / 1e6:.4g} M, student {student / 1e6:.4g} M multiply-adds: {teacher / student:.3g}x"
    )
    console.print(f"labelling took {bench.labelling:.3g} s")


def parser() -> argparse.ArgumentParser:
    """The options of `bench labels`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench labels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--path", default="", help="zip of images in class folders (the embedded digits)")
    found.add_argument("--split", default="train", help="the part to train on (train); a small one is labelled sooner")
    found.add_argument("--teacher", default="resnet56", help="variant (resnet56)")
    found.add_argument("--student", default="resnet8", help="variant (resnet8)")
    found.add_argument("--size", type=int, default=16, help="side of the images in pixels (16)")
    found.add_argument("--batch", type=int, default=128, help="examples a step (128)")
    found.add_argument("--workers", type=int, default=0, help="decoding processes (0: threads)")
    found.add_argument("--steps", type=int, default=10, help="steps of a timed window (10)")
    found.add_argument("--unseen", type=int, default=4, help="steps before it that use up what was read ahead (4)")
    found.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    return found


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    for name in ("size", "batch", "steps", "unseen", "rounds"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    console = Console(highlight=False)
    with tempfile.TemporaryDirectory() as folder:
        bench = measure(options, folder)
    report(bench, options, console)
    if options.json:
        options.json.write_text(json.dumps(bench._asdict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
