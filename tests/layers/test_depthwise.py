"""Depthwise convolutions as sums of shifted maps, against XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.cost import macs
from research.layers import depthwise


def arrays(side, per_example, size=(9, 8)):
    rng = np.random.default_rng(side)
    shape = ((2,) if per_example else ()) + (side, side, 3)
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return draw((2, *size, 3)), draw(shape)


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("side, stride, padding", [(3, 1, 1), (3, 2, 1), (5, 2, 2), (3, 1, 0), (2, 3, 0)])
def test_values_and_gradients_are_those_of_the_convolution(side, stride, padding, per_example):
    x, kernel = arrays(side, per_example)

    def gradient(form):
        call = lambda x, kernel: form(stride, padding, x, kernel)
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(call(*a))), argnums=(0, 1)))(x, kernel)

    expected, found = gradient(depthwise._convolution), gradient(depthwise._sum)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize("per_example", [False, True])
def test_the_public_function_on_this_device(per_example):
    x, kernel = arrays(3, per_example)
    found = jax.jit(depthwise.depthwise_conv, static_argnums=(2, 3))(x, kernel, 2, 1)
    np.testing.assert_allclose(found, depthwise._convolution(2, 1, x, kernel), rtol=1e-5, atol=1e-5)
    assert macs(lambda x, kernel: depthwise.depthwise_conv(x, kernel, 2, 1), x, kernel) == 2 * 5 * 4 * 3 * 9


def test_narrow_floats_are_summed_in_float32():
    x, kernel = arrays(5, False)
    narrow = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    found, exact = (jax.jit(depthwise.depthwise_conv, static_argnums=(2, 3))(*a, 1, 2) for a in (narrow, (x, kernel)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02 * float(jnp.max(jnp.abs(exact))))
