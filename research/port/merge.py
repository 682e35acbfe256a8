"""Trained weights in the form that is deployed, for the families that have one.

A VanillaNet's pairs of convolutions and their norms become single convolutions, which `<variant>_deploy` loads. The
latent kernels of a BiMLP become their quantised values: the same variant loads them and computes the same.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np

from research import backbones

SUFFIX = "_deploy"


def _vanillanet(module, variables: Mapping) -> dict:
    return module.merge(variables)


def _bimlp(module, variables: Mapping) -> dict:
    return {**variables, "params": module.freeze(variables["params"])}


FORMS: dict[str, Callable] = {"vanillanet": _vanillanet, "bimlp": _bimlp}


def target(model_name: str) -> str:
    """The variant that loads the deployed form of `model_name`.

    Raises:
      ValueError: its family has no such form, or it is that form already.
    """
    family = _family(model_name)
    if family not in FORMS:
        raise ValueError(f"{model_name} is deployed as it is trained: only {' and '.join(FORMS)} can be merged")
    if model_name.endswith(SUFFIX):
        raise ValueError(f"{model_name} is the merged form: name the trained one, {model_name.removesuffix(SUFFIX)}")
    deployed = model_name + SUFFIX
    return deployed if deployed in backbones.family(model_name).VARIANTS else model_name


def merged(model_name: str, variables: Mapping) -> dict:
    """Variables of `target(model_name)`, float32 NumPy arrays, that compute what `variables` of `model_name` compute.

    Raises:
      ValueError: as `target`, or the variables are not those of the trained form.
    """
    target(model_name)
    found = FORMS[_family(model_name)](backbones.family(model_name), variables)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), found)


def _family(model_name: str) -> str:
    return backbones.family(model_name).__name__.rpartition(".")[2]
