"""CKA from its definition, its invariances, and maps between two networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill import cka

RNG = np.random.default_rng(0)
N = 12
X, Y = RNG.normal(size=(N, 5)), RNG.normal(size=(N, 4, 2))
Y += 0.5 * X[:, :4, None]


def hsic(k, n=N):
    """The biased estimator of two Gram matrices: tr(KHLH) / (n - 1)^2."""
    centre = np.eye(n) - 1 / n
    return np.trace(k[0] @ centre @ k[1] @ centre) / (n - 1) ** 2


def hsic_unbiased(k, n=N):
    """Song et al. 2012, equation 5: [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2 1'KL1 / (n-2)] / (n (n-3))."""
    k, one = [g - np.diag(np.diag(g)) for g in k], np.ones(n)
    both = (one @ k[0] @ one) * (one @ k[1] @ one) / ((n - 1) * (n - 2))
    return (np.trace(k[0] @ k[1]) + both - 2 / (n - 2) * one @ k[0] @ k[1] @ one) / (n * (n - 3))


def grams(*features):
    return [f.reshape(len(f), -1) @ f.reshape(len(f), -1).T for f in features]


@pytest.mark.parametrize("unbiased, estimator", [(False, hsic), (True, hsic_unbiased)])
def test_cka_is_its_definition(unbiased, estimator):
    with jax.enable_x64(True):
        found = cka.sums([jnp.asarray(X)], [jnp.asarray(Y)], unbiased=unbiased)
        value = cka.cka(jnp.asarray(X), jnp.asarray(Y), unbiased=unbiased)
    a, b = grams(X, Y)
    np.testing.assert_allclose(found.cross[0, 0], estimator((a, b)), rtol=1e-10)
    np.testing.assert_allclose(found.first[0], estimator((a, a)), rtol=1e-10)
    expected = estimator((a, b)) / np.sqrt(estimator((a, a)) * estimator((b, b)))
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_batches_are_summed_before_the_ratio():
    halves = [
        (jnp.asarray(X[rows], jnp.float32), jnp.asarray(Y[rows], jnp.float32)) for rows in (slice(6), slice(6, N))
    ]
    total = jax.tree.map(jnp.add, *(cka.sums([x], [y]) for x, y in halves))
    k = [grams(X[rows], Y[rows]) for rows in (slice(6), slice(6, N))]
    parts = [sum(hsic_unbiased((g[i], g[j]), 6) for g in k) for i, j in ((0, 1), (0, 0), (1, 1))]
    np.testing.assert_allclose(cka.similarity(total)[0, 0], parts[0] / np.sqrt(parts[1] * parts[2]), rtol=1e-4)


@pytest.mark.parametrize("unbiased", [False, True])
def test_rotations_scales_and_shifts_of_features_change_nothing(unbiased):
    x = jnp.asarray(X, jnp.float32)
    turn = jnp.asarray(np.linalg.qr(RNG.normal(size=(5, 5)))[0], jnp.float32)
    value = lambda a: cka.cka(a, jnp.asarray(Y, jnp.float32), unbiased=unbiased)
    np.testing.assert_allclose(value(3 * x @ turn + 100.0), value(x), rtol=1e-3)
    np.testing.assert_allclose(cka.cka(x, x, unbiased=unbiased), 1, rtol=1e-5)


def test_constant_features_are_like_nothing():
    assert cka.cka(jnp.ones((8, 3)), jnp.asarray(X[:8], jnp.float32)) == 0


def test_bfloat16_features_are_compared_in_float32():
    low = [jnp.asarray(f, jnp.bfloat16) for f in (X, Y)]
    np.testing.assert_allclose(cka.cka(*low), cka.cka(*(f.astype(jnp.float32) for f in low)), rtol=1e-6)


def test_batches_too_small_are_refused():
    with pytest.raises(ValueError, match="of 4 examples or more, not of \\[3\\]"):
        cka.cka(jnp.ones((3, 2)), jnp.ones((3, 2)), unbiased=True)
    with pytest.raises(ValueError, match="not of \\[3, 4\\]"):
        cka.cka(jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="no batches"):
        cka.between(dict, dict, [])


def test_maps_compare_all_endpoints_and_draw_themselves():
    import matplotlib.pyplot as plt

    weight = jnp.asarray(RNG.normal(size=(12, 6)), jnp.float32)

    def first(images):
        flat = images.reshape(images.shape[0], -1)
        return {"stem": images, "late": jax.nn.relu(flat @ weight), "a": flat[:, :3]}

    def second(images):
        return {"copy": images[:, ::-1], "pooled": jnp.mean(images, (1, 2))}

    batches = [jnp.asarray(RNG.normal(size=(16, 2, 2, 3)), jnp.float32) for _ in range(3)]
    matrix, rows, columns = cka.between(first, second, iter(batches))
    assert (rows, columns, matrix.shape) == (["stem", "late", "a"], ["copy", "pooled"], (3, 2))
    np.testing.assert_allclose(matrix[0, 0], 1, rtol=1e-5)
    assert np.all(matrix < 1.0001) and matrix[2, 1] < 0.9
    found = [cka.sums([first(x)["late"]], [second(x)["pooled"]]) for x in batches]
    expected = cka.similarity(jax.tree.map(lambda *parts: sum(parts), *found))[0, 0]
    np.testing.assert_allclose(matrix[1, 1], expected, rtol=1e-4)
    image = cka.heatmap(plt.figure().subplots(), matrix, rows, columns)
    assert image.get_array().shape == (3, 2)
    plt.close("all")
