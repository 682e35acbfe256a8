"""GELU against scipy in float64, and the shape of the MLP."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from research.layers.mlp import Mlp, gelu

GRID = np.concatenate([np.linspace(-12, 12, 4801), [0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4]])


def test_gelu_is_exact_to_the_rounding_of_float32():
    x = GRID.astype(np.float32).astype(np.float64)
    error = np.abs(np.asarray(jax.jit(gelu)(jnp.asarray(x, jnp.float32)), np.float64) - x * stats.norm.cdf(x))
    assert np.all(error <= 4 * np.finfo(np.float32).eps * np.abs(x))


def test_gelu_gradient():
    x = GRID.astype(np.float32).astype(np.float64)
    slope = jax.jit(jax.vmap(jax.grad(gelu)))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(slope, stats.norm.cdf(x) + x * stats.norm.pdf(x), atol=1e-6)


def test_gelu_of_bfloat16_is_the_rounded_exact_value():
    x = jnp.asarray(GRID, jnp.bfloat16)
    expected = gelu(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert gelu(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(gelu(x).astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_mlp_works_on_the_last_axis(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    out, variables = Mlp(10, out_init=jax.nn.initializers.zeros).init_with_output(jax.random.key(1), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "fc1": {"kernel": (6, 10), "bias": (10,)},
        "fc2": {"kernel": (10, 6), "bias": (6,)},
    }
    np.testing.assert_array_equal(out, np.zeros(shape))
