"""Depthwise convolutions as sums of shifted maps, against XLA's convolution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

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


@pytest.mark.parametrize("size, stride", [((5, 57), 1), ((14, 14), 1), ((33, 7), 2)])
def test_kernel_gradient_over_several_blocks_of_the_map(size, stride):
    x, kernel = arrays(7, False, size)
    y, pull = jax.vjp(lambda kernel: depthwise._convolution(stride, 3, x, kernel), kernel)
    found = jax.jit(depthwise._kernel_gradient, static_argnums=(2, 3, 4))(x, y, 7, stride, 3)
    np.testing.assert_allclose(found, pull(y)[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "changes, summed",
    [
        ({}, True),
        ({"strides": (2, 1)}, False),
        ({"padding": "SAME"}, False),
        ({"kernel_size": (1, 3)}, False),
        ({"kernel_dilation": 2}, False),
        ({"features": 6}, False),
        ({"feature_group_count": 1}, False),
    ],
    ids=str,
)
def test_as_the_convolution_of_a_flax_layer(changes, summed, monkeypatch):
    used, own = [], depthwise.depthwise_conv
    monkeypatch.setattr(depthwise, "depthwise_conv", lambda *a: used.append(1) or own(*a))
    x, _ = arrays(3, False)
    options = {"features": 3, "kernel_size": (3, 3), "padding": 1, "feature_group_count": 3, "strides": 2, **changes}
    ours, flax = nn.Conv(**options, conv_general_dilated=depthwise.conv), nn.Conv(**options)
    variables = flax.init(jax.random.PRNGKey(0), x)
    np.testing.assert_allclose(ours.apply(variables, x), flax.apply(variables, x), rtol=1e-5, atol=1e-5)
    assert bool(used) == summed


def test_narrow_floats_are_summed_in_float32():
    x, kernel = arrays(5, False)
    narrow = [a.astype(jnp.bfloat16) for a in (x, kernel)]
    found, exact = (jax.jit(depthwise.depthwise_conv, static_argnums=(2, 3))(*a, 1, 2) for a in (narrow, (x, kernel)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, atol=0.02 * float(jnp.max(jnp.abs(exact))))
