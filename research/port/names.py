"""Official parameter names: the map between our variables and a PyTorch state dict, computed from the shapes tree.

Every one of our leaves has exactly one official name. It is the dotted path of the leaf with its last part renamed the
PyTorch way (`kernel` and `scale` are `weight`, the running `mean` and `var` are `running_mean` and `running_var`), then
rewritten by the family's rules: `(regex, replacement)` pairs applied in order with `re.sub`. A rule may carry a third
entry, a function of shapes, where the official leaf has axes of length 1 which the plain layout has not:
`(r"grn\\.weight$", "grn.gamma", lambda shape: (1, 1, 1, *shape))`.

Layouts follow from the leaf's name and rank: a `kernel` (spatial..., in, out) is officially (out, in, spatial...);
everything else is stored as it is. Axes of length 1 may differ: they carry no order.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from flax import traverse_util

Rules = Sequence[tuple]
Reshape = Callable[[tuple[int, ...]], tuple[int, ...]]

LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# PyTorch counts batches in its batch norms; nothing computes with the number.
IGNORED = (r"(^|\.)num_batches_tracked$",)


def official(path: tuple[str, ...], rules: Rules) -> tuple[str, Reshape]:
    """Official name of the leaf at `path` (collection first), and what makes its plain shape the official one."""
    name, reshape = ".".join((*path[1:-1], LEAVES.get(path[-1], path[-1]))), tuple
    for pattern, replacement, *stated in rules:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            name, reshape = renamed, stated[0] if stated else reshape
    return name, reshape


def table(shapes, rules: Rules) -> dict[str, tuple[str, ...]]:
    """Official name -> our path, for every leaf of a variables tree (arrays or shapes).

    Raises:
      ValueError: two leaves would have the same official name, so the rules are not those of this model.
    """
    names: dict[str, tuple[str, ...]] = {}
    for path in traverse_util.flatten_dict(shapes):
        name, _ = official(path, rules)
        if name in names:
            raise ValueError(f"{'/'.join(names[name])} and {'/'.join(path)} both have the official name {name!r}")
        names[name] = path
    return names


def official_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Official shape of our leaf of `shape`: (spatial..., in, out) kernels become (out, in, spatial...)."""
    return (shape[-1], shape[-2], *shape[:-2]) if path[-1] == "kernel" and len(shape) > 1 else tuple(shape)


def _import(path, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    array = np.reshape(array, official_shape(path, shape))
    kernel = path[-1] == "kernel" and array.ndim > 1
    return np.transpose(array, (*range(2, array.ndim), 1, 0)) if kernel else array


def _export(path, array: np.ndarray, reshape: Reshape) -> np.ndarray:
    kernel = path[-1] == "kernel" and array.ndim > 1
    array = np.transpose(array, (array.ndim - 1, array.ndim - 2, *range(array.ndim - 2))) if kernel else array
    return np.asarray(array.reshape(reshape(array.shape)), order="C")


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _report(title: str, lines: list[str], limit: int = 20) -> str:
    shown = [f"    {line}" for line in lines[:limit]]
    more = [f"    ... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "\n".join([f"  {len(lines)} {title}:", *shown, *more])


def drop_ignored(state: Mapping[str, np.ndarray], ignore: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """`state` without the names that match a pattern of `ignore` or a counter of batches."""
    patterns = [re.compile(pattern) for pattern in (*IGNORED, *ignore)]
    return {name: array for name, array in state.items() if not any(p.search(name) for p in patterns)}


def difference(shapes, state: Mapping[str, np.ndarray], rules: Rules) -> str:
    """What keeps `state` from filling a tree of `shapes`: missing, unused and mis-shaped names, or "" if nothing does.

    The first line of the text counts them, the others list them.
    """
    names, flat = table(shapes, rules), traverse_util.flatten_dict(shapes)
    missing = sorted(set(names) - set(state))
    unused = sorted(set(state) - set(names))
    expected = {name: official_shape(path, flat[path].shape) for name, path in names.items()}
    wrong = [
        f"{name}: {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and _squeezed(state[name].shape) != _squeezed(shape)
    ]
    parts = {
        "missing (the model has them, the file has not)": [f"{name} {expected[name]}" for name in missing],
        "unused (the file has them, the model has not)": [f"{name} {tuple(state[name].shape)}" for name in unused],
        "of another shape": wrong,
    }
    if not any(parts.values()):
        return ""
    summary = f"{len(missing)} of {len(names)} names missing, {len(unused)} unused, {len(wrong)} of another shape"
    return "\n".join([summary, *(_report(title, lines) for title, lines in parts.items() if lines)])


def from_official(shapes, state: Mapping[str, np.ndarray], rules: Rules, *, ignore: Iterable[str] = ()) -> dict:
    """Our variables from an official state dict, one array for every leaf and no array left over.

    Args:
      shapes: variables tree of arrays or `jax.ShapeDtypeStruct`s, as `jax.eval_shape(model.init, ...)` gives it.
      state: official name -> array, in PyTorch layout. Dtypes are kept.
      rules: the family's rules for one dialect.
      ignore: regular expressions of official names that are not parameters (index buffers and the like).
    Returns:
      A tree like `shapes` of NumPy arrays.
    Raises:
      ValueError: names are missing, unused or of another shape; the text lists them all.
    """
    state = drop_ignored(state, ignore)
    if found := difference(shapes, state, rules):
        raise ValueError(f"the weights do not fit the model: {found}")
    flat = traverse_util.flatten_dict(shapes)
    return traverse_util.unflatten_dict(
        {path: _import(path, np.asarray(state[name]), flat[path].shape) for name, path in table(shapes, rules).items()}
    )


def to_official(variables, rules: Rules) -> dict[str, np.ndarray]:
    """The official state dict of our variables, in PyTorch layout: the inverse of `from_official`."""
    flat = traverse_util.flatten_dict(variables)
    return {
        name: _export(path, np.asarray(flat[path]), official(path, rules)[1])
        for name, path in table(variables, rules).items()
    }
