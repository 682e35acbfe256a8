"""Runs an Experiment on devices: `jit` over a sharded mesh, or `pmap` over replicas, with equal results."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from research.core import scope, sharding
from research.core.experiment import Experiment, State


class Runner(NamedTuple):
    """An Experiment bound to devices.

    Attributes:
      init: key -> placed state, pretrained weights included.
      put: host batch (this process's rows) -> device batch.
      train_step: (state, batch) -> (state, metrics); the old state's buffers are donated.
      eval_step: (state, batch) -> metrics.
      canonical: placed state -> state of global arrays, the form of checkpoints.
      place: canonical state -> placed state.
      shapes: state of ShapeDtypeStructs with shardings: the canonical form to restore into.
      devices: number of devices the batch is split over.
    """

    init: Callable[[jax.Array], State]
    put: Callable[[dict], dict]
    train_step: Callable[[State, dict], tuple[State, dict]]
    eval_step: Callable[[State, dict], dict]
    canonical: Callable[[State], State]
    place: Callable[[State], State]
    shapes: State
    devices: int


def build(experiment: Experiment, *, mode: str = "jit", axes: Mapping[str, int] | None = None, rules=(), devices=None):
    """The Runner of a config's `parallel` section.

    Args:
      experiment: the three functions.
      mode: "jit" (any mesh) or "pmap" (data parallel only).
      axes: mesh axis sizes, see `sharding.mesh`.
      rules: (regex, strategy) pairs, see `sharding.shardings`.
      devices: defaults to all.
    """
    if mode == "jit":
        return _jit(experiment, sharding.mesh(axes or {"data": -1}, devices), rules)
    if mode == "pmap":
        if any(size not in (1, -1) for axis, size in (axes or {}).items() if axis != "data"):
            raise ValueError("parallel.mode='pmap' is data parallel only: set parallel.axes.fsdp and tensor to 1")
        return _pmap(experiment, jax.devices() if devices is None else list(devices))
    raise ValueError(f"parallel.mode: {mode!r} is neither 'jit' nor 'pmap'")


def _abstract(experiment: Experiment) -> State:
    return jax.eval_shape(experiment.init, jax.eval_shape(lambda: jax.random.PRNGKey(0)))


def _start(experiment: Experiment, placed) -> Callable[[jax.Array], State]:
    """key -> canonical state: what `init` makes, with the pretrained weights in place."""
    init = jax.jit(experiment.init, out_shardings=placed, compiler_options=_once(placed))

    def start(key):
        state = init(key)
        return state.replace(
            **{field: _replace(getattr(state, field), values, field) for field, values in experiment.weights().items()}
        )

    return start


def _once(placed) -> dict[str, int] | None:
    """Compiler options of a program that runs once.

    For CPUs every random draw is compiled by itself, which takes longer than to compile the training step; less
    optimised code of the same bits takes a third of it. A level that the user chose stays.
    """
    platforms = {device.platform for sharding in jax.tree.leaves(placed) for device in sharding.device_set}
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    return {"xla_backend_optimization_level": 1} if platforms == {"cpu"} and not chosen else None


def _replace(current, values, path: str):
    """`current` with the leaves that the nested dict `values` has, each where and of the dtype that it was."""
    if not isinstance(current, jax.Array):
        unknown = sorted(set(values) - set(current))
        if unknown:
            raise ValueError(f"pretrained {path}/{unknown[0]} has no place in the model")
        return {**current, **{name: _replace(current[name], new, f"{path}/{name}") for name, new in values.items()}}
    if np.shape(values) != current.shape:
        raise ValueError(f"pretrained {path} has shape {np.shape(values)}, the model wants {current.shape}")
    return jax.device_put(np.asarray(values, current.dtype), current.sharding)


def _check(batch: Mapping[str, Any], devices: int, processes: int) -> None:
    rows = len(next(iter(batch.values()))) * processes
    if rows % devices:
        raise ValueError(f"batch_size {rows} is not divisible by the {devices} devices it is split over")


def _jit(experiment: Experiment, mesh: jax.sharding.Mesh, rules: Sequence) -> Runner:
    shapes = _abstract(experiment)
    placed = sharding.shardings(shapes, mesh, rules)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(batch):
        _check(batch, devices, jax.process_count())
        return {k: jax.make_array_from_process_local_data(rows, np.asarray(v)) for k, v in batch.items()}

    return Runner(
        init=_start(experiment, placed),
        put=put,
        train_step=jax.jit(_within(mesh, experiment.train_step), donate_argnums=0, out_shardings=(placed, whole)),
        eval_step=jax.jit(_within(mesh, experiment.eval_step), out_shardings=whole),
        canonical=lambda state: state,
        place=lambda state: state,
        shapes=sharding.placed_shapes(shapes, placed),
        devices=devices,
    )


def _within(mesh: jax.sharding.Mesh, function: Callable) -> Callable:
    """`function` traced in the context of the mesh, for ops that look for one (`sharding.around`)."""

    @functools.wraps(function)
    def traced(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(state, batch)

    return traced


def _pmap(experiment: Experiment, devices: list) -> Runner:
    shapes = _abstract(experiment)
    mesh = sharding.mesh({"data": -1}, devices)
    whole, stacked = sharding.replicated(mesh), sharding.stacked(mesh)
    start = _start(experiment, whole)
    here = sum(d.process_index == jax.process_index() for d in devices)

    def mapped(function, reduce, **options):
        """`function` under pmap, its replicas' axis named while it is traced."""

        @functools.wraps(function)
        def traced(state, batch):
            with scope.batch_axis("replica"):
                return reduce(function(state, batch))

        return jax.pmap(traced, "replica", devices=devices, **options)

    train = mapped(experiment.train_step, lambda result: (result[0], scope.total(result[1])), donate_argnums=0)
    evaluate = mapped(experiment.eval_step, scope.total)

    def first(tree):
        """The first replica of every leaf."""
        shards = jax.tree.map(lambda x: x.addressable_shards[0].data, tree)
        return jax.tree.map(lambda x: x.reshape(x.shape[1:]), shards)

    def spread(array):
        return jax.make_array_from_process_local_data(stacked, array)

    def put(batch):
        _check(batch, len(devices), jax.process_count())
        return {k: spread(np.asarray(v).reshape(here, -1, *np.shape(v)[1:])) for k, v in batch.items()}

    def train_step(state, batch):
        state, metrics = train(state, batch)
        return state, first(metrics)

    def canonical(state):
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), first(state))

    def place(state):
        own = jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data), state)
        return jax.tree.map(lambda x: spread(np.broadcast_to(x, (here, *x.shape))), own)

    return Runner(
        init=lambda key: place(start(key)),
        put=put,
        train_step=train_step,
        eval_step=lambda state, batch: first(evaluate(state, batch)),
        canonical=canonical,
        place=place,
        shapes=sharding.placed_shapes(shapes, jax.tree.map(lambda _: whole, shapes)),
        devices=len(devices),
    )
