"""What `launch.compile` prints, as rich tables and as one JSON object."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from research.core import sharding
from research.core.experiment import State
from research.pods.chips import Topology
from research.pods.measure import Measured


def gib(size: float) -> str:
    """Bytes for people: "1.25 GiB", "3.4 MiB", "12 B"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} B"


def seconds(time: float) -> str:
    """Seconds for people: "12.3 ms"."""
    return f"{time:.2f} s" if time >= 1 else f"{1e3 * time:.2f} ms" if time >= 1e-3 else f"{1e6 * time:.1f} us"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def memory(found: Mapping[str, Measured]) -> Table:
    """Memory of one device by use: one column a step."""
    table = _table("Memory of one device", "", *found)
    names = list(dict.fromkeys(name for one in found.values() for name in one.memory))
    for name in names:
        table.add_row(name, *(gib(one.memory.get(name, 0)) for one in found.values()))
    table.add_section()
    table.add_row("peak", *(gib(one.peak) for one in found.values()))
    table.add_row("available", *(gib(one.limit) for one in found.values()))
    table.add_row("used", *(f"{one.peak / one.limit:.1%}" for one in found.values()))
    return table


def work(found: Mapping[str, Measured], summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """Work and the roofline of one device: one column a step."""
    known = {step: one for step, one in found.items() if one.times}
    table = _table("Work and time of one step", "", *known)
    rows = {
        "FLOPs of a device": lambda step, one: f"{one.flops / 1e9:.2f} G",
        "bytes of a device": lambda step, one: gib(one.bytes) + ("" if one.complete else " (unfused)"),
        "FLOPs a byte": lambda step, one: f"{one.intensity:.1f}",
        "compute": lambda step, one: seconds(one.times.compute),
        "memory": lambda step, one: seconds(one.times.memory),
        "network": lambda step, one: seconds(one.times.network),
        "compiler's cycles": lambda step, one: seconds(one.times.cycles) if one.times.cycles else "-",
        "bottleneck": lambda step, one: one.times.bottleneck,
        "step, at least": lambda step, one: seconds(one.times.seconds),
        "examples/s, at most": lambda step, one: f"{summaries[step]['examples_per_second']:,.0f}",
        "MFU, at most": lambda step, one: f"{summaries[step]['mfu']:.1%}",
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(step, one) for step, one in known.items()))
    return table


def traffic(step: str, one: Measured, most: int = 12) -> Table:
    """The collectives of a step."""
    table = _table(f"Collectives of the {step} step", "kind", "mesh axis", "over", "count", "payload", "time")
    for row in one.traffic[:most]:
        over = "slices" if row.network else "ICI/NVLink"
        table.add_row(row.kind, row.axis, over, str(row.count), gib(row.bytes), seconds(row.seconds))
    if not one.traffic:
        table.add_row("none", "", "", "", "", "")
    return table


def places(step: str, one: Measured, most: int = 8) -> Table:
    """Where the compiler expects the time to go."""
    table = _table(f"Operations of the {step} step, by the compiler's cycles", "place in the source", "share")
    for name, cycles in list(one.places.items())[:most]:
        table.add_row(name, f"{cycles / sum(one.places.values()):.1%}")
    return table


def largest(state: State, most: int = 8) -> Table:
    """The largest arrays of a state and how they are laid out."""
    table = _table("Largest arrays", "array", "dtype", "shape", "sharding", "on a device")
    rows = []
    for path, leaf in sharding.paths(state):
        shard = leaf.sharding.shard_shape(leaf.shape)
        size = leaf.dtype.itemsize
        for side in shard:
            size *= side
        rows.append((size, path, leaf))
    for size, path, leaf in sorted(rows, key=lambda row: -row[0])[:most]:
        axes = [str(axis or "-") for axis in leaf.sharding.spec]
        spec = "replicated" if set(axes) <= {"-"} else ",".join(axes)
        table.add_row(path, leaf.dtype.name, "x".join(map(str, leaf.shape)), spec, gib(size))
    return table


def comparison(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Two configs side by side, with the second over the first."""
    table = _table("Comparison of the train steps", "", *names, "ratio")
    rows = {
        "peak memory": ("peak_bytes", gib),
        "FLOPs of a device": ("flops", lambda x: f"{x / 1e9:.2f} G"),
        "bytes of a device": ("bytes", gib),
        "compute": ("compute_seconds", seconds),
        "memory": ("memory_seconds", seconds),
        "network": ("network_seconds", seconds),
        "step, at least": ("step_seconds", seconds),
        "examples/s, at most": ("examples_per_second", lambda x: f"{x:,.0f}"),
        "MFU, at most": ("mfu", lambda x: f"{x:.1%}"),
    }
    for name, (key, show) in rows.items():
        values = [one.get(key) for one in summaries]
        ratio = f"{values[1] / values[0]:.2f}" if all(values) else "-"
        table.add_row(name, *("-" if v is None else show(v) for v in values), ratio)
    return table


def page(topology: Topology, found: Mapping[str, Measured], summaries: Mapping[str, Mapping], state: State) -> Group:
    """All tables of one config."""
    parts: list[Any] = [memory(found)]
    if any(one.times for one in found.values()):
        parts.append(work(found, summaries))
    parts += [traffic(step, one) for step, one in found.items() if one.times]
    parts += [places(step, one) for step, one in found.items() if one.places]
    parts.append(largest(state))
    loops = sum(one.unknown_loops for one in found.values())
    if loops:
        parts.append(f"{loops} loops of a length that depends on data are counted as one iteration.")
    if not all(one.complete for one in found.values()):
        parts.append(
            f"{topology.chip.name}: lowered, not compiled (no compiler here). Activations and temporaries are not "
            "known: FITS speaks of the state alone, memory time of the state, network time of the gradients."
        )
    return Group(*parts)


def summary(one: Measured, examples: int, model_flops: float, topology: Topology) -> dict[str, Any]:
    """The numbers of one step as JSON holds them; times and rates are None where compilation failed.

    `examples` a step and `model_flops` (what the model's mathematics needs) are of all devices.
    """
    found: dict[str, Any] = {"fits": one.fits, "peak_bytes": one.peak, "hbm_bytes": one.limit, "memory": one.memory}
    found["examples"] = examples
    if one.times is None:
        return found | {"step_seconds": None, "mfu": None, "examples_per_second": None}
    times = one.times
    return found | {
        "step_seconds": times.seconds,
        "bottleneck": times.bottleneck,
        "compute_seconds": times.compute,
        "memory_seconds": times.memory,
        "network_seconds": times.network,
        "cycles_seconds": times.cycles,
        "examples_per_second": examples / times.seconds,
        "mfu": model_flops / (times.seconds * topology.chips * topology.chip.flops),
        "model_flops": model_flops,
        "flops": one.flops,
        "bytes": one.bytes,
        "collectives": [row._asdict() for row in one.traffic],
        "places": dict(list(one.places.items())[:20]),
        "unknown_loops": one.unknown_loops,
        "complete": one.complete,
    }
