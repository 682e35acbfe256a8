"""Language models in Hugging Face's form, in and out: a folder of `config.json` and weights.

Weights are `model.safetensors`, or shards that `model.safetensors.index.json` lists; PyTorch's `pytorch_model.bin` and
its shards are read too, with the `torch` extra.
"""

import json
import os
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from research import language
from research.core import storage
from research.language import bert, llama, opt, t5
from research.port import names, tensors

MODEL_TYPES = {"llama": llama, "opt": opt, "bert": bert, "roberta": bert, "t5": t5}
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SHARD_BYTES = 5 * 10**9


class Pretrained(NamedTuple):
    """A model, its variables (NumPy arrays), and the config it came with (special tokens are there)."""

    model: nn.Module
    variables: dict
    config: dict


def load(folder: str | os.PathLike, *, param_dtype=jnp.float32, new_head: int | None = None, **overrides) -> Pretrained:
    """The language model in `folder`.

    Args:
      param_dtype: of the parameters; None keeps the file's.
      new_head: seed of a freshly initialised head (BERT, RoBERTa), used instead of the file's.
      **overrides: of the model's fields, such as `dtype=jnp.bfloat16`, `head="classify"` or `num_labels=3`.
    Raises:
      FileNotFoundError: no such folder, config or weights.
      ValueError: a model type that is not known, or weights that do not fit the config.
    """
    root = storage.folder(folder)
    config = read_json(root / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise ValueError(f"{root / 'config.json'}: model_type {config.get('model_type')!r} is none of {known}")
    family = MODEL_TYPES[config["model_type"]]
    try:
        model = family.from_config(config, **overrides)
        variables = from_state(model, read(root), new_head)
    except ValueError as error:
        raise ValueError(f"{root}: {error}") from None
    cast = lambda x: np.asarray(x, param_dtype or x.dtype)
    return Pretrained(model, jax.tree.map(cast, variables), config)


def read(folder: str | os.PathLike) -> dict[str, np.ndarray]:
    """Official name -> array of all the weights in `folder`, whole or in shards."""
    root = storage.folder(folder)
    for name in WEIGHTS:
        index = root / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            return {key: array for shard in shards for key, array in tensors.read(root / shard).items()}
        if (root / name).is_file():
            return tensors.read(root / name)
    raise FileNotFoundError(f"no weights in {root}: neither {' nor '.join(WEIGHTS)}, whole or with an index of shards")


def from_state(model: nn.Module, state: Mapping[str, np.ndarray], new_head: int | None = None) -> dict:
    """Variables of `model` from an official state dict, with or without what it repeats and the model's prefix.

    Raises:
      ValueError: names are missing, left over or of another shape; the text lists them.
    """
    family, shapes, rules = language.family_of(model), language.shapes(model), rules_of(model)
    wanted = names.table(shapes, rules)
    prefixes = sorted({name.split(".")[0] + "." for name in wanted})
    for pattern, replacement in getattr(family, "RENAMED", ()):
        state = {re.sub(pattern, replacement, name): array for name, array in state.items()}
    state = {_prefixed(name, wanted, prefixes): array for name, array in state.items()}
    for alias, own in family.aliases(model).items():
        if alias in state:
            state.setdefault(own, state[alias])
            del state[alias]
    heads = tuple(getattr(family, "HEAD_NAMES", ()))
    if new_head is not None:
        state = {name: array for name, array in state.items() if not _any(heads[:1], name)}
    ignored = (*family.IGNORED, *heads)
    state = {name: array for name, array in state.items() if name in wanted or not _any(ignored, name)}
    if new_head is not None:
        state |= _fresh(model, {name for name in wanted if name not in state and _any(heads, name)}, new_head)
    return names.from_official(shapes, state, rules)


def _fresh(model: nn.Module, wanted: set[str], seed: int) -> dict[str, np.ndarray]:
    draw = lambda: language.init(model, jax.random.key(seed))
    drawn = names.to_official(jax.tree.map(np.asarray, jax.jit(draw)()), rules_of(model))
    return {name: drawn[name] for name in wanted}


def save(
    folder: str | os.PathLike,
    model: nn.Module,
    variables,
    config: Mapping | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model` and its `variables` as Hugging Face's `from_pretrained` reads them: `save(folder, *pretrained)`.

    Args:
      config: what else to state in `config.json`, such as special tokens.
      shard_bytes: files grow no larger, but for single arrays that are.
    Raises:
      ValueError: the model has options a Hugging Face config cannot state.
    """
    root, family = storage.folder(folder), language.family_of(model)
    stated = {**(config or {}), **family.to_config(model)}
    if family.from_config(stated, dtype=model.dtype) != model:
        raise ValueError(f"no config.json of Hugging Face can state this model: {model}")
    shards = _shards(names.to_official(variables, rules_of(model)), shard_bytes)
    files = {"model.safetensors": shards[0]}
    if len(shards) > 1:
        files = {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}
        size = sum(array.nbytes for shard in shards for array in shard.values())
        index = {"metadata": {"total_size": size}, "weight_map": {k: file for file, s in files.items() for k in s}}
        storage.write(root / "model.safetensors.index.json", json.dumps(index, indent=2))
    for name, shard in files.items():
        tensors.write(root / name, shard, {"format": "pt"})
    storage.write(root / "config.json", json.dumps(stated, indent=2))


def _shards(state: Mapping[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    shards, size = [{}], 0
    for name, array in state.items():
        if shards[-1] and size + array.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name], size = array, size + array.nbytes
    return shards


def rules_of(model: nn.Module) -> names.Rules:
    """The rules of official names for `model`."""
    rules = language.family_of(model).NAMES
    return rules["roberta" if getattr(model, "roberta", False) else next(iter(rules))]


def _prefixed(name: str, wanted: Mapping, prefixes: list[str]) -> str:
    """`name`, or with a prefix that makes it one of `wanted`: files of a bare model have none."""
    return name if name in wanted else next((p + name for p in prefixes if p + name in wanted), name)


def _any(patterns, name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def read_json(path: storage.Path) -> dict:
    """The object in a JSON file of a model's folder.

    Raises:
      FileNotFoundError: no such file; ValueError: no intact one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no intact JSON file ({error}): fetch it again") from None
