"""Chips and topologies by name: `v5e:16x16`, `v5e:16x16*2` (two slices), `v5p-512`, `h200:8x4`, `cpu:8`.

TPU compute, memory size and memory bandwidth come from JAX's registry (`jax.experimental.pallas.tpu`), GPU rates from
`research.core.peaks`. What neither has is in the table below. ICI, one way per link: "How to scale your model"
(jax-ml.github.io/scaling-book, v4 45, v5e 45, v5p 90, v6e 90 GB/s); 7x is derived from Cloud's 1,200 GB/s a chip both
ways over six links. Data-centre network: about 25 GB/s a TPU host (same book). NVLink: half of the data sheets' 900
(Hopper) and 600 GB/s (A100); between nodes one 400 or 200 Gbit/s adapter a GPU, as in DGX H100, H200 and A100.
"""

import contextlib
import difflib
import functools
import itertools
import math
import os
import re
from typing import NamedTuple

import jax

from research.core import peaks
from research.core.errors import UserError


class Chip(NamedTuple):
    """One kind of accelerator; rates and sizes are of a whole chip.

    Attributes:
      name: "v5e", "h200", ...; "cpu" stands for a virtual CPU device with nominal figures, to try the tools.
      platform: "tpu", "cuda" or "cpu".
      hbm_bytes: main memory.
      flops: dense bfloat16 FLOP/s.
      bandwidth: main memory, bytes/s.
      link_bandwidth: bytes/s one way of one ICI link, or of all NVLinks of a GPU.
      links: ICI links of a chip (two for each dimension of the torus); 1 for a GPU.
      network_bandwidth: bytes/s one way between hosts, per host.
      devices_per_host: chips of the usual host.
      devices_per_chip: JAX devices that one chip appears as: 2 for 7x, whose cores do not act as one.
      dimensions: of the torus; 0 where there is none.
      pod: most chips of one slice.
      gke_accelerator: value of the GKE node label `gke-tpu-accelerator`.
      accelerator_prefix: of Cloud's names, "v5litepod" in v5litepod-256.
      cores_in_name: what those names count per chip: 2 where they count cores.
      runtime_version: software version of a TPU VM.
      machine_type: GKE's machine with the usual host's chips.
    """

    name: str
    platform: str
    hbm_bytes: int
    flops: float
    bandwidth: float
    link_bandwidth: float
    links: int
    network_bandwidth: float
    devices_per_host: int
    devices_per_chip: int = 1
    dimensions: int = 0
    pod: int = 0
    gke_accelerator: str | None = None
    accelerator_prefix: str | None = None
    cores_in_name: int = 1
    runtime_version: str | None = None
    machine_type: str | None = None


class _Tpu(NamedTuple):
    dimensions: int
    pod: int
    link: float  # GB/s
    prefix: str
    cores_in_name: int
    gke: str
    machine: str
    runtime: str
    devices: int = 1


_TPUS = {
    "v4": _Tpu(3, 4096, 45, "v4", 2, "tpu-v4-podslice", "ct4p-hightpu-4t", "tpu-ubuntu2204-base"),
    "v5e": _Tpu(2, 256, 45, "v5litepod", 1, "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", "v2-alpha-tpuv5-lite"),
    "v5p": _Tpu(3, 6144, 90, "v5p", 2, "tpu-v5p-slice", "ct5p-hightpu-4t", "v2-alpha-tpuv5"),
    "v6e": _Tpu(2, 256, 90, "v6e", 1, "tpu-v6e-slice", "ct6e-standard-4t", "v2-alpha-tpuv6e"),
    "7x": _Tpu(3, 9216, 100, "tpu7x", 2, "tpu7x", "tpu7x-standard-4t", "v2-alpha-tpu7-ubuntu2404", devices=2),
}
# Kind of `peaks`, GB of memory, NVLink GB/s one way, Gbit/s of network a GPU.
_GPUS = {
    "h200": ("NVIDIA H200", 141, 450, 400),
    "h100": ("NVIDIA H100", 80, 450, 400),
    "a100": ("NVIDIA A100 80GB", 80, 300, 200),
}
_ALIASES = {"tpu7x": "7x", "v7x": "7x", "v5litepod": "v5e", "v5lite": "v5e"}
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_EXAMPLE = {"tpu": "16x16", "cuda": "8x4", "cpu": "8"}


@functools.cache
def chip(name: str) -> Chip:
    """The chip of a name such as "v5e", "7x" (or "tpu7x") or "h200"; raises UserError naming the nearest."""
    name = _ALIASES.get(name, name)
    if name in _TPUS:
        return _tpu(name, _TPUS[name])
    if name in _GPUS:
        kind, memory, nvlink, network = _GPUS[name]
        rates = peaks.peak_flops(kind), peaks.peak_bandwidth(kind)
        return Chip(name, "cuda", int(memory * 1e9), *rates, nvlink * 1e9, 1, 8 * network * 1e9 / 8, 8)
    if name == "cpu":
        return Chip("cpu", "cpu", 2 * 2**30, 5e10, 1e10, 5e9, 1, 1e9, 1)
    near = difflib.get_close_matches(name, names(), n=1, cutoff=0.5)  # names this short differ much by one letter
    meant = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"topology: no chip {name!r}{meant} (there are {', '.join(names())})")


def names() -> list[str]:
    """The chips there are."""
    return [*_TPUS, *_GPUS, "cpu"]


def _tpu(name: str, row: _Tpu) -> Chip:
    from jax.experimental.pallas import tpu as pltpu  # a second of imports

    core = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), 1)
    cores = 1 if name in ("v5e", "v6e") else 2
    return Chip(
        name,
        "tpu",
        core.hbm_capacity_bytes * cores,
        float(core.bf16_ops_per_second * cores),
        float(core.mem_bw_bytes_per_second * cores),
        row.link * 1e9,
        2 * row.dimensions,
        25e9,
        4,
        row.devices,
        row.dimensions,
        row.pod,
        row.gke,
        row.prefix,
        row.cores_in_name,
        row.runtime,
        row.machine,
    )


class Topology(NamedTuple):
    """Chips and how they hang together.

    Attributes:
      chip: the kind.
      shape: of one slice of a TPU; (devices a node, nodes) otherwise.
      slices: TPU slices, joined by the data-centre network.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `parse` reads it: "v5e:16x16*2"."""
        shape = self.shape[:1] if self.chip.platform != "tpu" and self.shape[1] == 1 else self.shape
        return f"{self.chip.name}:{'x'.join(map(str, shape))}" + (f"*{self.slices}" if self.slices > 1 else "")

    @property
    def chips(self) -> int:
        """Chips of all slices or nodes."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices or nodes."""
        return self.chips * self.chip.devices_per_chip

    @property
    def chips_per_host(self) -> int:
        """Chips of one host: 2x4 slices of v5e and v6e are one machine of eight."""
        if self.chip.platform != "tpu":
            return self.shape[0]
        slice_chips = math.prod(self.shape)
        return slice_chips if self.chip.dimensions == 2 and slice_chips <= 8 else self.chip.devices_per_host

    @property
    def hosts(self) -> int:
        """Hosts of all slices, or nodes."""
        return self.chips // self.chips_per_host

    @property
    def accelerator_type(self) -> str | None:
        """Cloud's name of one slice, "v5litepod-256"; None outside TPU."""
        if self.chip.accelerator_prefix is None:
            return None
        return f"{self.chip.accelerator_prefix}-{math.prod(self.shape) * self.chip.cores_in_name}"

    @property
    def machine_type(self) -> str | None:
        """GKE's machine of one host, "ct5lp-hightpu-4t"; None outside TPU."""
        return self.chip.machine_type and self.chip.machine_type.replace("-4t", f"-{self.chips_per_host}t")


def parse(text: str) -> Topology:
    """The topology of a name.

    Args:
      text: `v5e:16x16`, `v5p:4x4x4`, any TPU with `*N` for N slices; Cloud's `v5litepod-256`, `v5p-512`, `v6e-64`;
        GPUs `h200:8x4` (eight on each of four nodes; `h200:8` one node); `cpu:8`, `cpu:2x2` likewise.
    Raises:
      UserError: an unknown chip, or a shape that is not offered; names the nearest.
    """
    found = re.fullmatch(r"([a-z0-9]+)([:-])(\d+(?:x\d+)*)(?:\*(\d+))?", text.strip().lower())
    if not found:
        name = re.split(r"[:\-*]", text.strip().lower())[0]
        kind = chip(name)
        raise UserError(f"topology: {text!r} has no shape; write it as {kind.name}:{_example(kind)}")
    name, mark, numbers, slices = found.groups()
    kind = chip(name)
    shape, slices = tuple(map(int, numbers.split("x"))), int(slices or 1)
    if slices < 1 or (slices > 1 and kind.platform != "tpu"):
        raise UserError(f"topology: {text!r}: only TPUs have slices, one or more; GPUs and CPUs have nodes (h200:8x4)")
    if kind.platform != "tpu":
        if mark == "-" or len(shape) > 2 or 0 in shape:
            raise UserError(f"topology: {text!r}: write devices a node x nodes, {kind.name}:{_example(kind)}")
        return Topology(kind, (*shape, 1)[:2])
    if mark == "-":
        shape = _named(kind, text, shape)
    if shape not in offered(kind):
        raise UserError(f"topology: {kind.name} has no slice {_x(shape)}{_near(kind, shape)}")
    return Topology(kind, shape, slices)


@functools.cache
def offered(kind: Chip) -> tuple[tuple[int, ...], ...]:
    """The slice shapes of a TPU, small ones first: Cloud's tables; from a 4x4x4 cube on, any whole cubes in order."""
    if kind.dimensions == 2:
        return _FLAT
    sides = range(4, 4 * 36, 4)
    cubes = [s for s in itertools.combinations_with_replacement(sides, 3) if math.prod(s) <= kind.pod]
    # Of shapes with equally many chips the most cubic one first: the one that Cloud's names mean.
    return (*_SMALL_CUBES, *sorted(cubes, key=lambda s: (math.prod(s), s[2] - s[0])))


def _named(kind: Chip, text: str, numbers: tuple[int, ...]) -> tuple[int, ...]:
    """The shape behind Cloud's `v5p-512`."""
    counts: dict[int, tuple[int, ...]] = {}
    for shape in offered(kind):
        counts.setdefault(math.prod(shape) * kind.cores_in_name, shape)
    if len(numbers) != 1 or numbers[0] not in counts:
        nearest = min(counts, key=lambda n: abs(math.log(n / max(numbers[0], 1))))
        raise UserError(f"topology: there is no {text!r}; did you mean {kind.accelerator_prefix}-{nearest}?")
    return counts[numbers[0]]


def _near(kind: Chip, shape: tuple[int, ...]) -> str:
    shapes = [s for s in offered(kind) if sorted(s) == sorted(shape)] or offered(kind)
    nearest = min(shapes, key=lambda s: abs(math.log(math.prod(s) / max(math.prod(shape), 1))))
    return f"; did you mean {kind.name}:{_x(nearest)}?"


def _example(kind: Chip) -> str:
    return "4x4x4" if kind.dimensions == 3 else _EXAMPLE[kind.platform]


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def devices(topology: Topology) -> list[jax.Device]:
    """The topology's devices, to build a mesh and compile for.

    TPU devices come from libtpu, which needs no TPU. For GPUs and CPUs they are this process's CPU devices, of which
    `jax_num_cpu_devices` must have made enough before JAX started; GPUs can be lowered for on them, not compiled.

    Raises:
      UserError: libtpu is missing or does not know the topology, or there are too few CPU devices.
    """
    if topology.chip.platform == "tpu":
        return _tpu_devices(topology)
    local = jax.devices("cpu")
    if len(local) < topology.chips:
        raise UserError(
            f"topology: {topology.name} needs {topology.chips} virtual CPU devices, there are {len(local)}; "
            f"set JAX_NUM_CPU_DEVICES={topology.chips}"
        )
    return local[: topology.chips]


def _tpu_devices(topology: Topology) -> list[jax.Device]:
    from jax.experimental import topologies

    kind, host = topology.chip, topology.chips_per_host
    bounds = {1: (1, 1, 1), 4: (2, 2, 1), 8: (2, 4, 1)}[host]
    options = {"chips_per_host_bounds": bounds}
    if kind.name == "v4":
        options["chip_config_name"] = "megacore"  # as v4 machines run: a chip is one device
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = ("tpu7x" if kind.name == "7x" else kind.name) + ":" + _x(topology.shape)
    try:
        with _no_tpu_here():
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except Exception as error:  # RuntimeError or JaxRuntimeError, by version and cause
        if "libtpu" in str(error).lower() and not _has_libtpu():
            raise UserError("topology: compiling for TPUs needs libtpu: pip install libtpu") from None
        raise UserError(f"topology: libtpu does not take {name}: {str(error).splitlines()[0]}") from None


def _has_libtpu() -> bool:
    import importlib.util

    return importlib.util.find_spec("libtpu") is not None


@contextlib.contextmanager
def _no_tpu_here():
    """Tells libtpu, while it loads, that it compiles for machines elsewhere, so that it asks no metadata server.

    The variables are taken back: child processes would find a TPU cluster in them.
    """
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    missing = [name for name in wanted if name not in os.environ]
    os.environ.update({name: wanted[name] for name in missing})
    try:
        yield
    finally:
        for name in missing:
            os.environ.pop(name, None)
