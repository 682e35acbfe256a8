"""Trains the experiment of a config, or resumes it.

    python -m launch.train --config configs/distill/vanilla_kd_small.py --workdir runs/small --config.data.path=x.zip

Run again on the same folder, it continues where it stopped; another config in that folder is refused. Exit status: 0
finished, 42 told to stop and saved (start it again), 1 anything else.
"""

import argparse
import functools
import importlib
import json
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from research.backbones import teachers
from research.core import cluster, cost, environment, loop, peaks, profile, runner, runs, storage, writers
from research.core import config as configs
from research.core.checkpoint import Checkpoints
from research.core.errors import UserError, cli
from research.core.experiment import Experiment
from research.core.watchdog import Watchdog
from research.data import labelled_views, pipeline, sources, transforms, views
from research.pods import aot
from research.port import checkpoint

LOG = logging.getLogger(__name__)

WEIGHTS = "weights"


class Data(NamedTuple):
    """The opened sources of a config and their transforms."""

    train: sources.Source
    eval: sources.Source
    train_transform: Callable[[dict, np.random.Generator], dict]
    eval_transform: Callable[[dict, np.random.Generator | None], dict]


def open_data(config: ConfigDict) -> Data:
    """Opens the training and evaluation data of a config; the first thing to fail on a wrong path or split."""
    d = config.data
    opened = functools.partial(sources.source, d.kind, d.path, num_classes=d.num_classes, **d.options)
    train = opened(split=d.split)
    held_out = opened(split=config.eval.split) if config.eval.split != d.split else train
    if held_out.num_classes != train.num_classes:
        raise UserError(
            f"eval.split: {held_out.name} has {held_out.num_classes} classes, {train.name} has {train.num_classes}"
        )
    train_transform = train.transform(True) or transforms.build(train=True, **config.augment)
    if stored := config.get("teacher", {}).get("labels"):
        mixing = views.Mixing(**{key: config.mix[key] for key in views.MIX})
        train_transform = labelled_views.transform_of(stored, train, train_transform, mixing)
    eval_transform = held_out.transform(False) or transforms.build(
        train=False, size=config.eval.size, crop=config.eval.crop
    )
    return Data(train, held_out, train_transform, eval_transform)


def resolve(config: ConfigDict, data: Data) -> ConfigDict:
    """The config with what depends on the data filled in: classes, examples, steps of an epoch and of the run."""
    config = config.copy_and_resolve_references().unlock()
    config.data.num_classes = data.train.num_classes
    config.data.num_examples = len(data.train)
    config.steps_per_epoch = pipeline.steps_per_epoch(data.train, config.batch_size, config.data.repeats)
    config.steps = config.steps or max(round(config.epochs * config.steps_per_epoch), 1)
    return config.lock()


def plan(config: ConfigDict) -> loop.Plan:
    """The loop's periods, in steps, of a resolved config."""

    def steps(epochs):
        return max(round(epochs * config.steps_per_epoch), 1) if epochs else 0

    return loop.Plan(
        config.steps, config.batch_size, config.log.every, steps(config.eval.every), steps(config.save.every)
    )


def build(config: ConfigDict, data: Data) -> Experiment:
    """The Experiment of a resolved config."""
    try:
        module = importlib.import_module(config.experiment)
    except ModuleNotFoundError as error:
        if error.name and not config.experiment.startswith(error.name):
            raise
        raise UserError(f"experiment: there is no module {config.experiment!r}") from None
    return module.experiment(config, labels=lambda: data.train.labels)


def bind(experiment: Experiment, config: ConfigDict) -> runner.Runner:
    """The experiment on the devices that the config's `parallel` section names."""
    return runner.build(experiment, mode=config.parallel.mode, axes=config.parallel.axes, rules=config.parallel.rules)


def batches(config: ConfigDict, data: Data) -> tuple[Callable[[int], Iterator], Callable[[], Iterator]]:
    """(first step -> training batches from there on, () -> one pass over the evaluation data) of this process."""
    reading = dict(
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        on_corrupt=config.data.on_corrupt,
    )

    def train(first):
        return pipeline.train_batches(
            data.train,
            data.train_transform,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=first,
            repeats=config.data.repeats,
            group=config.mix.group or None,
            **reading,
        )

    def held_out():
        size = config.eval.batch_size or config.batch_size
        return pipeline.eval_batches(data.eval, data.eval_transform, batch_size=size, **reading)

    return train, held_out


def with_teacher(config: ConfigDict, workdir: storage.Path) -> ConfigDict:
    """The config with the `weights` of every teacher set to where its recipe leaves them, if it has no others.

    Students whose `weights` are "teacher" get the first teacher's, or none where it is a random one.
    """
    if "teacher" not in config or config.teacher.get("labels"):
        return config
    config = config.copy_and_resolve_references().unlock()
    for name, t in teachers.sections(config).items():
        if not t.weights:
            if not t.recipe:
                key = name.replace("_", ".ensemble.", 1)
                raise UserError(f"{key}.weights: not set; give a checkpoint of {t.model}, or {key}.recipe to train one")
            t.workdir = t.workdir or str(workdir / name)
            t.weights = str(storage.folder(t.workdir) / WEIGHTS / "teacher.safetensors")
    for student in config.get("students", {}).values():
        if student.get("weights") == teachers.TEACHER and config.teacher.model:
            student.weights = "" if config.teacher.weights == teachers.RANDOM else config.teacher.weights
    return config.lock()


def train_teachers(config: ConfigDict) -> None:
    """Trains the teachers by their recipes, on the same data, unless that was done before."""
    for t in teachers.sections(config).values() if "teacher" in config else ():
        if not t.workdir or (runs.finished(t.workdir) and storage.folder(t.weights).exists()):
            continue
        LOG.info("training the teacher in %s", t.workdir)
        shared = {key: config.data[key] for key in ("kind", "path")}
        shared |= {f"options.{key}": value for key, value in config.data.options.items()}
        run(configs.load(t.recipe, [f"--config.data.{key}={value}" for key, value in shared.items()]), t.workdir)


def run(
    config: ConfigDict, workdir: str | os.PathLike, *, executable: str = "", steps: profile.Steps | None = None
) -> dict[str, float]:
    """Trains a config in a run folder, or resumes it there; returns the last evaluation's metrics.

    Args:
      config: from `configs.load`.
      workdir: local or gs://.
      executable: file of compiled steps, see launch.compile --save.
      steps: to profile, counted from this start.
    """
    workdir = storage.folder(workdir)
    data = open_data(config)
    resolved = with_teacher(resolve(config, data), workdir)
    experiment = build(resolved, data)
    bound = bind(experiment, resolved)
    check_batches(resolved, bound.devices)
    if steps and steps.last > resolved.steps:
        raise UserError(f"--profile: the run has {resolved.steps} steps, so there is no step {steps.last}")
    if executable:
        bound = aot.load(executable, bound, resolved)
    configs.claim(workdir, config)  # whatever is wrong with the config was found before the folder is made
    train_teachers(resolved)
    environment.write(workdir)
    if jax.process_index() == 0:
        data.train.leave(workdir)
    costs = experiment.costs()
    schedule = plan(resolved)
    if steps:
        bound = profile.traced(bound, steps, workdir)
    writer = writers.Writer(
        workdir,
        steps=schedule.steps,
        batch_size=schedule.batch_size,
        flops_per_example=cost.model_flops(costs, train=True),
        peak_flops=_peak(),
        tensorboard=config.log.tensorboard,
    )
    train_batches, eval_batches = batches(resolved, data)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.save.keep, metric=config.save.best)
    try:
        state, results = loop.fit(
            bound,
            schedule,
            key=jax.random.PRNGKey(config.seed),
            train_batches=train_batches,
            eval_batches=eval_batches,
            checkpoints=checkpoints,
            writer=writer,
            watchdog=Watchdog(config.parallel.patience, workdir),
        )
    finally:
        checkpoints.close()
    # The step counter is on every device.
    _export(workdir, experiment.export(bound.canonical(state)), costs, bound.shapes.step.sharding)
    writer.done(results)
    return results


def check_batches(config: ConfigDict, devices: int) -> None:
    """Raises UserError where the batches of a resolved config cannot be split over so many devices."""
    parts = {"batch_size": devices * config.parallel.accumulate, "eval.batch_size": devices}
    for key, shares in parts.items():
        size = configs.get(config, key)
        if size % shares:
            near = max(size // shares, 1) * shares
            raise UserError(f"{key}: {size} is not divisible by {shares}, devices times micro-batches; {near} would be")


def _peak() -> float:
    """Peak FLOP/s of all devices in bfloat16; 0 where the chip is not known."""
    try:
        return peaks.peak_flops() * jax.device_count()
    except ValueError as error:
        LOG.info("no MFU: %s", error)
        return 0.0


def _export(workdir: storage.Path, models: dict, costs: dict, whole: jax.sharding.Sharding) -> None:
    """Writes every model's trained weights as safetensors under our own names, and what the networks cost.

    All processes take part, as each may hold a share of every array; they leave together, when the files are there.
    """
    gather = jax.jit(lambda tree: tree, out_shardings=whole)
    for name, variables in models.items():
        arrays = gather(variables)
        if jax.process_index() == 0:
            checkpoint.save_variables(jax.device_get(arrays), workdir / WEIGHTS / f"{name}.safetensors")
    if jax.process_index() == 0:
        storage.write(workdir / runs.COST, json.dumps(costs, indent=2) + "\n")
    multihost_utils.sync_global_devices("weights are written")


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--config", required=True, help="config file, with its argument after a colon")
    found.add_argument("--workdir", default="", help="run folder; runs/<config's name> by default")
    found.add_argument("--executable", default="", metavar="FILE", help="steps compiled by launch.compile --save")
    found.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps of this start into WORKDIR/profile")
    found.add_argument("--distributed", action="store_true", help="one of several processes: find the others first")
    return found


@cli
def main(argv: list[str]) -> int:
    options, overrides = configs.parse_args(parser(), argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, force=True)
    for name in ("research", "launch", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    config = configs.load(options.config, overrides)
    if options.distributed:
        cluster.join()
    path, _, arg = options.config.partition(":")
    workdir = options.workdir or pathlib.Path("runs") / f"{pathlib.Path(path).stem}{'-' * bool(arg)}{arg}"
    steps = profile.parse(options.profile) if options.profile else None
    with cluster.guard():
        run(config, workdir, executable=options.executable, steps=steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
