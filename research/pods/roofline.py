"""How long a step takes at least: arithmetic, memory and network of a compiled program against a topology's rates.

Collectives are priced as ring algorithms that use every torus dimension their group spans, in both directions where
the dimension wraps around ("How to scale your model", chapter on sharded matrices): n devices that each hold or make
V bytes take V * (n-1)/n / bandwidth for an all-gather or reduce-scatter, twice that for an all-reduce, a quarter for an
all-to-all. A group in several slices does the same inside each slice, and then its hosts share the bytes that cross.
Latency, congestion and overlap are not modelled, so the largest of the times is a lower bound of a step.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from research.pods.chips import Topology
from research.pods.hlo import Collective

_PASSES = {"all-reduce": 2.0, "all-to-all": 0.25, "ragged-all-to-all": 0.25}
# Clock of TPU cores, Hz: peak FLOP/s over 2 x multiply-adders, and v4's paper; not published for 7x.
CLOCKS = {"v4": 1.05e9, "v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}


class Traffic(NamedTuple):
    """Collectives of one kind over one mesh axis: executions a step, payload bytes on a device, seconds.

    `network` tells whether slices or nodes are crossed.
    """

    kind: str
    axis: str
    count: int
    bytes: float
    seconds: float
    network: bool


class Roofline(NamedTuple):
    """Seconds a step of each resource on one device; the largest is the bottleneck.

    Attributes:
      compute: FLOPs over the peak in bfloat16.
      memory: bytes of main memory over its bandwidth.
      network: all collectives, one after the other.
      cycles: the TPU compiler's own estimate of all but the collectives, in seconds; 0 where there is none. Where
        it is the largest, neither arithmetic nor memory is used to the full: small, badly shaped or vector operations.
    """

    compute: float
    memory: float
    network: float
    cycles: float

    @property
    def seconds(self) -> float:
        """The step's lower bound: the slowest resource, or the compiler's estimate where that is larger."""
        return max(self.compute, self.memory, self.network, self.cycles)

    @property
    def bottleneck(self) -> str:
        """Which resource that is; where the compiler's estimate exceeds both, it is called "operations"."""
        times = {"compute": self.compute, "memory": self.memory, "network": self.network, "operations": self.cycles}
        return max(times, key=times.get)


def clock_seconds(topology: Topology, cycles: int) -> float:
    """The compiler's cycles as seconds; 0 for chips whose clock is not published."""
    return cycles / CLOCKS[topology.chip.name] if topology.chip.name in CLOCKS else 0.0


def traffic(collectives: Sequence[Collective], mesh: jax.sharding.Mesh, topology: Topology) -> list[Traffic]:
    """The collectives summed by kind and axis, the slowest first."""
    sums: dict[tuple[str, str, bool], list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    devices = mesh.devices.reshape(-1)
    for one in collectives:
        if one.network:
            _add(sums[one.kind, "slices", True], one, between_slices(one, topology))
            continue
        groups = np.arange(devices.size)[None] if one.groups is None else one.groups
        pairs = one.kind == "collective-permute"
        if groups.shape[-1] == 1:
            continue  # nothing leaves the device
        crosses = len({slice_of(devices[i], topology) for i in groups[0]}) > 1
        _add(sums[one.kind, axis_name(groups, mesh, pairs=pairs), crosses], one, seconds(one, devices, topology))
    rows = [Traffic(kind, axis, int(n), size, time, net) for (kind, axis, net), (n, size, time) in sums.items()]
    return sorted(rows, key=lambda row: -row.seconds)


def _add(total: list[float], one: Collective, time: float) -> None:
    for i, value in enumerate((1, one.bytes, time)):
        total[i] += one.count * value


def between_slices(one: Collective, topology: Topology) -> float:
    """Time of one transfer between slices: the chips of a host share its network."""
    others = (topology.slices - 1) / topology.slices
    share = 1.0 if one.kind == "collective-permute" else _PASSES.get(one.kind, 1.0) * others
    return (
        one.bytes * share * topology.chips_per_host * topology.chip.devices_per_chip / topology.chip.network_bandwidth
    )


def axis_name(groups: np.ndarray, mesh: jax.sharding.Mesh, *, pairs: bool = False) -> str:
    """The mesh axes along which members of a group differ: "data", "data+fsdp"; "data/8" where eight of them do.

    `pairs`: the groups are sources and targets of a permutation.
    """
    shape = mesh.devices.shape
    places = np.stack(np.unravel_index(groups, shape))  # (axes, groups, members)
    varied = [i for i, place in enumerate(places) if np.any(place != place[:, :1])]
    name = "+".join(mesh.axis_names[i] for i in varied) or "none"
    part = groups.shape[-1] < math.prod(shape[i] for i in varied)
    return f"{name}/{groups.shape[-1]}" if part and not pairs else name


def seconds(one: Collective, devices: np.ndarray, topology: Topology) -> float:
    """Time of one execution."""
    groups = np.arange(devices.size)[None] if one.groups is None else one.groups
    members = [devices[i] for i in groups[0]]
    slices = {slice_of(device, topology) for device in members}
    chip, inside = topology.chip, len(members) // len(slices)
    per_host = topology.chips_per_host * chip.devices_per_chip
    if one.kind == "collective-permute":
        shared = chip.network_bandwidth / per_host
        return one.bytes / (shared if len(slices) > 1 else chip.link_bandwidth / chip.devices_per_chip)
    passes = _PASSES.get(one.kind, 1.0)
    near = (
        passes * one.bytes * (inside - 1) / max(inside, 1) / group_bandwidth(members[:], topology) if inside > 1 else 0
    )
    if len(slices) == 1:
        return near
    hosts = max(inside / per_host, 1 / per_host)
    far = passes * one.bytes * (len(slices) - 1) / len(slices) / (hosts * chip.network_bandwidth)
    return near + far


def group_bandwidth(members: Sequence[jax.Device], topology: Topology) -> float:
    """Bytes/s at which a ring over these devices of one slice takes data in or out of each device."""
    chip = topology.chip
    first = slice_of(members[0], topology)
    coords = [getattr(d, "coords", None) for d in members if slice_of(d, topology) == first]
    if chip.dimensions == 0 or coords[0] is None:
        return chip.link_bandwidth
    spans = [len({c[i] for c in coords}) for i in range(len(topology.shape))]
    spanned = [i for i, n in enumerate(spans) if n > 1]
    if not spanned:
        return chip.link_bandwidth * chip.links  # the two cores of one chip
    ways = sum(2 if wraps(topology, i) and spans[i] == topology.shape[i] else 1 for i in spanned)
    return ways * chip.link_bandwidth / chip.devices_per_chip


def wraps(topology: Topology, dimension: int) -> bool:
    """Whether the slice is a ring along a dimension: whole pods of v5e and v6e are, and cubes of the 3-D chips."""
    side = topology.shape[dimension]
    return side == 16 if topology.chip.dimensions == 2 else side % 4 == 0


def slice_of(device: jax.Device, topology: Topology) -> int:
    """The slice (TPU) or node (others) that holds a device."""
    if topology.chip.platform == "tpu":
        return getattr(device, "slice_index", None) or 0
    return device.id // topology.shape[0]
