"""Initialisers of the published recipes that Flax has under no name of its own."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

# PyTorch's `kaiming_normal_(mode="fan_out", nonlinearity="relu")`.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def torch_linear(features: int, inputs: int, **kwargs) -> nn.Dense:
    """A dense layer initialised as PyTorch's `Linear`: weight and bias uniform within 1/sqrt(inputs)."""
    return nn.Dense(features, kernel_init=torch_bias(inputs), bias_init=torch_bias(inputs), **kwargs)


def torch_bias(inputs: int) -> Callable:
    """PyTorch's initialiser of a layer's bias: uniform within 1/sqrt(inputs), its fan-in."""
    return functools.partial(_uniform, bound=inputs**-0.5)


def _uniform(key, shape, dtype=jnp.float32, *, bound: float):
    return nn.initializers.uniform(2 * bound)(key, shape, dtype) - jnp.asarray(bound, dtype)
