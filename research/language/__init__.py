"""Language models by name: one file a family, each with a table `VARIANTS` of the published sizes.

A family module exposes

    VARIANTS: dict[str, dict]            variant -> constructor arguments
    build(**arguments) -> nn.Module      the module
    from_config(config, **overrides)     the module of a Hugging Face config, a dict; `to_config(model)` the inverse
    NAMES: dict[str, list]               rules between our parameter paths and official names (see research.port.names)
    IGNORED: tuple[str, ...]             patterns of official names that a model may leave in the file
    aliases(model) -> dict[str, str]     names under which a file repeats tied parameters -> their own names

and its modules are called as `logits, endpoints = model.apply(variables, tokens, ...)`.
"""

import importlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from research.core.catalogue import Catalogue

FAMILIES = ("llama", "opt", "bert", "t5")


_CATALOGUE = Catalogue(__name__, FAMILIES, "language model", "the README of research/language lists all")
variants, family, create = _CATALOGUE.variants, _CATALOGUE.family, _CATALOGUE.create


def family_of(model: nn.Module):
    """The family module that `model` is of."""
    return importlib.import_module(type(model).__module__)


def init(model: nn.Module, key: jax.Array) -> dict:
    """Fresh variables of `model`; under `jax.eval_shape` their shapes alone."""
    token = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, *[token] * (2 if hasattr(model, "encode") else 1))


def shapes(model: nn.Module) -> dict:
    """Shapes and dtypes of the variables of `model`; nothing is computed."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))
