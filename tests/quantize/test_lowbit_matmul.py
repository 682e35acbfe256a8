"""Products of few bits against products of what the weights stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.kernels.binary_matmul import pack_signs
from research.kernels.lowbit_matmul import lowbit_matmul, xnor_matmul
from research.quantize.grids import Form
from research.quantize.quantized import dequantize, pack, quantize

RULES = {8: "absmax", 4: "gptq", 3: "awq", 2: "gptq", 1: "sign"}


def drawn(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(
    m=st.integers(1, 5),
    k=st.integers(1, 100),
    n=st.integers(1, 4),
    bits=st.sampled_from(sorted(RULES)),
    group=st.sampled_from([None, 16, 32]),
    activations=st.sampled_from([None, 8, 4]),
)
def test_products_are_those_of_what_codes_stand_for(m, k, n, bits, group, activations):
    x, w, bias = drawn(m, m, k), drawn(k, k, n), drawn(n, n)

    @jax.jit
    def run(x, w, bias):
        q = quantize(w, Form(bits, group=group, rule=RULES[bits], pad=True))
        seen = dequantize(quantize(x, Form(activations, axis=-1, rule="absmax"))) if activations else x
        return lowbit_matmul(x, pack(q), bias, activation_bits=activations), seen, dequantize(q)

    found, x, w = run(x, w, bias)
    expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64) + bias
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_gradient_is_that_of_the_real_product():
    x, q = jnp.asarray(drawn(0, 2, 3, 32)), quantize(jnp.asarray(drawn(1, 32, 4)), Form(4, group=8))
    order = jnp.asarray(np.random.default_rng(2).permutation(32), jnp.int32)
    q = q.replace(order=order)
    for bits in (None, 8):
        y, back = jax.vjp(lambda x, bits=bits: lowbit_matmul(x, pack(q), activation_bits=bits), x)
        np.testing.assert_allclose(y, x @ dequantize(q), rtol=0.05, atol=0.2 if bits else 1e-4)
        np.testing.assert_allclose(back(y)[0], y @ dequantize(q).T, rtol=1e-5, atol=1e-5)


def test_the_dtype_of_inputs_is_kept():
    x, w = jnp.asarray(drawn(0, 3, 32)), pack(quantize(jnp.asarray(drawn(1, 32, 4)), Form(4, group=8)))
    found = lowbit_matmul(x.astype(jnp.bfloat16), w)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), lowbit_matmul(x, w), atol=0.05)


def test_signs_by_signs():
    x, w, alpha = drawn(0, 2, 3, 70), drawn(1, 4, 70), jnp.asarray([0.5, 1.0, 2.0, 3.0])
    found = xnor_matmul(jnp.asarray(x), pack_signs(jnp.asarray(w)), alpha)
    np.testing.assert_allclose(found, np.sign(x) @ np.sign(w).T * np.asarray(alpha), rtol=1e-6)


def test_operands_that_do_not_fit_are_refused():
    w = pack(quantize(jnp.asarray(drawn(1, 32, 4)), Form(4)))
    with pytest.raises(ValueError, match=r"shapes do not fit: x \(2, 31\), weight \(32, 4\)"):
        lowbit_matmul(jnp.zeros((2, 31)), w)
    with pytest.raises(ValueError, match="activation_bits: 1 is not from 2 to 8"):
        lowbit_matmul(jnp.zeros((2, 32)), w, activation_bits=1)
    with pytest.raises(ValueError, match="use pack_signs"):
        xnor_matmul(jnp.zeros((2, 32)), jnp.zeros((4, 2), jnp.uint32), jnp.ones(4))
