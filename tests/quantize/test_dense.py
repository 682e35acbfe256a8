"""`QuantDense`: the product of rules, its parameters as checkpoints hold them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import serialization

from research.quantize import dense, rules
from research.quantize.dense import QuantDense
from research.quantize.grids import Form
from research.quantize.quantized import dequantize, quantize
from research.quantize.rules import Rule

FORM = Form(4, group=32)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, use_bias=False, name="down")(jnp.tanh(nn.Dense(96, name="up")(x)))


class Few(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(QuantDense(96, form=FORM, activation_bits=8, name="up")(x))
        return QuantDense(16, use_bias=False, form=FORM, name="down")(x)


@pytest.fixture(scope="module")
def trained():
    """(x, params of `Plain`, the same packed)."""
    x = jax.random.normal(jax.random.key(0), (3, 5, 64))

    @jax.jit
    def make(key):
        params = Plain().init(key, x)["params"]
        params = params | {"up": params["up"] | {"bias": jnp.linspace(-1, 1, 96)}}
        return params, rules.pack_params(rules.quantize_params(params, [Rule("", bits=4, group=32)]))

    return x, *make(jax.random.key(1))


def test_a_calibrated_model_runs_as_by_rules(trained):
    x, _, packed = trained
    settings = Rule("up", bits=4, group=32, activation_bits=8), Rule("", bits=4, group=32)
    expected = jax.jit(rules.apply(Plain(), settings))({"params": packed}, x)
    np.testing.assert_array_equal(jax.jit(Few().apply)({"params": packed}, x), expected)
    np.testing.assert_array_equal(jax.jit(rules.apply(Few()))({"params": packed}, x), expected)


def test_checkpoints_hold_packed_bits(trained):
    x, _, packed = trained
    new = jax.eval_shape(Few().init, jax.random.key(0), x)["params"]
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert jax.tree.structure(new) == jax.tree.structure(packed) and shapes(new) == shapes(packed)
    for layer, (k, n) in {"up": (64, 96), "down": (96, 16)}.items():
        assert packed[layer]["kernel"].nbytes == k * n // 2 + 2 * 4 * n * k // 32  # codes, scales and zero points
    stored = serialization.to_bytes(packed)
    assert len(stored) < 4 * (64 * 96 + 96 * 16) / 2
    empty = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), new)
    jax.tree.map(np.testing.assert_array_equal, serialization.from_bytes(empty, stored), packed)


def test_a_layer_of_a_kernel():
    kernel, bias = jax.random.normal(jax.random.key(0), (40, 6)), jnp.arange(6.0)
    x = jax.random.normal(jax.random.key(1), (2, 40))
    few = jax.jit(lambda kernel: quantize(kernel, Form(3, group=16, rule="absmax", pad=True)))(kernel)
    layer, variables = dense.of(few, bias)

    @jax.jit
    def run(x, variables):
        y, back = jax.vjp(lambda x: layer.apply(variables, x), x)
        real = dequantize(few)
        return y, x @ real + bias[None], back(y)[0], y @ real.T

    y, expected, gradient, expected_gradient = run(x, variables)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-3)
    new = jax.eval_shape(layer.init, jax.random.key(2), x)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    for form in (Form(8, per_tensor=True, rule="absmax"), Form(1, rule="sign"), Form(2, group=8)):
        packed = jax.eval_shape(lambda form=form: dense.pack(quantize(kernel, form)))
        again = jax.eval_shape(lambda packed=packed: dense.pack(quantize(kernel, dense.form_of(packed))))
        assert again == packed


def test_other_kernels_are_refused(trained):
    x, real, packed = trained
    with pytest.raises(ValueError, match="up: the kernel is in real numbers"):
        Few().apply({"params": real}, x)
    with pytest.raises(ValueError, match=r"QuantDense: the kernel is \(96, 16\), not \(64, 16\)"):
        QuantDense(16, use_bias=False).apply({"params": packed["down"]}, x)
