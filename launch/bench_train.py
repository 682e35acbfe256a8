"""How fast training is, and how far from the machine's limit: `python -m launch.bench train --model deit_s`.

Trains a backbone on one synthetic batch (softmax cross-entropy, AdamW) and prints examples/s, multiply-adds, achieved
FLOP/s and MFU; what the engine's loop costs over the bare jitted step; and, where torch and timm are installed, the
ratio to the same step in eager and in compiled PyTorch. Everything is timed in the same run, in turns, and compared
round by round, so that a busy machine disturbs all alike.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from launch import bench_peer
from launch.bench_peer import Peer
from research import backbones
from research.backbones import classify
from research.core import cost, errors, experiment, loop, optim, runner, writers

SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large"}
BARE, LOOP, EAGER, COMPILED = "jitted step", "training loop", "PyTorch eager", "PyTorch compiled"


class Bench(NamedTuple):
    """What was measured.

    Attributes:
      model, params, macs: the variant, its parameters and forward multiply-adds an example.
      batch: examples a step.
      peak: FLOP/s of all devices at most, 0 where unknown.
      seconds: {BARE, LOOP, EAGER, COMPILED: seconds a step in each round}.
      notes: what could not be measured, and why.
      work: FLOPs a forward multiply-add stands for: 6 in training, which is three forward passes, 2 in one.
    """

    model: str
    params: int
    macs: int
    batch: int
    peak: float
    seconds: dict[str, list[float]]
    notes: list[str]
    work: int = 6

    def rate(self, name: str) -> float:
        """Examples/s, the median over the rounds."""
        return self.batch / statistics.median(self.seconds[name])

    def flops(self, name: str) -> float:
        """Achieved FLOP/s of the model's mathematics."""
        return self.work * self.macs * self.rate(name)

    def ratios(self, name: str, other: str) -> list[float]:
        """Speed of `name` over that of `other` in each round."""
        return [b / a for a, b in zip(self.seconds[name], self.seconds[other], strict=True)]


def full_name(model: str) -> str:
    """The variant a short name stands for: `deit_s` is deit_small_patch16_224, `r50` is resnet50; others pass."""
    if match := re.fullmatch(r"(vit|deit|deit3)_([tsbl])", model):
        return f"{match[1]}_{SIZES[match[2]]}_patch16_224"
    return re.sub(r"^r(\d+)$", r"resnet\1", model)


def classification(network: classify.Network) -> experiment.Experiment:
    """The supervised experiment that is timed: mean softmax cross-entropy, AdamW without a schedule."""

    def loss(params, model_state, batch, context):
        images = classify.unit(batch["image"])
        logits, _, model_state = network.apply(params, model_state, images, train=True, key=context.key)
        value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
        return value, experiment.Output(model_state, {"loss": experiment.scalar(value)})

    optimizer = optim.optimizer("adamw", 1e-3, weight_decay=0.05)
    return experiment.supervised(network.init, loss, lambda *_: {}, optimizer)


def torch_peer(python: str, network: classify.Network, options: argparse.Namespace, compiled: bool) -> Peer:
    """The same training step in PyTorch, eager or compiled."""
    words = [options.model, "--batch", options.batch, "--size", options.size, "--dtype", options.dtype]
    sized = hasattr(network.module, "img_size")
    words += ["--classes", options.classes, *["--compile"] * compiled, *["--sized"] * sized]
    return Peer(python, "bench_torch.py", words)


@contextlib.contextmanager
def peers(
    python: str | None,
    network: classify.Network,
    options: argparse.Namespace,
    notes: list[str],
    names: Sequence[str] = (EAGER, COMPILED),
):
    """The PyTorch processes that work, by name; the reasons of the others go to `notes`."""
    found: dict[str, Peer] = {}
    try:
        for name in names if python else ():
            peer = torch_peer(python, network, options, name == COMPILED)
            if peer.reason:
                notes.append(f"{name}: not compared ({peer.reason})")
                peer.close()
            else:
                found[name] = peer
        yield found
    finally:
        for peer in found.values():
            peer.close()


def measure(options: argparse.Namespace) -> Bench:
    """Times everything in turns: a window of the loop, then as many bare steps, then PyTorch's."""
    network = network_of(options)
    engine = runner.build(classification(network))
    batch = synthetic(options.batch, options.size, options.classes)
    key, notes = jax.random.PRNGKey(0), []
    seconds: dict[str, list[float]] = {BARE: [], LOOP: []}
    bare = _bare(engine, engine.init(key), engine.put(batch))

    with peers(options.python, network, options, notes) as others, tempfile.TemporaryDirectory() as folder:
        timed = {BARE: bare, **{name: lambda n, peer=peer: peer.ask(n)["seconds"] for name, peer in others.items()}}
        seconds |= {name: [] for name in others}

        def batches(first: int) -> Iterator[dict]:
            for turn in range(options.rounds + 1):
                begin = time.perf_counter()
                yield from [batch] * options.steps
                # Here the loop has taken its steps, fetched their metrics and written them.
                if turn:  # the first turn compiles and warms up
                    seconds[LOOP].append((time.perf_counter() - begin) / options.steps)
                    for name, function in timed.items():
                        seconds[name].append(function(options.steps) / options.steps)
            yield batch

        plan = loop.Plan(
            steps=options.steps * (options.rounds + 1) + 1, batch_size=options.batch, log_every=options.steps
        )
        writer = writers.Writer(folder, steps=plan.steps, batch_size=plan.batch_size, stream=io.StringIO())
        with contextlib.closing(writer):
            loop.fit(engine, plan, key=key, train_batches=batches, writer=writer)
        own = network.cost()
        notes += compared(others, own["params"])
    return Bench(options.model, own["params"], own["macs"], options.batch, peak(options.dtype, notes), seconds, notes)


def compared(others: Mapping[str, Peer], params: int) -> list[str]:
    """Which PyTorch was compared with, and where its model has not as many parameters as ours."""
    notes = [f"{name}: {peer.version}" for name, peer in others.items()]
    counts = {name: peer.ready["ready"] for name, peer in others.items()}
    return notes + [
        f"{name} has {count:,} parameters, not {params:,}: not the same model"
        for name, count in counts.items()
        if count != params
    ]


def synthetic(batch: int, size: int, classes: int) -> dict[str, np.ndarray]:
    """A batch of random images and labels."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8),
        "label": rng.integers(0, classes, batch, dtype=np.int32),
        "mask": np.ones(batch, np.float32),
        "index": np.arange(batch, dtype=np.int32),
    }


def network_of(options: argparse.Namespace) -> classify.Network:
    """The network that `--model`, `--classes`, `--size` and `--dtype` ask for."""
    sized = "img_size" in getattr(type(backbones.create(options.model)), "__dataclass_fields__", {})
    extra = {"img_size": options.size} if sized else {}
    return classify.network(options.model, options.classes, options.size, dtype=options.dtype, **extra)


def _bare(engine: runner.Runner, state, batch: dict) -> Callable[[int], float]:
    """steps -> seconds of that many jitted steps on a batch that is on the device already."""

    def run(steps: int) -> float:
        nonlocal state
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = engine.train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - begin

    return run


def peak(dtype: str, notes: list[str]) -> float:
    """FLOP/s of all devices at most; 0 where unknown, which `notes` then tells."""
    try:
        return cost.peak_flops(dtype=jnp.dtype(dtype)) * jax.device_count()
    except ValueError as error:
        notes.append(str(error))
        return 0.0


def report(bench: Bench, console: Console) -> None:
    """Prints the figures as a table and the comparisons below it."""
    device = jax.devices()[0]
    measured = " measured with matrix products" if device.platform == "cpu" else ""
    console.print(f"{bench.model}, batch {bench.batch}, on {jax.device_count()} x {device.device_kind}")
    console.print(f"parameters {bench.params:,}; multiply-adds an example, forward: {bench.macs:,}")
    if bench.peak:
        console.print(f"peak{measured}: {bench.peak / 1e12:.4g} TFLOP/s")
    table = Table("", "examples/s", "ms/step", "TFLOP/s", "MFU")
    for name in bench.seconds:
        utilisation = f"{100 * bench.flops(name) / bench.peak:.1f} %" if bench.peak else "unknown"
        rate, flops = bench.rate(name), bench.flops(name) / 1e12
        table.add_row(name, f"{rate:.4g}", f"{1e3 * bench.batch / rate:.4g}", f"{flops:.4g}", utilisation)
    console.print(table)
    overhead = statistics.median(bench.ratios(BARE, LOOP)) - 1
    console.print(f"engine overhead over the jitted step: {100 * overhead:.1f} %")
    for name in (EAGER, COMPILED):
        if name in bench.seconds:
            ratios = sorted(bench.ratios(BARE, name))
            middle = statistics.median(ratios)
            console.print(f"speed relative to {name}: {middle:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f} by round)")
    for note in bench.notes:
        console.print(note, markup=False)


def parser() -> argparse.ArgumentParser:
    """The options of `bench train`."""
    found = argparse.ArgumentParser(
        prog="python -m launch.bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--model", default="deit_s", help="variant, or short: deit_s, vit_b, r50 (python -m research.backbones)"
    )
    found.add_argument("--batch", type=int, default=8, help="examples a step, over all devices (8)")
    found.add_argument("--size", type=int, default=0, help="side of the images in pixels (0: the variant's)")
    found.add_argument("--classes", type=int, default=1000)
    found.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="compute dtype (float32)")
    found.add_argument("--steps", type=int, default=10, help="steps a round (10)")
    found.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (5)")
    bench_peer.add_options(found)
    found.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the figures to a file")
    return found


@errors.cli
def main(argv: Sequence[str] | None = None) -> int:
    options = parser().parse_args(argv)
    options.model = full_name(options.model)
    options.size = options.size or backbones.input_spec(options.model).size
    for name in ("batch", "steps", "rounds", "classes", "size"):
        if getattr(options, name) < 1:
            raise errors.UserError(f"--{name} {getattr(options, name)}: must be 1 or more")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch room on the same GPU
    bench = measure(options)
    report(bench, Console(highlight=False))
    if options.json:
        options.json.write_text(json.dumps(bench._asdict(), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
