"""What each way of distilling adds to a training step: `python -m launch.bench distill --losses kd,dkd --hints rkd`.

Prints the step of the student alone, the teacher's forward pass, and for each loss and hint what it adds: to a whole
step (the difference of two steps in turns, the teacher's outputs given), by itself (value and gradient in the
student's outputs and the adaptors, a program of its own), in memory (arguments and temporaries, as compiled) and in
trained parameters. A loss of logits is far below the noise of a whole step: there the time by itself is the one to
read. Runs on one device, with made-up images; learning rates are 0, so all ways see one network. With --config it
measures the arms of that config, with its teacher and batch.
"""

import argparse
import datetime
import json
import math
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from configs import common
from launch import bench_train, train
from research.backbones import teachers
from research.core import config as configs
from research.core import errors
from research.core.report import measured
from research.distill import losses, step_cost

LOSSES = ("kd", "dkd", "nkd", "lskd", "dist", "multilevel", "ofa")
HINTS = ("fitnet", "review", "rkd", "crd")
FORWARD, WITHOUT, STEP, ALONE = "teacher forward", "step without", "step", "by itself"
SHORTEST = 5e-3  # seconds that a timing lasts at least, for clocks and other processes not to matter


class Arm(NamedTuple):
    """What was measured of one arm; seconds by round.

    Attributes:
      name, kind: of the arm, and its loss and hint in words.
      step, without: seconds of its step, and of that without its losses just before; [] where not asked for.
      alone: seconds of the losses' value and gradient by themselves; [] without losses.
      bytes: memory its step takes over that without; params: trained parameters of its adaptors.
    """

    name: str
    kind: str
    step: list[float]
    without: list[float]
    alone: list[float]
    bytes: int
    params: int

    @property
    def added(self) -> list[float]:
        """Seconds of each round that the losses add to a whole step."""
        return [a - b for a, b in zip(self.step, self.without, strict=True)]


class Bench(NamedTuple):
    """A measurement: where and when, the teacher's seconds by round ([] without one), the arms, what failed and why."""

    device: str
    date: str
    student: str
    teacher: str
    batch: int
    size: int
    forward: list[float]
    arms: list[Arm]
    notes: list[str]

    def of(self, arm: Arm) -> measured.Measured:
        """What a report shows of an arm."""
        forward, step, losses = (statistics.median(x) if x else 0.0 for x in (self.forward, arm.step, arm.alone))
        return measured.Measured(self.device, self.date, step, forward, losses, arm.bytes, arm.params)


def device() -> str:
    """The device in words."""
    found = jax.devices()[0]
    return f"{platform.processor() or platform.machine()} CPU" if found.platform == "cpu" else found.device_kind


def prepared(config: ConfigDict, examples: int = 50_000) -> ConfigDict:
    """The config ready to be measured: classes and examples known, from its data if need be; learning rates 0."""
    if not config.data.num_classes:
        config = train.resolve(config, train.open_data(config))
    config = config.copy_and_resolve_references().unlock()
    config.data.num_examples = config.data.num_examples or examples
    config.steps, config.steps_per_epoch = config.steps or 100, config.steps_per_epoch or 10
    config.optimizer.lr = 0.0
    for student in config.students.values():
        if "lr" in student.optimizer:
            student.optimizer.lr = 0.0
    return config.lock()


def measure(config: ConfigDict, rounds: int, steps: int, whole: bool = True) -> Bench:
    """Times the teacher and the arms of a prepared config in turns. Arms that cannot be built are named in `notes`.

    Args:
      rounds: of which the median counts; one more comes first, to warm up.
      steps: steps a round of every program.
      whole: time whole steps too; otherwise the losses by themselves alone.
    """
    batch, networks = step_cost.batch_of(config), teachers.networks(config)
    timed: dict[tuple[str, str], Callable[[], float]] = {}
    taught = step_cost.text_of(config, batch)
    if networks:
        teacher = step_cost.teacher_program(networks, batch)
        taught |= teacher.run(*teacher.arguments)
        timed["", FORWARD] = lambda: _seconds(lambda: teacher.run(*teacher.arguments), steps)
    ways, plain, notes = {}, {}, []
    for name in config.students:
        try:
            found = step_cost.way(config, name, batch, taught, whole=whole)
        except ValueError as error:
            notes.append(f"{name}: not measured ({error})")
            continue
        if whole:
            if found.student not in plain:
                bare = found if found.alone is None else step_cost.way(_bare(config, name), name, batch, {})
                held = [bare.step.arguments[0]]
                plain[found.student] = held, bare.step.bytes, _stepper(bare.step, held, steps)
            held, _, timed[name, WITHOUT] = plain[found.student]
            if found.alone is not None:
                timed[name, STEP] = _stepper(found.step, held, steps)
            found = found._replace(step=found.step._replace(arguments=()))
        if found.alone is not None:
            timed[name, ALONE] = lambda alone=found.alone: _lasting(lambda: alone.run(*alone.arguments))
        ways[name] = found
    times = {key: [] for key in timed}
    for turn in range(rounds + 1):
        for key, function in timed.items():
            seconds = function()
            if turn:
                times[key].append(seconds)
    words, arms = step_cost.kinds(config), []
    for name, found in ways.items():
        without = times.get((name, WITHOUT), [])
        lists = times.get((name, STEP), without), without, times.get((name, ALONE), [])
        extra = found.step.bytes - plain[found.student][1] if whole else 0
        arms.append(Arm(name, words[name], *lists, extra, found.params))
    return Bench(
        device(),
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        ", ".join(dict.fromkeys(student.model for student in config.students.values())),
        config.teacher.model,
        config.batch_size,
        config.augment.size,
        times.get(("", FORWARD), []),
        arms,
        notes,
    )


def _bare(config: ConfigDict, name: str) -> ConfigDict:
    """The config with arm `name` learning from labels alone."""
    config = config.copy_and_resolve_references().unlock()
    config.students[name].loss = config.students[name].hint = ""
    return config.lock()


def _seconds(function: Callable, times: int) -> float:
    """Seconds a call."""
    begin = time.perf_counter()
    for _ in range(times):
        result = function()
    jax.block_until_ready(result)
    return (time.perf_counter() - begin) / times


def _lasting(function: Callable) -> float:
    """Seconds a call, of as many calls as last SHORTEST."""
    times = max(1, math.ceil(SHORTEST / max(_seconds(function, 1), 1e-9)))
    return _seconds(function, times)


def _stepper(program: step_cost.Program, held: list, steps: int) -> Callable[[], float]:
    """() -> seconds a step. `held` is the student's state, which arms of one student hand on to each other."""
    _, own, *rest = program.arguments

    def run() -> float:
        nonlocal own
        model = held.pop()
        begin = time.perf_counter()
        for _ in range(steps):
            model, own = program.run(model, own, *rest)
        jax.block_until_ready((model, own))
        held.append(model)
        return (time.perf_counter() - begin) / steps

    return run


def report(bench: Bench, console: Console) -> None:
    """Prints the table and what its columns are."""
    teacher = f", teacher {bench.teacher}" * bool(bench.teacher)
    console.print(f"{bench.student}{teacher}, batch {bench.batch}, {bench.size} pixels, on {bench.device}")
    whole = [seconds for arm in bench.arms for seconds in arm.without]
    base = statistics.median(whole) if whole else None
    if base:
        console.print(f"student alone: {1e3 * base:.4g} ms a step {_spread(whole)}")
    if bench.forward:
        console.print(f"teacher forward: {1e3 * statistics.median(bench.forward):.4g} ms {_spread(bench.forward)}")
    table = Table("", "step, ms", "added, ms", "added", "by itself, ms", "by itself", "memory, MB", "parameters")
    for arm in bench.arms:
        own = statistics.median(arm.without) if arm.without else None
        cells = [_median(arm.step), f"{_median(arm.added)} {_spread(arm.added)}".strip(), _share(arm.added, own)]
        cells += [_median(arm.alone), _share(arm.alone, own), f"{arm.bytes / 1e6:.3g}" if arm.step else "-"]
        table.add_row(arm.name, *cells, f"{arm.params:,}")
    console.print(table)
    console.print(
        "added: a step with the loss less one without, just before it, the teacher's outputs given; median over rounds "
        "(least to most). by itself: value and gradient of the loss in the student's outputs and the adaptors, as a "
        "program of its own. Shares are of the student's step; memory is arguments and temporaries as compiled."
    )
    for note in bench.notes:
        console.print(note, markup=False)


def _median(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.3g}" if seconds else "-"


def _spread(seconds: list[float]) -> str:
    return f"({1e3 * min(seconds):.3g} to {1e3 * max(seconds):.3g})" if seconds else ""


def _share(seconds: list[float], whole: float | None) -> str:
    return f"{100 * statistics.median(seconds) / whole:.2g} %" if seconds and whole else "-"


def asked(options: argparse.Namespace) -> ConfigDict:
    """The config of the pair and the losses that the options name."""
    c = common.base()
    c.experiment, c.batch_size = "research.distill.vanilla_kd", options.batch
    c.data.num_classes, c.augment.size = options.classes, options.size
    student = dict(model=bench_train.full_name(options.student), dtype=options.dtype)
    arms = {name: common.student(**student, loss=name) for name in _names(options.losses, losses.LOSSES)}
    for name in _names(options.hints, losses.HINTS):
        arms[f"{name} hint" if name in arms else name] = common.student(**student, hint=name)
    c.students = common.arms(**arms)
    c.teacher = common.teacher(bench_train.full_name(options.teacher), dtype=options.dtype)
    return configs.freeze(c)


def _names(text: str, table: Mapping[str, Callable]) -> list[str]:
    names = list(table) if text == "all" else [name for name in text.split(",") if name]
    for name in names:
        losses.pick(table, name)
    return names


def parser() -> argparse.ArgumentParser:
    """The options of `bench distill`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench distill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--config", metavar="FILE[:ARG]", help="measure the arms of a config")
    found.add_argument("--student", default="r50", help="variant, or short: deit_s, r50 (r50)")
    found.add_argument("--teacher", default="r152", help="variant (r152)")
    found.add_argument("--losses", default=",".join(LOSSES), help=f"names, or all ({','.join(LOSSES)})")
    found.add_argument("--hints", default=",".join(HINTS), help=f"names, or all ({','.join(HINTS)})")
    found.add_argument("--batch", type=int, default=8, help="examples a step (8)")
    found.add_argument("--size", type=int, default=224, help="side of the images in pixels (224)")
    found.add_argument("--classes", type=int, default=1000)
    found.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype (float32)")
    found.add_argument("--examples", type=int, default=50_000, help="of the training set, for CRD's memory (50000)")
    found.add_argument("--steps", type=int, default=1, help="steps a round (1)")
    found.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    found.add_argument("--alone", action="store_true", help="time the losses by themselves alone, no whole steps")
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    found.epilog = "also: --config.KEY=VALUE an override of the config"
    return found


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = configs.parse_args(parser(), argv)
    for name in ("batch", "steps", "rounds", "classes", "size", "examples"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    if overrides and not options.config:
        raise errors.UserError(f"{overrides[0]}: changes a config, but there is no --config")
    config = configs.load(options.config, overrides) if options.config else asked(options)
    bench = measure(prepared(config, options.examples), options.rounds, options.steps, whole=not options.alone)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    report(bench, console)
    if options.json:
        options.json.write_text(
            json.dumps(bench._asdict() | {"arms": [a._asdict() for a in bench.arms]}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
