"""The dense layer's two forms are one function, and each platform gets the one that suits it."""

import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from research.layers.dense import Dense


def loss(layer):
    return lambda variables, x: jnp.sum(jnp.sin(layer.apply(variables, x)))


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_values_and_gradients_are_those_of_flax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    variables = jax.jit(Dense(7).init)(jax.random.key(1), x)
    gradient = lambda layer: jax.jit(jax.value_and_grad(loss(layer), argnums=(0, 1)))(variables, x)
    ours, flax = gradient(Dense(7)), gradient(nn.Dense(7))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, flax)


def test_forward_mode_and_vmap():
    x = jax.random.normal(jax.random.key(0), (4, 2, 3, 5))
    variables = jax.jit(Dense(7).init)(jax.random.key(1), x[0])

    def slopes(layer):
        tangent = lambda x: jax.jvp(lambda x: layer.apply(variables, x), (x,), (jnp.cos(x),))
        return jax.jit(jax.vmap(tangent))(x)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), slopes(Dense(7)), slopes(nn.Dense(7)))


def products(platform):
    """Operand and result types of the matrix products in a layer's gradient for the kernel, lowered for a platform."""
    x = jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)
    variables = jax.eval_shape(Dense(7).init, jax.random.key(0), x)
    program = jax.export.export(jax.jit(jax.grad(loss(Dense(7)))), platforms=[platform])(variables, x)
    return re.findall(r"dot_general.*: (\(.*) loc", program.mlir_module())


def test_only_the_cpu_joins_the_leading_axes():
    assert products("cpu") == [
        "(tensor<6x5xf32>, tensor<5x7xf32>) -> tensor<6x7xf32>",
        "(tensor<6x7xf32>, tensor<6x5xf32>) -> tensor<7x5xf32>",
    ]
    for platform in ("tpu", "cuda"):
        assert products(platform) == [
            "(tensor<2x3x5xf32>, tensor<5x7xf32>) -> tensor<2x3x7xf32>",
            "(tensor<2x3x7xf32>, tensor<2x3x5xf32>) -> tensor<7x5xf32>",
        ]
