"""Compiles a config's train and eval step ahead of time for a pod, on a machine without accelerators.

    python -m launch.compile --config configs/distill/vanilla_kd_r50_a2.py --topology v5e:16x16

Says what a device's memory holds, what the step computes and moves, the least time it can take, and FITS or OUT OF
MEMORY. Topologies: v5e:16x16, v5e:16x16*2 (two slices), v5p-512, h200:8x4 (lowered only), cpu:8 (virtual devices).
Neither data nor a teacher's weights are needed. Exit status: 0 fits, 3 out of memory, 1 a mistake of the user.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from rich.console import Console

from launch import train
from research.core import config as configs
from research.core import cost, runner, sharding
from research.core.errors import UserError, cli
from research.core.experiment import Experiment
from research.data import labelled_views, text
from research.pods import aot, chips, fit, measure, tables
from research.pods.chips import Topology
from research.pods.measure import Measured

FITS, OUT_OF_MEMORY = 0, 3
IMAGENET = 1281167  # training images; taken for 1,000 classes where there is no data


@dataclasses.dataclass(frozen=True)
class Declared:
    """Stands for data that is not here: its size and classes are all that shapes depend on."""

    length: int
    num_classes: int
    name: str = "declared"

    def __len__(self) -> int:
        return self.length

    @property
    def labels(self) -> np.ndarray:
        return np.arange(self.length) % self.num_classes


class Prepared(NamedTuple):
    """A config bound to a topology: all that compilation needs.

    Attributes:
      config: resolved.
      batches: {"train", "eval"} of {name: ShapeDtypeStruct}.
    """

    config: ConfigDict
    experiment: Experiment
    runner: runner.Runner
    batches: dict[str, dict[str, jax.ShapeDtypeStruct]]


def find_data(config: ConfigDict, examples: int) -> train.Data:
    """The config's data, or a stand-in of `examples` (0: data.num_examples, or ImageNet's for 1,000 classes).

    Raises UserError, naming the option, where neither the data nor its size is known.
    """
    missing = "not opened"
    if not examples:
        try:
            return train.open_data(config)
        except FileNotFoundError as error:
            missing = str(error)
        except UserError as error:
            if not str(error).startswith(("data.path", "data:")):
                raise
            missing = str(error)
    classes = config.data.num_classes
    if not classes:
        raise UserError(f"data.num_classes: not set, and the data is not here ({missing})")
    length = examples or config.data.num_examples or (IMAGENET if classes == 1000 else 0)
    if not length:
        raise UserError(f"--examples: give the number of training examples, as the data is not here ({missing})")
    declared = Declared(length, classes)
    return train.Data(declared, declared, None, None)


def batch_shapes(config: ConfigDict, step: str, rows: jax.sharding.Sharding) -> dict[str, jax.ShapeDtypeStruct]:
    """What `research.data.pipeline` gives to a step: images, labels, indices, the mask, and labels that are stored.

    Of text it is windows of tokens, indices and the mask.
    """
    train_step = step == "train"
    size = config.augment.size if train_step else config.eval.size
    count = config.batch_size if train_step else config.eval.batch_size or config.batch_size
    of = lambda dtype, *shape: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=rows)
    if config.data.kind == "text":
        return {
            "tokens": of(jnp.int32, text.context_of(config.data.options)),
            "index": of(jnp.int32),
            "mask": of(jnp.float32),
        }
    found = {
        "image": of(jnp.uint8, size, size, 3),
        "label": of(jnp.int32),
        "index": of(jnp.int32),
        "mask": of(jnp.float32),
    }
    if train_step and config.augment.get("strong"):
        found["strong"] = found["image"]
    stored = config.get("teacher", {}).get("labels")
    if train_step and stored:
        found |= {name: of(dtype, *shape) for name, (dtype, shape) in labelled_views.fields(stored).items()}
    return found


def prepare(config: ConfigDict, devices: list[jax.Device], examples: int = 0) -> Prepared:
    """Resolves a config and builds its experiment and runner for devices that need not exist."""
    data = find_data(config, examples)
    resolved = train.resolve(config, data)
    if resolved.parallel.mode != "jit":
        raise UserError("parallel.mode: only 'jit' compiles ahead of time; set --config.parallel.mode=jit")
    experiment = train.build(resolved, data)
    p = resolved.parallel
    bound = runner.build(experiment, mode=p.mode, axes=p.axes, rules=p.rules, devices=devices)
    train.check_batches(resolved, bound.devices)
    rows = sharding.batch_sharding(bound.shapes.step.sharding.mesh)
    return Prepared(resolved, experiment, bound, {step: batch_shapes(resolved, step, rows) for step in aot.STEPS})


def model_flops(experiment: Experiment, config: ConfigDict, step: str) -> float:
    """FLOPs that the mathematics of one step needs."""
    count = config.batch_size if step == "train" else config.eval.batch_size or config.batch_size
    return count * cost.model_flops(experiment.costs(), train=step == "train")


def start(topology: Topology) -> list[jax.Device]:
    """The topology's devices, JAX's own backend being the CPU whatever the machine has."""
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform != "tpu" and "device_count" not in os.environ.get("XLA_FLAGS", ""):
        try:
            jax.config.update("jax_num_cpu_devices", topology.chips)
        except RuntimeError:  # JAX runs already: `chips.devices` says whether there are enough
            pass
    return chips.devices(topology)


class Result(NamedTuple):
    """A prepared config with its measured steps and their summaries."""

    prepared: Prepared
    measured: dict[str, Measured]
    summaries: dict[str, dict[str, Any]]

    @property
    def fits(self) -> bool:
        return all(one.fits for one in self.measured.values())


def compile_config(prepared: Prepared, topology: Topology, steps=aot.STEPS, say=lambda line: None) -> Result:
    """Compiles and measures the steps of a prepared config."""
    measured, summaries = {}, {}
    for step in steps:
        begin = time.perf_counter()
        one = measure.measure(step, prepared.runner, prepared.batches[step], topology)
        say(f"{step} step {'compiled' if one.complete else 'lowered'} in {time.perf_counter() - begin:.0f} s")
        flops = model_flops(prepared.experiment, prepared.config, step)
        count = prepared.batches[step]["mask"].shape[0]
        measured[step], summaries[step] = one, tables.summary(one, count, flops, topology)
    return Result(prepared, measured, summaries)


def suggest(result: Result, devices: list[jax.Device]) -> list[str]:
    """Overrides that should make a config fit, the least costly first; none where it fits or none would."""
    failed = next((one for one in result.measured.values() if not one.fits), None)
    if failed is None:
        return []
    config, shapes = result.prepared.config, result.prepared.runner.shapes
    found = fit.suggestions(config, shapes, failed, devices)
    return [shlex.join(fit.overrides(config, setting, len(devices))) for setting, _ in found]


def find_fit(load: Callable[[list[str]], Prepared], result: Result, topology: Topology, devices, steps, say):
    """(overrides, Result) of the first setting found that fits, or None; see `fit.search`."""
    failed = next(one for one in result.measured.values() if not one.fits)
    results = {}

    def attempt(texts):
        results[tuple(texts)] = compile_config(load(texts), topology, steps)
        found = results[tuple(texts)].measured
        return next((one for one in found.values() if not one.fits), found[steps[0]])

    prepared = result.prepared
    found = fit.search(prepared.config, prepared.runner.shapes, failed, devices, attempt, say)
    return (found[0], results[tuple(found[0])]) if found else None


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m launch.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    found.add_argument("--config", required=True, help="config file, with its argument after a colon")
    found.add_argument("--topology", required=True, help="such as v5e:16x16, v5p-512, h200:8x4, cpu:8")
    found.add_argument("--examples", type=int, default=0, help="training examples, where the data is not here")
    found.add_argument("--train-only", action="store_true", help="leave the eval step out")
    found.add_argument(
        "--fit", action="store_true", help="search fsdp, micro-batches and rematerialisation until it fits"
    )
    found.add_argument("--save", default="", metavar="FILE", help="write the executables for the job to load")
    found.add_argument("--compare", default="", metavar="CONFIG", help="another config, compiled beside it")
    found.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return found


@cli
def main(argv: list[str]) -> int:
    options, overrides = configs.parse_args(parser(), argv)
    if options.save and options.train_only:
        raise UserError("--save: writes both steps; leave out --train-only")
    topology = chips.parse(options.topology)
    if options.save and topology.chip.platform == "cuda":
        raise UserError(f"--save: {topology.chip.name} is lowered, not compiled; the job compiles for itself")
    devices = start(topology)
    console = Console(stderr=options.json, width=None if sys.stdout.isatty() else 120)
    say = lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True)
    steps = ("train",) if options.train_only else aot.STEPS

    def load(more=(), name=options.config):
        return prepare(configs.load(name, [*overrides, *more]), devices, options.examples)

    say(f"{options.config} on {topology.name}: {topology.chips} chips, {topology.hosts} hosts")
    with _fresh(bool(options.save)):
        result = compile_config(load(), topology, steps, say)
    page = tables.page(topology, result.measured, result.summaries, result.prepared.runner.shapes)
    advice, applied = suggest(result, devices), []
    if not options.json:
        console.print(page)
    if options.fit and not result.fits:
        with _fresh(bool(options.save)):
            found = find_fit(load, result, topology, devices, steps, say)
        if found:
            applied, result = found
            if not options.json:
                console.print(tables.page(topology, result.measured, result.summaries, result.prepared.runner.shapes))
    summary = {"topology": topology.name, "chips": topology.chips, "hosts": topology.hosts}
    summary |= result.summaries["train"] | {"fits": result.fits, "steps": result.summaries, "suggestions": advice}
    summary["overrides"] = applied
    if options.compare:
        other = compile_config(load(name=options.compare), topology, steps, say)
        summary["compared"] = other.summaries
        pair = [result.summaries["train"], other.summaries["train"]]
        if not options.json:
            console.print(tables.comparison([options.config, options.compare], pair))
    if options.save and result.fits:
        compiled = {step: result.measured[step].compiled for step in aot.STEPS}
        size = aot.save(options.save, result.prepared.runner, result.prepared.config, compiled, result.prepared.batches)
        say(f"wrote {options.save}, {tables.gib(size)}")
    _verdict(result, advice, applied, say)
    if options.json:
        print(json.dumps(summary))
    return FITS if result.fits else OUT_OF_MEMORY


@contextlib.contextmanager
def _fresh(wanted: bool) -> Iterator[None]:
    """No compilation cache: what XLA:CPU takes from there cannot be written again."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", before and not wanted)
    compilation_cache.reset_cache()  # forgets that it found the cache in use
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def _verdict(result: Result, advice: list[str], applied: list[str], say: Callable[[str], None]) -> None:
    worst = max(result.measured.values(), key=lambda one: one.peak / one.limit)
    word = "FITS" if result.fits else "OUT OF MEMORY"
    say(f"{word}: {tables.gib(worst.peak)} of {tables.gib(worst.limit)} a device")
    if applied:
        say(f"with {shlex.join(applied)}")
    elif not result.fits:
        for text in advice:
            say(f"should fit with {text}")
        if not advice:
            say("no fsdp axis, micro-batches or rematerialisation would make it fit: take more or larger chips")


if __name__ == "__main__":
    sys.exit(main())
