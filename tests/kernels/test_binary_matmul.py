"""Products of bits against NumPy's packing and integer products, at any length."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.kernels import binary_matmul as op


def drawn(seed, *shape):
    """Integers -1, 0, 1, as float32."""
    return np.random.default_rng(seed).integers(-1, 2, shape).astype(np.float32)


@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
def test_words_are_those_of_numpy(k):
    x = drawn(k, 3, 2, k)
    bits = np.pad(x >= 0, ((0, 0), (0, 0), (0, -k % 32)))
    expected = np.packbits(bits, axis=-1, bitorder="little").view("<u4")
    found = op.pack_signs(x)
    assert found.dtype == jnp.uint32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(op.unpack_signs(found, k, jnp.int32), np.where(x >= 0, 1, -1))


@settings(deadline=None, max_examples=8, derandomize=True)
@given(m=st.integers(1, 5), n=st.integers(1, 5), k=st.integers(1, 600), ternary=st.booleans())
def test_products_are_those_of_integers(m, n, k, ternary):
    x, w = drawn(k, m, k), np.where(drawn(k + 1, n, k) >= 0, 1, -1)
    signs = x.astype(np.int32) if ternary else np.where(x >= 0, 1, -1)

    @jax.jit
    def product(x, w):
        nonzero = op.pack_bits(x != 0) if ternary else None
        return op.binary_matmul(op.pack_signs(x), op.pack_signs(w), k, nonzero)

    found = product(x, w)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, signs @ w.T)


def test_leading_axes_are_kept_and_empty_rows_are_zero():
    x = drawn(0, 2, 3, 40)
    x[1, 2] = 0
    w = op.pack_signs(drawn(1, 4, 40))
    found = op.binary_matmul(op.pack_signs(x), w, 40, op.pack_bits(jnp.asarray(x != 0)))
    assert found.shape == (2, 3, 4) and not np.any(found[1, 2])


@pytest.mark.parametrize("ternary", [False, True])
def test_memory_is_that_of_operands_and_result(ternary):
    m, n, k = 256, 128, 2048
    word = lambda rows: jax.ShapeDtypeStruct((rows, k // 32), jnp.uint32)
    planes = (word(m),) if ternary else ()
    call = jax.jit(lambda a, b, *nonzero: op.binary_matmul(a, b, k, *nonzero))
    memory = call.lower(word(m), word(n), *planes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (4 * m * n + 4 * (m + n) * k // 32)  # an array of all products has 256 MB


@pytest.mark.parametrize(
    "a, b, nonzero, message",
    [
        ((2, 2), (3, 1), None, r"b: uint32 of shape \(3, 1\) is no array of 2 uint32 words"),
        ((2, 1), (3, 2), None, r"a: uint32 of shape \(2, 1\)"),
        ((2, 2), (3, 2), (2, 1), r"nonzero: uint32 of shape \(2, 1\)"),
        ((2, 2), (3, 2), (1, 2), r"shapes do not fit: a \(2, 2\), nonzero \(1, 2\)"),
        ((2, 2), (2,), None, r"shapes do not fit"),
    ],
)
def test_what_is_no_packed_operand_is_named(a, b, nonzero, message):
    arrays = [None if shape is None else jnp.zeros(shape, jnp.uint32) for shape in (a, b, nonzero)]
    with pytest.raises(ValueError, match=message):
        op.binary_matmul(*arrays[:2], 64, arrays[2])
    with pytest.raises(ValueError, match="a: int32 of shape"):
        op.binary_matmul(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.uint32), 64)
