"""ManifoldKD against direct computation; singular vectors and their gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill.manifold import kdsvd, manifold, right_vectors

RNG = np.random.default_rng(0)


def test_manifold_is_three_differences_of_cosines():
    student, teacher = RNG.normal(size=(3, 6, 4)), RNG.normal(size=(3, 5, 7))
    sample = np.asarray([3, 0, 11, 14])
    s, t = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (student[:, 1:], teacher))
    within = [np.mean((s[b] @ s[b].T - t[b] @ t[b].T) ** 2) for b in range(3)]
    across = [np.mean((s[:, n] @ s[:, n].T - t[:, n] @ t[:, n].T) ** 2) for n in range(5)]
    s, t = (x.reshape(15, -1)[sample] for x in (s, t))
    expected = 2 * np.mean(within) + 3 * np.mean(across) + 5 * np.mean((s @ s.T - t @ t.T) ** 2)
    weights = {"patch_weight": 2.0, "sample_weight": 3.0, "random_weight": 5.0}
    arrays = (jnp.asarray(x, jnp.float32) for x in (student, teacher))
    np.testing.assert_allclose(manifold(*arrays, jnp.asarray(sample), **weights), expected, rtol=1e-4)


@pytest.mark.parametrize("shape", [(6, 4), (3, 5)])
def test_the_gradient_of_singular_vectors_is_numerical(shape):
    with jax.enable_x64(True):
        x = jnp.asarray(RNG.normal(size=shape))
        weights = jnp.asarray(RNG.normal(size=(shape[1], 2)))
        # Products of a vector with itself do not depend on its sign.
        function = lambda x: jnp.sum(weights * right_vectors(x, 2) * right_vectors(x, 2)[:1])
        found = jax.jit(jax.grad(function))(x)
        for index in ((0, 0), (2, 3), (1, 2)):
            step = 1e-6 * jnp.zeros(shape).at[index].set(1)
            slope = (function(x + step) - function(x - step)) / 2e-6
            np.testing.assert_allclose(found[index], slope, rtol=1e-5, atol=1e-8)


def test_equal_and_zero_singular_values_have_finite_gradients():
    for x in (jnp.eye(4), jnp.zeros((3, 4)), jnp.ones((5, 4))):
        gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(right_vectors(x, 2)[0]))))(x)
        assert np.all(np.isfinite(gradient))


def test_kdsvd_ignores_scale_and_vanishes_for_equal_networks():
    stages = [jnp.asarray(RNG.normal(size=(2, 3, 3, 6)), jnp.float32) for _ in range(4)]
    np.testing.assert_allclose(kdsvd(stages[:2], stages[:2], count=2), 0, atol=1e-6)
    found = kdsvd(stages[:2], stages[2:])
    assert np.all(found > 0)
    np.testing.assert_allclose(kdsvd([3 * x for x in stages[:2]], stages[2:]), found, rtol=1e-4)
    with pytest.raises(ValueError, match="6 and 5 channels"):
        kdsvd(stages[:2], [x[..., :5] for x in stages[2:]])
