"""Binary layers: values and straight-through derivatives against their definitions written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import cost
from research.layers import binary

X = np.array([-3.0, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5], np.float32)
VALUES = {
    "ternary": [-1, -1, -1, 0, 0, 0, 0, 0, 1, 1, 1],
    "sign": [-1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1],
    "bireal": [-1, -1, -1, -1, -1, 1, 1, 1, 1, 1, 1],
}
CLIP = [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]
SLOPES = {"ternary": CLIP, "sign": CLIP, "bireal": [0, 0, 0.5, 1, 1.5, 2, 1.5, 1, 0.5, 0, 0]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VALUES)
def test_activations_and_their_derivatives(name, dtype):
    function, x = binary.ACTIVATIONS[name], jnp.asarray(X, dtype)
    out, tangent = jax.jvp(function, (x,), (2 * jnp.ones_like(x),))
    assert out.dtype == tangent.dtype == x.dtype
    np.testing.assert_array_equal(out.astype(np.float32), VALUES[name])
    np.testing.assert_array_equal(tangent.astype(np.float32), 2 * np.array(SLOPES[name]))
    reverse = jax.jit(jax.grad(lambda x: jnp.sum(3 * function(x))))(x)
    np.testing.assert_array_equal(reverse.astype(np.float32), 3 * np.array(SLOPES[name]))


def test_a_weight_is_its_sign_times_the_mean_of_its_inputs():
    kernel = np.random.default_rng(0).normal(size=(1, 7, 2, 5)).astype(np.float32)
    kernel[0, 0, 0, 0] = 0
    expected = np.sign(kernel) * np.abs(kernel).mean(axis=2, keepdims=True)
    found, back = jax.vjp(binary.xnor, kernel)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(back(kernel)[0], kernel)  # the scale is not differentiated
    np.testing.assert_allclose(binary.xnor(found[..., 1:]), found[..., 1:], rtol=1e-6)


def test_a_depthwise_weight_keeps_its_value():
    kernel = np.random.default_rng(0).normal(size=(7, 1, 1, 5)).astype(np.float32)
    np.testing.assert_array_equal(binary.xnor(kernel), kernel)


def layer(shape, **fields):
    module, x = binary.BinaryConv(**fields), jnp.asarray(np.random.default_rng(1).normal(size=shape), np.float32)
    return module, module.init(jax.random.key(0), x), x


def test_a_product_is_one_of_bits_with_a_scale():
    """The packed form agrees: XOR, a count of ones, one scale an output."""
    module, variables, x = layer((2, 3, 3, 40), features=6, activation="sign")
    signs, scales = binary.signs_and_scales(variables["params"]["kernel"][0, 0])
    bits = lambda values: np.asarray(values) > 0
    wrong = np.sum(bits(x)[..., None] != bits(signs), axis=-2)
    packed = (40 - 2 * wrong) * np.asarray(scales)[0]
    np.testing.assert_allclose(module.apply(variables, x), packed, rtol=1e-5, atol=1e-6)


def test_borders_are_zeros_of_the_quantised_map():
    module, variables, x = layer((1, 1, 4, 1), features=1, kernel_size=(1, 7), activation="sign")
    kernel = np.asarray(variables["params"]["kernel"]).reshape(7)
    signs = np.where(np.asarray(x).ravel() >= 0, 1.0, -1.0)
    expected = [sum(signs[j] * kernel[j - i + 3] for j in range(4)) for i in range(4)]
    np.testing.assert_allclose(module.apply(variables, x).ravel(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [(1, 7, 2, 3), (7, 1, 1, 6), (3, 5, 3, 2)])
def test_both_ways_to_convolve_groups_agree(kernel):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 4, 5, 6)).astype(np.float32), rng.normal(size=kernel).astype(np.float32)
    ways = binary._sum_of_taps, binary._convolution
    cotangent = rng.normal(size=jax.eval_shape(ways[0], x, kernel).shape).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(way, x, kernel, cotangent):
        out, back = jax.vjp(way, x, kernel)
        return out, *back(cotangent)

    found, expected = (run(way, x, kernel, cotangent) for way in ways)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


@pytest.mark.parametrize(
    "fields, binary_part",
    [
        (dict(features=8), 1),
        (dict(features=4, groups=4, kernel_size=(1, 7)), 1),
        (dict(features=8, activation="real"), 0),
        (dict(features=8, weights="real"), 0),
    ],
)
def test_products_of_two_quantised_operands_are_counted_as_binary(fields, binary_part):
    module, variables, x = layer((1, 5, 5, 8), **fields)
    found = cost.operations(module.apply, variables, x)
    macs = 25 * np.prod(variables["params"]["kernel"].shape)
    assert found == (macs * binary_part, macs * (1 - binary_part))
    assert cost.macs(module.apply, variables, x) == macs
    assert found.total == (macs / 64 if binary_part else macs)
    gradient = cost.operations(jax.grad(lambda v: module.apply(v, x).sum()), variables)
    assert (gradient.binary > 0) == bool(binary_part) and (gradient.real > 0) != bool(binary_part)


def test_rprelu_is_a_shifted_prelu():
    module, x = binary.RPReLU(), jnp.asarray(np.random.default_rng(1).normal(size=(3, 4)), np.float32)
    params = module.init(jax.random.key(0), x)["params"]
    np.testing.assert_allclose(module.apply({"params": params}, x), np.where(x > 0, x, 0.25 * x), rtol=1e-6)
    slope, after = np.array([[0.1, -1, 2, 0], [1, 2, 3, 4]], np.float32)
    move = np.array([0.5, -0.5, 0, 1], np.float32)
    found = module.apply({"params": {"move1": move, "w": slope, "move2": after}}, x)
    shifted = np.asarray(x) + move
    np.testing.assert_allclose(found, np.where(shifted > 0, shifted, slope * shifted) + after, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field, value", [("activation", "signum"), ("weights", "binary")])
def test_unknown_quantisers_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: '{value}' is none of"):
        layer((1, 2, 2, 4), features=4, **{field: value})
