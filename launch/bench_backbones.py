"""How fast backbones run, against timm and against each other: `python -m launch.bench backbones`.

Throughput: forward pass in evaluation and training step (softmax cross-entropy, AdamW) of each model, and, where torch
and timm are installed, the ratio to the same in PyTorch: eager, and compiled on an accelerator. Deploy forms: a
VanillaNet's merged form against its train form in evaluation, and against the ResNet nearest to it in published
accuracy. Everything is jitted and timed in the same run, in turns, and compared round by round, so that a busy machine
disturbs all alike. Weights are random, which time does not depend on.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from launch import bench_peer, bench_train
from launch.bench_train import COMPILED, EAGER
from research import backbones
from research.backbones import classify, published, vanillanet
from research.core import errors, runner

MODELS = "resnet50,deit_small_patch16_224,swin_tiny_patch4_window7_224,convnext_tiny"
OURS = "ours"
# What is timed, and the FLOPs a forward multiply-add stands for in it.
WORK = {"forward": 2, "train": 6}
TRAIN_FORM, DEPLOY_FORM = "train form", "deploy form"
_ALL = tuple(name for name in published.IMAGENET if name.startswith("vanillanet_"))
# Top-1 of ResNets at 224 pixels after the A2 recipe of Wightman et al. 2021 (arXiv 2110.00476), with which the slides
# of VanillaNet compare.
RESNETS = {name: published.IMAGENET[name].top1 for name in ("resnet18", "resnet34", "resnet50")} | {"resnet152": 81.8}


class Deploy(NamedTuple):
    """Latency of a VanillaNet's two forms and of a ResNet, in evaluation.

    Attributes:
      model, rival: the VanillaNet and the ResNet of the nearest published accuracy.
      top1: {model, rival: published accuracy in percent}.
      batch: images a pass.
      difference: largest difference between the two forms' logits, relative to the largest logit.
      seconds: {TRAIN_FORM, DEPLOY_FORM, rival: seconds a pass in each round}.
    """

    model: str
    rival: str
    top1: dict[str, float]
    batch: int
    difference: float
    seconds: dict[str, list[float]]

    def ratios(self, other: str) -> list[float]:
        """Speed of the deploy form over that of `other` in each round, smallest first."""
        return sorted(b / a for a, b in zip(self.seconds[DEPLOY_FORM], self.seconds[other], strict=True))


def rival(model: str) -> str:
    """The ResNet whose published accuracy is nearest to that of a VanillaNet."""
    return min(RESNETS, key=lambda name: abs(RESNETS[name] - published.IMAGENET[model].top1))


class Ours:
    """A network whose forward passes and training steps can be timed in windows."""

    def __init__(self, network: classify.Network, batch: dict[str, np.ndarray]):
        self._engine = runner.build(bench_train.classification(network))
        self._state = self._engine.init(jax.random.PRNGKey(0))
        self._batch = self._engine.put(batch)
        apply = lambda params, state, images: network.apply(params, state, classify.unit(images), train=False)[0]
        self._forward = jax.jit(apply)

    def window(self, count: int, mode: str) -> float:
        """Seconds of `count` forward passes ("forward") or training steps ("train")."""
        begin = time.perf_counter()
        for _ in range(count):
            if mode == "train":
                self._state, found = self._engine.train_step(self._state, self._batch)
            else:
                found = self._forward(self._state.params, self._state.model_state, self._batch["image"])
        jax.block_until_ready(found)
        return time.perf_counter() - begin


def throughput(model: str, options: argparse.Namespace, peak: float = 0.0) -> list[bench_train.Bench]:
    """Forward pass and training step of a model, ours and PyTorch's in turns; one Bench of each mode.

    `peak` is FLOP/s of all devices at most, 0 where unknown.
    """
    size = options.size or backbones.input_spec(model).size
    options = argparse.Namespace(**{**vars(options), "model": model, "size": size})
    network, notes = bench_train.network_of(options), []
    cost = network.cost()
    seconds: dict[str, dict[str, list[float]]] = {mode: {} for mode in options.modes}
    names = (EAGER, COMPILED) if options.compile else (EAGER,)
    with bench_train.peers(options.python, network, options, notes, names) as others:
        ours = Ours(network, bench_train.synthetic(options.batch, size, options.classes))
        windows = {OURS: ours.window, **{name: _asking(peer) for name, peer in others.items()}}
        for mode in options.modes:
            seconds[mode] = in_turns(
                {name: functools.partial(window, mode=mode) for name, window in windows.items()},
                options.steps,
                options.rounds,
            )
        notes += bench_train.compared(others, cost["params"])
    counts = (cost["params"], cost["macs"], options.batch, peak)
    return [bench_train.Bench(f"{model} {m}", *counts, taken, notes, WORK[m]) for m, taken in seconds.items()]


def _asking(peer: bench_peer.Peer) -> Callable[..., float]:
    return lambda count, mode: peer.ask(count, mode)["seconds"]


def in_turns(windows: dict[str, Callable[[int], float]], count: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each window (count -> seconds) in each round; one more round comes first, to compile."""
    found: dict[str, list[float]] = {name: [] for name in windows}
    for turn in range(rounds + 1):
        for name, window in windows.items():
            taken = window(count) / count
            if turn:
                found[name].append(taken)
    return found


def deployed(model: str, options: argparse.Namespace, **sizes) -> list[Deploy]:
    """Latency of a VanillaNet's forms and of its rival at each batch size; `sizes` replace the variant's own."""
    other = rival(model)
    make = lambda name, **extra: classify.network(
        name, options.classes, options.size or backbones.input_spec(name).size, dtype=options.dtype, **extra
    )
    networks = {TRAIN_FORM: make(model, **sizes), DEPLOY_FORM: make(f"{model}_deploy", **sizes), other: make(other)}
    variables = {name: _variables(networks[name]) for name in (TRAIN_FORM, other)}
    train = variables[TRAIN_FORM]
    variables[DEPLOY_FORM] = jax.jit(vanillanet.merge)({"params": train[0], **train[1]})["params"], {}
    passes = {name: _forward(network, variables[name]) for name, network in networks.items()}
    found = []
    for batch in options.batches:
        images = bench_train.synthetic(batch, networks[other].size, options.classes)["image"]
        images = jax.device_put(images.astype(np.float32) / 255)
        logits = {name: np.asarray(passes[name](images)) for name in (TRAIN_FORM, DEPLOY_FORM)}
        difference = np.max(np.abs(logits[TRAIN_FORM] - logits[DEPLOY_FORM])) / np.max(np.abs(logits[TRAIN_FORM]))
        timed = {name: _window(passes[name], images) for name in (TRAIN_FORM, DEPLOY_FORM, other)}
        seconds = in_turns(timed, max(1, options.passes // batch), options.rounds)
        top1 = {model: published.IMAGENET[model].top1, other: RESNETS[other]}
        found.append(Deploy(model, other, top1, batch, float(difference), seconds))
    return found


def _variables(network: classify.Network):
    return jax.jit(network.init)(jax.random.PRNGKey(0))


def _forward(network: classify.Network, variables) -> Callable[[jax.Array], jax.Array]:
    apply = jax.jit(lambda params, state, images: network.apply(params, state, images, train=False)[0])
    return lambda images: apply(*variables, images)


def _window(call: Callable[[jax.Array], jax.Array], images: jax.Array) -> Callable[[int], float]:
    def window(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            found = call(images)
        jax.block_until_ready(found)
        return time.perf_counter() - begin

    return window


def spread(ratios: Sequence[float]) -> str:
    """Median and range in words."""
    ratios = sorted(ratios)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def report_throughput(benches: Sequence[bench_train.Bench], console: Console) -> None:
    """Prints a row for every mode and framework of one model, then the ratios and what PyTorch's side had to tell."""
    first = benches[0]
    title = f"{first.model.split()[0]}: {first.params:,} parameters, {first.macs / 1e9:.4g} G multiply-adds"
    table = Table("", "", "examples/s", "ms", "TFLOP/s", "of peak", title=title, title_justify="left")
    lines = []
    for bench in benches:
        mode = bench.model.split()[1]
        for name in bench.seconds:
            rate, flops = bench.rate(name), bench.flops(name)
            part = f"{100 * flops / bench.peak:.1f} %" if bench.peak else "unknown"
            table.add_row(mode, name, f"{rate:.4g}", f"{1e3 * bench.batch / rate:.4g}", f"{flops / 1e12:.4g}", part)
            if name != OURS:
                lines.append(f"{mode}: speed relative to {name} {spread(bench.ratios(OURS, name))}")
    console.print(table)
    for line in [*lines, *first.notes]:
        console.print(line, markup=False)


def report_deploy(found: Deploy, console: Console) -> None:
    """Prints the latencies of a VanillaNet's forms and of its rival, and the deploy form's speed over the others."""
    title = f"{found.model} ({found.top1[found.model]:.2f} % top-1 published), batch {found.batch}, in evaluation"
    table = Table("", "ms", "deploy form's speed over it", title=title, title_justify="left")
    for name, seconds in found.seconds.items():
        label = f"{name} ({found.top1[name]:.2f} %)" if name in found.top1 else name
        ratio = "" if name == DEPLOY_FORM else spread(found.ratios(name))
        table.add_row(label, f"{1e3 * statistics.median(seconds):.4g}", ratio)
    console.print(table)
    console.print(f"logits of the two forms differ by {found.difference:.1e} of the largest")


def parser() -> argparse.ArgumentParser:
    """The options of `bench backbones`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench backbones",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    listed = lambda text: tuple(filter(None, text.split(",")))
    found.add_argument("--models", type=listed, default=MODELS, help="variants, commas between; '' for none")
    found.add_argument("--modes", type=listed, default="forward,train", help="forward, train or both (both)")
    found.add_argument("--batch", type=int, default=8, help="examples a step, over all devices (8)")
    found.add_argument("--size", type=int, default=0, help="side of the images in pixels (0: the variant's)")
    found.add_argument("--classes", type=int, default=1000)
    found.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (float32 on CPU, else bfloat16)")
    found.add_argument("--steps", type=int, default=2, help="steps a round (2)")
    found.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    found.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="compare with torch.compile too (not on CPU)"
    )
    found.add_argument(
        "--deploy",
        type=listed,
        default="vanillanet_5,vanillanet_6",
        help="VanillaNets, commas between, or all (vanillanet_5,vanillanet_6); '' for none",
    )
    found.add_argument("--batches", type=listed, default="1,8", help="batch sizes of the deploy forms (1,8)")
    found.add_argument("--passes", type=int, default=8, help="images a round of the deploy forms at least (8)")
    bench_peer.add_options(found)
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    return found


def checked(options: argparse.Namespace) -> argparse.Namespace:
    """The options with what depends on the machine filled in; raises UserError for names and numbers that do not do."""
    for name in ("batch", "steps", "rounds", "classes", "passes"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    options.batches = tuple(int(text) if text.isdecimal() else 0 for text in options.batches)
    if not all(options.batches):
        raise errors.UserError("--batches: must be numbers of 1 or more, commas between")
    if unknown := set(options.modes) - set(WORK):
        raise errors.UserError(f"--modes: no {', '.join(sorted(unknown))} (there are {', '.join(WORK)})")
    options.models = [bench_train.full_name(name) for name in options.models]
    for name in options.models:
        backbones.input_spec(name)
    options.deploy = _ALL if options.deploy == ("all",) else options.deploy
    if unknown := set(options.deploy) - set(_ALL):
        raise errors.UserError(f"--deploy: no {', '.join(sorted(unknown))} (there are all, {', '.join(_ALL)})")
    on_cpu = jax.devices()[0].platform == "cpu"
    options.dtype = options.dtype or ("float32" if on_cpu else "bfloat16")
    options.compile = not on_cpu if options.compile is None else options.compile
    return options


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch room on the same GPU
    options = checked(parser().parse_args(argv))
    console = Console(highlight=False)
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    console.print(f"{device}, {jnp.dtype(options.dtype).name}, batch {options.batch}, rounds {options.rounds}")
    benches, notes = [], []
    peak = bench_train.peak(options.dtype, notes) if options.models else 0.0
    for note in [f"peak: {peak / 1e12:.4g} TFLOP/s"] if peak else notes:
        console.print(note, markup=False)
    for name in options.models:
        benches += throughput(name, options, peak)
        report_throughput(benches[-len(options.modes) :], console)
    deploys = []
    for name in options.deploy:
        for found in deployed(name, options):
            deploys.append(found)
            report_deploy(found, console)
    if options.json:
        figures = {"device": device, "dtype": options.dtype, "throughput": [bench._asdict() for bench in benches]}
        figures["deploy"] = [found._asdict() for found in deploys]
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
