"""Where arrays live: a device mesh and rules on parameter paths, both plain data from the config.

A rule is `(regex, strategy)`; the first whose regex is found in the slash path of a leaf of the state decides. As the
optimiser's moments and the moving averages repeat the parameter paths, the same rules place them. Strategies:

    replicate          every device holds the array
    fsdp               the largest dimension that divides is split over the `fsdp` axis
    tensor:D           dimension D is split over the `tensor` axis
    fsdp+tensor:D      both, on different dimensions

Batches are split over `data` and `fsdp` together. Leaves that no rule matches, and those whose dimensions do not
divide, are replicated and reported.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

LOG = logging.getLogger(__name__)

AXES = ("data", "fsdp", "tensor")
STRATEGY = re.compile(r"replicate|fsdp|(fsdp\+)?tensor:-?\d+")


def mesh(axes: Mapping[str, int], devices: Sequence | None = None) -> jax.sharding.Mesh:
    """A mesh with axes data, fsdp, tensor of the given sizes; one size may be -1 (what is left).

    Several slices are joined along `data`.

    Raises:
      ValueError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = set(axes) - set(AXES)
    if unknown:
        raise ValueError(f"parallel.axes: unknown axis {sorted(unknown)[0]!r}; there are {', '.join(AXES)}")
    sizes = [axes.get(name, 1) for name in AXES]
    if -1 in sizes:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = max(len(devices) // rest, 1)
    if math.prod(sizes) != len(devices):
        asked = ", ".join(f"{n}={s}" for n, s in zip(AXES, sizes, strict=True))
        raise ValueError(f"parallel.axes: {asked} needs {math.prod(sizes)} devices, there are {len(devices)}")
    return jax.sharding.Mesh(_laid_out(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(sizes: Sequence[int], devices: Sequence) -> np.ndarray:
    """The devices as an array of the mesh's shape, neighbours on the fast network beside each other.

    Slices (of a TPU pod, or GPU nodes that no NVLink joins) lie along `data`: the traffic of `fsdp` and `tensor` stays
    inside one, and only the mean of gradients crosses between them.
    """
    count = len({getattr(device, "slice_index", None) for device in devices})
    split = devices[0].platform == "tpu"  # a mesh axis may take several or part of a torus dimension
    if count == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=split)
    data, *rest = sizes
    if data % count == 0:
        inner, outer = (data // count, *rest), (count, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=split)
    LOG.warning("sharding: axis data=%d does not divide by the %d slices, so fsdp or tensor cross them", data, count)
    ordered = sorted(devices, key=lambda device: (device.slice_index, device.id))
    return np.array(ordered, dtype=object).reshape(sizes)


def around(rows: int) -> jax.sharding.AbstractMesh | None:
    """The mesh in whose context a function is traced, for ops that map a batch of so many rows over it themselves.

    It comes from `jax.set_mesh`. None without one, inside of `shard_map` and `pmap`, and where it does not divide the
    rows.
    """
    found = jax.sharding.get_abstract_mesh()
    if found.empty or not set(AXES) <= set(found.axis_names) or set(found.axis_types) != {AxisType.Auto}:
        return None
    return None if rows % (found.shape["data"] * found.shape["fsdp"]) else found


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Splits the leading axis over all data-like axes."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Every device holds the array."""
    return NamedSharding(mesh, PartitionSpec())


def stacked(mesh: jax.sharding.Mesh) -> NamedSharding:
    """One leading entry a data-parallel device: the layout of `pmap`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def paths(tree) -> list[tuple[str, object]]:
    """The leaves of a pytree with their slash paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


def _spec(shape, strategy: str, sizes: Mapping[str, int], smallest: int) -> PartitionSpec | None:
    """The partition of one array; None if a wanted axis divides no dimension."""
    axes: list[str | None] = [None] * len(shape)
    wanted = strategy.split("+")
    for part in reversed(wanted):  # tensor first: it names its dimension
        if part.startswith("tensor:"):
            dim = int(part.split(":")[1]) % max(len(shape), 1)
            if not shape or shape[dim] % sizes["tensor"]:
                return None
            axes[dim] = "tensor"
        elif part == "fsdp" and sizes["fsdp"] > 1:
            if math.prod(shape) < smallest:  # a gather costs more than the memory it saves
                continue
            free = [d for d in range(len(shape)) if axes[d] is None and shape[d] % sizes["fsdp"] == 0]
            if not free:
                return None
            axes[max(free, key=lambda d: shape[d])] = "fsdp"
    return PartitionSpec(*axes)


def shardings(shapes, mesh: jax.sharding.Mesh, rules: Sequence[Sequence[str]], *, smallest: int = 2**12):
    """The NamedSharding of every leaf of a state.

    Args:
      shapes: pytree of arrays or ShapeDtypeStructs.
      mesh: from `mesh`.
      rules: ordered (regex, strategy) pairs.
      smallest: arrays of fewer elements stay whole under fsdp.
    Raises:
      ValueError: an unknown strategy.
    """
    for regex, strategy in rules:
        if not STRATEGY.fullmatch(strategy):
            raise ValueError(
                f"parallel.rules: unknown strategy {strategy!r} for {regex!r}; "
                "there are replicate, fsdp, tensor:D, fsdp+tensor:D"
            )
    sizes = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    placed = []
    for path, leaf in paths(shapes):
        strategy = next((s for regex, s in rules if re.search(regex, path)), None)
        spec = _spec(leaf.shape, strategy or "replicate", sizes, smallest)
        if strategy is None and rules and np.ndim(leaf):
            LOG.info("sharding: no rule matches %s %s, replicated", path, leaf.shape)
        if spec is None:
            LOG.info("sharding: %s %s does not divide under %r, replicated", path, leaf.shape, strategy)
        placed.append(NamedSharding(mesh, spec or PartitionSpec()))
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)


def placed_shapes(shapes, placed):
    """The tree of ShapeDtypeStructs with its tree of shardings put in."""
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
