"""Checkpoints of other code bases in and out: published files to variables of our networks, and back.

`load_official` reads a file under the names of any dialect a family knows, or one of our own (`save_variables`), and
gives variables that fit the named network exactly, or says which names do not.
"""

import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from research import backbones
from research.layers.patch_embed import grid, pair
from research.port import names, resample, tensors

# Modules that training code hangs onto a network it saves: the losses of VanillaKD's hint runs.
EXTRAS = (r"^kd_loss_fn\.",)
COLLECTIONS = ("params", "batch_stats")

Size = int | tuple[int, int]


class Official(NamedTuple):
    """What a file holds: a state dict under official names, the rules of its dialect, whether the file was our own."""

    state: dict[str, np.ndarray]
    rules: names.Rules
    ours: bool = False


class Network(NamedTuple):
    """A network and the shapes of its variables, with a classifier (`full`) and without (`bare`)."""

    model: nn.Module
    size: tuple[int, int]
    full: dict
    bare: dict

    def head(self, rules: names.Rules) -> set[str]:
        """Official names of the classifier."""
        return set(names.table(self.full, rules)) - set(names.table(self.bare, rules))


def network(model_name: str, num_classes: int | None = None, image_size: Size | None = None) -> Network:
    """Network `model_name` with what is asked for in place of the published values; nothing is computed."""
    model = backbones.create(model_name, **({} if num_classes is None else {"num_classes": num_classes}))
    size = pair(image_size or backbones.input_spec(model_name).size)
    model = model.clone(img_size=size) if hasattr(model, "img_size") else model
    image = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    full, bare = (
        jax.eval_shape(lambda x, m=m: m.init(jax.random.key(0), x), image)
        for m in (model.clone(num_classes=model.num_classes or 1), model.clone(num_classes=0))
    )
    return Network(model, size, full, bare)


def load_official(
    model_name: str,
    path: str | os.PathLike,
    *,
    num_classes: int | None = None,
    image_size: Size | None = None,
    dialect: str | None = None,
    new_head: int | None = None,
) -> dict:
    """Variables of network `model_name` from a published checkpoint or a file of `save_variables`.

    Args:
      path: a `.safetensors` file, or one of PyTorch's (needs the `torch` extra); see `research.port.tensors.read`.
      num_classes: classes of the network; the published number by default, 0 for none, which leaves the file's
        classifier out.
      image_size: side of the images the network will see, or (height, width), where its parameters depend on it:
        learned positions are resampled.
      dialect: whose names the file uses, a key of the family's `NAMES`; by default whichever fits best.
      new_head: seed of a freshly initialised classifier, used instead of the file's.
    Returns:
      Variables (`params`, `batch_stats` where there are some) of float32 NumPy arrays.
    Raises:
      FileNotFoundError: no such file.
      ValueError: the file cannot be read, is of another network, or has another number of classes.
    """
    file = read(model_name, path, dialect)
    try:
        return fill(model_name, file, num_classes=num_classes, image_size=image_size, new_head=new_head)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fill(
    model_name: str,
    file: Official,
    *,
    num_classes: int | None = None,
    image_size: Size | None = None,
    new_head: int | None = None,
) -> dict:
    """Variables of network `model_name` from what `read` gave; see `load_official`."""
    net, (state, rules, _) = network(model_name, num_classes, image_size), file
    head, wanted = net.head(rules), net.model.num_classes
    found = class_count(state, head)
    fresh = new_head is not None and wanted > 0
    if fresh or wanted == 0:
        state = {name: array for name, array in state.items() if name not in head}
    elif found not in (0, wanted):
        raise ValueError(
            f"the file's classifier has {found} classes, {model_name} is to have {wanted}: pass num_classes={found}, "
            "or new_head=0 for a freshly initialised classifier"
        )
    tree = net.bare if fresh or wanted == 0 else net.full
    state = _resampled(state, tree, rules, net.model)
    if difference := names.difference(tree, state, rules):
        raise ValueError(f"no checkpoint of {model_name}: {difference}")
    variables = jax.tree.map(lambda x: np.asarray(x, np.float32), names.from_official(tree, state, rules))
    return _with_new_head(variables, net, new_head) if fresh else variables


def read(model_name: str, path: str | os.PathLike, dialect: str | None = None) -> Official:
    """What a file holds for network `model_name`, whatever form it has; see `load_official`."""
    family, state = backbones.family(model_name), tensors.read(path)
    if own(state):
        rules = next(iter(family.NAMES.values()))
        return Official(names.to_official(traverse_util.unflatten_dict(state, sep="/"), rules), rules, ours=True)
    if dialect is None:
        tree = network(model_name).full
        fit = {key: len(set(names.table(tree, rules)) & set(state)) for key, rules in family.NAMES.items()}
        dialect = max(fit, key=fit.get)
    state = names.drop_ignored(state, (*EXTRAS, *getattr(family, "IGNORED", ())))
    return Official(state, _rules(family, dialect))


def class_count(state: Mapping[str, np.ndarray], head: set[str]) -> int:
    """Number of classes of the classifier whose official names are `head`; 0 where the state has none."""
    return max((state[name].shape[0] for name in head if name in state), default=0)


def save_official(variables, model_name: str, path: str | os.PathLike, *, dialect: str | None = None) -> None:
    """Writes variables of network `model_name` as `.safetensors` under official names, in PyTorch layout.

    Raises:
      ValueError: the variables are not those of such a network.
    """
    family, net = backbones.family(model_name), network(model_name)
    rules = _rules(family, dialect or next(iter(family.NAMES)))
    state = names.to_official(_checked(variables), rules)
    wrong = sorted((set(names.table(net.bare, rules)) - set(state)) | (set(state) - set(names.table(net.full, rules))))
    if wrong:
        raise ValueError(f"the variables are not those of {model_name}: {', '.join(wrong[:5])} missing or left over")
    tensors.write(path, state, {"format": "pt"})


def save_variables(variables, path: str | os.PathLike) -> None:
    """Writes variables as `.safetensors` under our own paths, such as `params/layer1_0/conv1/kernel`."""
    flat = traverse_util.flatten_dict(_checked(variables), sep="/")
    tensors.write(path, {name: np.asarray(array) for name, array in flat.items()}, {"format": "stillroom"})


def load_variables(path: str | os.PathLike) -> dict:
    """Variables from a file of `save_variables`, as a tree of NumPy arrays.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file is of another kind.
    """
    state = tensors.read(path)
    if not own(state):
        raise ValueError(f"{path} holds official names ({next(iter(state), 'none')} ...): read it with load_official")
    return traverse_util.unflatten_dict(state, sep="/")


def own(state: Mapping[str, np.ndarray]) -> bool:
    """Whether a file's names are our own paths."""
    return bool(state) and all(name.startswith(tuple(f"{c}/" for c in COLLECTIONS)) for name in state)


def is_own(path: str | os.PathLike) -> bool:
    """Whether the file at `path` holds our own paths; the errors are those of `tensors.read`."""
    return own(tensors.read(path))


def _rules(family, dialect: str) -> names.Rules:
    if dialect not in family.NAMES:
        raise ValueError(f"dialect: {dialect!r} is none of {', '.join(family.NAMES)}")
    return family.NAMES[dialect]


def _checked(variables) -> dict:
    if "params" not in variables or set(variables) - set(COLLECTIONS):
        raise ValueError(f"variables hold {sorted(variables)}, expected params and, for batch norm, batch_stats")
    return dict(variables)


def _resampled(state: dict, tree: dict, rules: names.Rules, model: nn.Module) -> dict:
    """`state` with those learned positions resampled that differ in number from the ones in `tree`."""
    flat, state = traverse_util.flatten_dict(tree), dict(state)
    for name, path in names.table(tree, rules).items():
        shape = flat[path].shape
        if name not in state or not hasattr(model, "img_size"):
            continue
        if path[-1] == "pos_embed":  # a plain table (N, C) in CLIP's files
            state[name] = state[name].reshape(1, *state[name].shape[-2:])
        if state[name].shape == shape:
            continue
        cells = grid(model.img_size, model.patch_size)
        if path[-1] == "pos_embed":
            state[name] = resample.absolute(state[name], cells, shape[1] - cells[0] * cells[1])
        elif path[-1] == "relative_position_bias_table":
            state[name] = resample.relative(state[name], *resample.window(shape[0], cells))
    return state


def _with_new_head(variables: dict, net: Network, seed: int) -> dict:
    flat, image = traverse_util.flatten_dict(variables), jnp.zeros((1, *net.size, 3))

    def head(key):
        drawn = traverse_util.flatten_dict(net.model.init(key, image))
        return {path: value for path, value in drawn.items() if path not in flat}

    # Compiled, so that the body's own draws are dropped as dead code.
    return traverse_util.unflatten_dict(flat | jax.tree.map(np.asarray, jax.jit(head)(jax.random.key(seed))))
