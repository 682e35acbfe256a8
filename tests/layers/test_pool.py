"""Pooling at the border, against the definition written out."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.pool import adaptive_max_pool, avg_pool_ceil, max_pool


@pytest.mark.parametrize("shape", [(4, 4), (5, 4), (4, 7), (1, 3)])
def test_average_of_what_is_there(shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32)
    rows, columns = ((n + 1) // 2 for n in shape)
    expected = np.stack(
        [
            np.stack([x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for j in range(columns)], axis=1)
            for i in range(rows)
        ],
        axis=1,
    )
    np.testing.assert_allclose(avg_pool_ceil(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_max_pool_pads_with_minus_infinity():
    x = -jnp.ones((1, 4, 4, 1))
    np.testing.assert_array_equal(max_pool(x, 3, 2, 1), -np.ones((1, 2, 2, 1)))


@pytest.mark.parametrize("size, out", [((75, 40), (38, 19)), ((10, 7), (10, 3)), ((3, 5), (4, 8))])
def test_adaptive_maxima_are_those_of_pytorchs_windows(size, out):
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    found = np.asarray(adaptive_max_pool(jnp.asarray(x), out))
    for i, j in np.ndindex(out):
        (top, bottom), (left, right) = (
            (k * length // n, -(-(k + 1) * length // n)) for k, length, n in zip((i, j), size, out, strict=True)
        )
        np.testing.assert_array_equal(found[:, i, j], x[:, top:bottom, left:right].max((1, 2)))
