"""What a function costs: parameters, multiply-adds, FLOPs, bytes and memory, whole or by layer.

Two kinds of count. `macs`, `operations` and `by_layer` read the jaxpr and count multiply-adds of matrix products and
convolutions: the convention of the papers' tables, independent of compiler and device. `compiled_cost` asks XLA what
the compiled program does on its device.
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from research.core.peaks import mfu, peak_bandwidth, peak_flops

__all__ = [
    "Cost",
    "Layer",
    "Operations",
    "binary_scope",
    "by_layer",
    "compiled_cost",
    "cost_of",
    "macs",
    "mfu",
    "model_flops",
    "operations",
    "params_count",
    "peak_bandwidth",
    "peak_flops",
]


_BINARY = "binary_operands"


class Cost(NamedTuple):
    """What XLA states of one compiled program, on one device.

    `flops` counts every arithmetic operation (two a multiply-add); `bytes_accessed` is memory traffic; the rest are
    bytes of memory: arguments, outputs, temporaries, and all of them together (donated buffers counted once).
    """

    flops: float
    bytes_accessed: float
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int
    peak_bytes: int


class Layer(NamedTuple):
    """One row of `by_layer`: a module path (`stage1/block0`), parameters, multiply-adds, and how many are binary."""

    path: str
    params: int
    macs: int
    binary: int = 0


class Operations(NamedTuple):
    """Multiply-adds by the kind of their operands; a processor does 64 of one bit in the time of a real one."""

    binary: int
    real: int

    @property
    def total(self) -> float:
        """OPs, `binary / 64 + real`, the measure of binary networks (Liu et al. 2018, Bi-Real Net, section 4.4)."""
        return self.binary / 64 + self.real


def params_count(tree) -> int:
    """Number of entries in all leaves of a pytree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def macs(fn: Callable, *args, **kwargs) -> int:
    """Multiply-adds of all matrix products and convolutions of one call `fn(*args, **kwargs)`.

    A convolution counts output positions x kernel positions x input channels of a group, padding included; a
    transposed one counts from its input positions. Loops count every iteration, a conditional its most expensive
    branch, a Pallas kernel every grid step, a `shard_map` all its devices. What is computed again in a backward pass
    (rematerialisation) counts again there.

    Args:
      fn: a traceable function.
      *args, **kwargs: its arguments; arrays may be given as `jax.ShapeDtypeStruct`, and what is no array
        (`train=False`) is passed as it is. Nothing is computed.
    Raises:
      ValueError: a product inside a loop with an unknown number of iterations.
    """
    return sum(count for _, count in _products(_trace(fn, args, kwargs)))


def binary_scope(binary: bool = True):
    """A context in which a layer traces its products of one-bit operands, so that `operations` knows them."""
    return jax.named_scope(_BINARY) if binary else contextlib.nullcontext()


def operations(fn: Callable, *args, **kwargs) -> Operations:
    """What `macs` counts, split into products traced in a `binary_scope` and others; arguments and errors as there."""
    counts = [0, 0]
    for scope, count in _products(_trace(fn, args, kwargs)):
        counts[_BINARY not in scope] += count
    return Operations(*counts)


def by_layer(module, *args, depth: int | None = None, **kwargs) -> list[Layer]:
    """Parameters and multiply-adds of a Flax module's layers, for the call `module.apply(variables, *args, **kwargs)`.

    Args:
      module: a linen module.
      *args, **kwargs: arguments of its `__call__`; arrays may be shapes.
      depth: levels of nesting kept apart; deeper layers are summed into their parents. None keeps all.
    Returns:
      Rows in order of execution that add up to the whole; what the module computes itself is in the row "".
    """
    variables = {}

    def call(*args, **kwargs):
        variables.update(jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)))
        return module.apply(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables), *args, **kwargs)

    jaxpr = _trace(call, args, kwargs)
    paths = [tuple(str(k.key) for k in path[1:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    modules = {path[:n] for path in paths for n in range(len(path) + 1)} | {()}
    rows: dict[str, list[int]] = {}

    def row(scope):
        path = ()
        for name in scope:  # scopes of functions, and of modules without variables, count for their parents
            path += (name,) if (*path, name) in modules else ()
        return rows.setdefault("/".join(path[:depth]), [0, 0, 0])

    for scope, count in _products(jaxpr):
        counts = row(scope[1:])  # the outermost scope is the module itself
        counts[1] += count
        counts[2] += count * (_BINARY in scope)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {})):
        row(str(k.key) for k in path[:-1])[0] += math.prod(leaf.shape)
    return [Layer(path, *counts) for path, counts in rows.items()]


def compiled_cost(fn: Callable, *args, **kwargs) -> Cost:
    """XLA's own account of `fn(*args, **kwargs)`, compiled for where its arguments live.

    Args:
      fn: a function, jitted or not; a jitted one keeps its shardings and donations.
      *args, **kwargs: its arguments; arrays may be `jax.ShapeDtypeStruct` (with shardings, for a mesh).
    """
    jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
    return cost_of(jitted.lower(*args, **kwargs).compile())


def cost_of(compiled) -> Cost:
    """The `Cost` of an already compiled program (`jax.stages.Compiled`)."""
    analysis, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
    total = sum(sizes) - memory.alias_size_in_bytes
    return Cost(float(analysis.get("flops", 0)), float(analysis.get("bytes accessed", 0)), *sizes, total)


def _trace(fn: Callable, args, kwargs):
    """The jaxpr of `fn(*args, **kwargs)`, traced in those leaves that are arrays or shapes."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def call(*values):
        filled = [*leaves]
        for i, value in zip(arrays, values, strict=True):
            filled[i] = value
        args, kwargs = jax.tree.unflatten(structure, filled)
        return fn(*args, **kwargs)

    return jax.make_jaxpr(call)(*(leaves[i] for i in arrays)).jaxpr


def _products(jaxpr, outer: tuple[str, ...] = ()):
    """Yields (module scope, multiply-adds) of each product of a jaxpr, repeated ones multiplied out."""
    for eqn in jaxpr.eqns:
        stack = eqn.source_info.name_stack.stack
        # Transformations (jvp, vmap) nest in the same stack; a scope may carry its method's name after a dot.
        scope = outer + tuple(s.name.split(".")[0] for s in stack if type(s).__name__ == "Scope")
        kind = eqn.primitive.name
        if kind in _COUNTS:
            yield scope, _COUNTS[kind](eqn)
        elif kind == "cond":
            branches = [list(_products(_open(branch), scope)) for branch in eqn.params["branches"]]
            yield from max(branches, key=lambda found: sum(count for _, count in found))
        else:
            times = _repeats(eqn)
            for inner in _inner(eqn):
                for where, count in _products(inner, scope):
                    if times is None and count:
                        raise ValueError(
                            f"cannot count the products of a while loop in {'/'.join(where) or 'the function'}: its "
                            "number of iterations is unknown; use jax.lax.scan or a fori_loop with constant bounds"
                        )
                    yield where, count * (times or 0)


def _repeats(eqn) -> int | None:
    """How often an equation runs its inner jaxprs; None where that depends on data."""
    match eqn.primitive.name:
        case "scan":
            return eqn.params["length"]
        case "while":
            return None
        case "pallas_call":
            return math.prod(eqn.params["grid_mapping"].grid)
        case "shard_map":
            return math.prod(eqn.params["mesh"].shape[axis] for axis in eqn.params["newly_manual_axes"])
        case _:
            return 1


def _inner(eqn):
    """The jaxprs among an equation's parameters, alone or in a list."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if isinstance(item, jex.ClosedJaxpr | jex.Jaxpr):
                yield _open(item)


def _open(jaxpr):
    return jaxpr.jaxpr if isinstance(jaxpr, jex.ClosedJaxpr) else jaxpr


def _dot(eqn) -> int:
    (contract, _), _ = eqn.params["dimension_numbers"]
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contract)


def _ragged_dot(eqn) -> int:
    (contract, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    return math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[d] for d in contract)


def _conv(eqn) -> int:
    numbers = eqn.params["dimension_numbers"]
    lhs, rhs, out = (v.aval.shape for v in (*eqn.invars, *eqn.outvars))
    total = out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
    spatial = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    for (i, k, o), dilation in zip(spatial, eqn.params["lhs_dilation"], strict=True):
        # A dilated input is mostly zeros: each true entry meets each kernel (or, in a gradient, output) entry once.
        total *= out[o] * rhs[k] if dilation == 1 else lhs[i] * min(rhs[k], out[o])
    return total


_COUNTS = {"dot_general": _dot, "ragged_dot_general": _ragged_dot, "conv_general_dilated": _conv}


def model_flops(costs: Mapping[str, Mapping[str, int]], *, train: bool) -> int:
    """FLOPs that the mathematics of one example needs, by `Experiment.costs()`.

    6 a multiply-add where a network is trained, forward and backward; 2 in evaluation and of networks marked `frozen`.
    """
    return sum(cost["macs"] * (6 if train and not cost.get("frozen") else 2) for cost in costs.values())
