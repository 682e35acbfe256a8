"""Dropout and stochastic depth: whole examples, the right expectation, the same draw on one device and many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core import scope
from research.layers import drop


def dropped(x, rate, train=True, seed=0):
    return drop.DropPath(rate).apply({}, x, train, rngs={"dropout": jax.random.key(seed)})


def test_rates_grow_linearly():
    np.testing.assert_allclose(drop.rates(0.3, 4), [0, 0.1, 0.2, 0.3])
    assert drop.rates(0.3, 1) == (0.0,)


def test_examples_are_dropped_whole_and_scaled():
    y = np.asarray(dropped(jnp.ones((4000, 2, 3)), 0.4))
    kept = y[:, 0, 0] > 0
    np.testing.assert_allclose(y, np.where(kept[:, None, None], 1 / 0.6, 0) * np.ones((1, 2, 3)), rtol=1e-6)
    assert abs(kept.mean() - 0.6) < 0.03


def test_identity_in_evaluation_and_at_rate_zero():
    x = jnp.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(dropped(x, 0.5, train=False), x)
    np.testing.assert_array_equal(drop.DropPath(0.0).apply({}, x, True), x)


def test_dtype_is_kept():
    assert dropped(jnp.ones((4, 2), jnp.bfloat16), 0.5).dtype == jnp.bfloat16


def test_pmap_draws_what_jit_draws():
    x, key = jnp.ones((16, 3)), jax.random.key(3)

    def share(x):
        with scope.batch_axis("data"):
            return drop.DropPath(0.5).apply({}, x, True, rngs={"dropout": key})

    mapped = jax.pmap(share, "data")(x.reshape(8, 2, 3)).reshape(16, 3)
    np.testing.assert_array_equal(mapped, dropped(x, 0.5, seed=3))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_out_of_range_is_refused(rate):
    with pytest.raises(ValueError, match="drop-path rate"):
        dropped(jnp.ones((2, 2)), rate)


def test_dropout_under_pmap_draws_what_jit_draws():
    x, rngs = jnp.ones((16, 3, 4)), {"dropout": jax.random.key(3)}
    whole = drop.Dropout(0.5).apply({}, x, True, rngs=rngs)

    def share(x):
        with scope.batch_axis("data"):
            return drop.Dropout(0.5).apply({}, x, True, rngs=rngs)

    mapped = jax.pmap(share, "data")(x.reshape(8, 2, 3, 4)).reshape(whole.shape)
    np.testing.assert_array_equal(mapped, whole)
    assert set(np.unique(whole)) == {0.0, 2.0}


def test_dropout_is_the_identity_in_evaluation_and_refuses_bad_rates():
    x = jnp.ones((4, 3))
    np.testing.assert_array_equal(drop.Dropout(0.9).apply({}, x, False), x)
    with pytest.raises(ValueError, match=r"the dropout rate must lie in \[0, 1\), not 1.0"):
        drop.Dropout(1.0).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
