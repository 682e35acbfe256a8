"""Compiles a step for a topology and measures it: memory of a device, work, traffic, a lower bound of its time."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from research.core import cost
from research.core.experiment import State
from research.core.runner import Runner
from research.pods import hlo, roofline
from research.pods.chips import Topology

FIELDS = {
    "params": "parameters",
    "model_state": "model state",
    "opt_state": "optimiser",
    "ema": "moving averages",
    "frozen": "frozen networks",
}
TEMPORARIES = "activations and temporaries"
_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Measured(NamedTuple):
    """What is known of one compiled (or, for GPUs, lowered) step; all quantities are of one device.

    Attributes:
      step: "train" or "eval".
      memory: name -> bytes; they add up to `peak`.
      peak: bytes needed; where the compiler refused, what it said it needs, without a split of the temporaries.
      limit: bytes there are.
      fits: the compiler succeeded and `peak` is within `limit`.
      flops, bytes: work and memory traffic of one execution, loops counted in full; 0 where compilation failed.
      times, traffic: see research.pods.roofline; None and () where compilation failed.
      unknown_loops: loops whose length depends on data, counted once.
      places: the compiler's estimate of cycles by place in the source, the largest first; {} where there is none.
      complete: False for GPUs, where temporaries and collectives are not known.
      compiled: the program; None where there is none.
    """

    step: str
    memory: dict[str, int]
    peak: int
    limit: int
    fits: bool
    flops: float = 0.0
    bytes: float = 0.0
    times: roofline.Roofline | None = None
    traffic: tuple[roofline.Traffic, ...] = ()
    unknown_loops: int = 0
    complete: bool = True
    compiled: Any = None
    places: Mapping[str, int] = {}

    @property
    def intensity(self) -> float:
        """FLOPs a byte of memory traffic."""
        return self.flops / self.bytes if self.bytes else 0.0


class OutOfMemory(NamedTuple):
    """What the compiler says where a program does not fit: bytes it needs and bytes it may use (0: not said)."""

    needed: int
    available: int


def device_bytes(tree) -> int:
    """Bytes of a tree of ShapeDtypeStructs on one device, exact but for the padding of layouts."""
    shards = [(leaf.sharding.shard_shape(leaf.shape), leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree)]
    return sum(math.prod(shape) * size for shape, size in shards)


def state_bytes(state: State) -> dict[str, int]:
    """Bytes of each part of a state on one device."""
    found = {name: device_bytes(getattr(state, field)) for field, name in FIELDS.items()}
    return found | {"step and key": device_bytes((state.step, state.key))}


def measure(step: str, runner: Runner, batch: Mapping[str, jax.ShapeDtypeStruct], topology: Topology) -> Measured:
    """Compiles the "train" or "eval" step of a jit runner for batches of a shape, and measures the program.

    For CUDA the program is lowered, not compiled: state bytes are exact, the network is the least that gradients need.
    """
    function = runner.train_step if step == "train" else runner.eval_step
    state = state_bytes(runner.shapes) | {"batch": device_bytes(batch)}
    limit = topology.chip.hbm_bytes // topology.chip.devices_per_chip
    if topology.chip.platform == "cuda":
        return _lowered(step, function, runner, batch, topology, state, limit)
    lowered = function.lower(runner.shapes, batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not is_oom(error):
            raise
        said = out_of_memory(str(error))
        peak = max(said.needed, sum(state.values()))
        return Measured(step, state | {TEMPORARIES: peak - sum(state.values())}, peak, said.available or limit, False)
    memory = _split(compiled.memory_analysis(), state)
    peak = sum(memory.values())
    mesh = runner.shapes.step.sharding.mesh
    program = hlo.parse(compiled.as_text())
    flops, read = _work(compiled.cost_analysis(), lambda: cost.macs(function, runner.shapes, batch), mesh.size)
    read = min(read, program.bytes)
    moved = roofline.traffic(program.collectives, mesh, topology)
    times = _roofline(flops, read, sum(row.seconds for row in moved), topology, program.cycles)
    fits = peak <= limit
    moved, loops = tuple(moved), program.unknown_loops
    return Measured(step, memory, peak, limit, fits, flops, read, times, moved, loops, True, compiled, program.places)


def is_oom(error: Exception) -> bool:
    """Whether a compiler's error says that memory does not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def out_of_memory(text: str) -> OutOfMemory:
    """The sizes in the TPU compiler's message; the largest demand where it names several."""
    size = r"([\d.]+)([KMGT]?)B?"
    used = re.findall(rf"Used {size} of {size}", text)
    total = re.findall(rf"\({size}\) exceeds available \w+ \({size}\)", text)
    pairs = [(_bytes(a, b), _bytes(c, d)) for a, b, c, d in used + total]
    return OutOfMemory(*max(pairs, default=(0, 0)))


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])


def _split(stats, state: dict[str, int]) -> dict[str, int]:
    """Memory of one device by use: the compiler's totals, its arguments split as the state is.

    What the program does not read (the optimiser, in evaluation) is no argument of it, and yet is there.
    """
    return state | {
        "padding of layouts": max(stats.argument_size_in_bytes - sum(state.values()), 0),
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        TEMPORARIES: stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }


def _work(analysis: Mapping[str, float] | None, macs: Callable[[], int], devices: int) -> tuple[float, float]:
    """(FLOPs, bytes) of one device; XLA counts a loop's body once, the matrix products of the source count in full."""
    flops, read = (float((analysis or {}).get(key, 0)) for key in ("flops", "bytes accessed"))
    try:
        products = 2 * macs() / devices
    except ValueError:  # a product inside a loop of unknown length
        return flops, read
    # What loops repeat moves its bytes again too.
    repeated = products / flops if flops and products > 1.05 * flops else 1.0
    return flops * repeated, read * repeated


def _roofline(flops: float, read: float, network: float, topology: Topology, cycles: int) -> roofline.Roofline:
    chip = topology.chip
    share = 1 / chip.devices_per_chip
    compute, memory = flops / (chip.flops * share), read / (chip.bandwidth * share)
    return roofline.Roofline(compute, memory, network, roofline.clock_seconds(topology, cycles))


def _lowered(step, function, runner, batch, topology, state, limit) -> Measured:
    devices = runner.shapes.step.sharding.mesh.size
    lowered = function.trace(runner.shapes, batch).lower(lowering_platforms=("cuda",))
    # Before partitioning: the whole program, nothing fused, so bytes are far more than will be moved.
    whole = {key: value / devices for key, value in (lowered.cost_analysis() or {}).items() if isinstance(value, float)}
    flops, read = _work(whole, lambda: cost.macs(function, runner.shapes, batch), devices)
    moved = _gradient_traffic(runner, topology) if step == "train" else ()
    least = sum(state.values()) * (2 if step == "train" else 1)  # what is surely read (and written): the state
    times = _roofline(flops, least, sum(row.seconds for row in moved), topology, 0)
    peak = sum(state.values())
    return Measured(step, state, peak, limit, peak <= limit, flops, read, times, tuple(moved), 0, False)


def _gradient_traffic(runner: Runner, topology: Topology) -> tuple[roofline.Traffic, ...]:
    """The exchange of gradients in float32 among all devices: one all-reduce, or its two halves under fsdp."""
    mesh = runner.shapes.step.sharding.mesh
    size = cost.params_count(runner.shapes.params) * 4
    one = hlo.Collective("all-reduce", size, None, 1, "gradients")
    return tuple(roofline.traffic([one], mesh, topology)) if mesh.size > 1 else ()
