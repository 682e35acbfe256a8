"""Attention, selectivity and flow of feature maps, against direct computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill import maps
from research.distill.features import adaptive_pool, srrl

RNG = np.random.default_rng(0)
B = 3


def draw(*shape):
    return jnp.asarray(RNG.normal(size=(B, *shape)), jnp.float32)


STUDENT, TEACHER = draw(4, 4, 5), draw(4, 4, 6)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_attention_transfer_in_code_and_in_paper():
    for power in (1, 2, 4):
        s, t = (unit((np.asarray(x) ** power).mean(-1).reshape(B, -1)) for x in (STUDENT, TEACHER))
        np.testing.assert_allclose(maps.at(STUDENT, TEACHER, power=power), ((s - t) ** 2).mean(-1), rtol=1e-4)
    s, t = (unit((np.asarray(x) ** 2).sum(-1).reshape(B, -1)) for x in (STUDENT, TEACHER))
    np.testing.assert_allclose(maps.at_paper(STUDENT, TEACHER), np.linalg.norm(s - t, axis=-1), rtol=1e-4)


@pytest.mark.parametrize("loss", [maps.at, maps.at_paper, maps.nst])
def test_the_larger_map_is_pooled_and_scale_does_not_matter(loss):
    large = draw(6, 6, 5)
    pooled = adaptive_pool(large, (4, 4))
    np.testing.assert_allclose(loss(large, TEACHER), loss(pooled, TEACHER), rtol=1e-5)
    np.testing.assert_allclose(loss(TEACHER, large), loss(TEACHER, pooled), rtol=1e-5)
    np.testing.assert_allclose(loss(3 * STUDENT, TEACHER), loss(STUDENT, TEACHER), rtol=1e-4)
    assert not np.any(jax.grad(lambda t: jnp.sum(loss(STUDENT, t)))(TEACHER))


# Few pixels take the Gram matrix over pixels, many that over channels.
@pytest.mark.parametrize("side", [2, 5])
def test_nst_is_the_discrepancy_of_the_channels(side):
    student, teacher = draw(side, side, 7), draw(side, side, 4)
    s, t = (unit(np.moveaxis(np.asarray(x, np.float64), -1, 1).reshape(B, x.shape[-1], -1)) for x in (student, teacher))
    kernel = lambda a, b: (np.einsum("bcx,bdx->bcd", a, b) ** 2).mean((1, 2))
    expected = kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)
    np.testing.assert_allclose(maps.nst(student, teacher), expected, rtol=1e-4, atol=1e-6)


def test_flow_is_the_mean_product_of_neighbouring_stages():
    own, known = ([draw(4, 4, 3), draw(2, 2, 5), draw(2, 2, 2)] for _ in range(2))

    def products(x):
        x = [np.asarray(adaptive_pool(x[0], (2, 2))), *map(np.asarray, x[1:])]
        return [np.einsum("bhwc,bhwd->bdc", a, b) / 4 for a, b in zip(x[:-1], x[1:], strict=True)]

    expected = sum(((s - t) ** 2).mean((1, 2)) for s, t in zip(products(own), products(known), strict=True))
    np.testing.assert_allclose(maps.fsp(own, known), expected, rtol=1e-5)
    with pytest.raises(ValueError, match="3 and 4 channels"):
        maps.fsp(own, [draw(4, 4, 4), *known[1:]])


def test_correlations_of_a_map_with_itself_are_one():
    np.testing.assert_allclose(maps.channel_correlation(STUDENT, 2 * STUDENT + 1), 1, rtol=1e-5)
    np.testing.assert_allclose(maps.spatial_correlation(STUDENT, 3 * STUDENT - 2), 0, atol=1e-5)


def test_srrl_sees_the_student_through_the_teachers_classifier():
    student, teacher = (np.asarray(draw(5)) for _ in range(2))
    kernel, bias = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((5, 8), 8))
    expected = 2 * ((student - teacher) ** 2).mean(-1) + 3 * (((student - teacher) @ kernel) ** 2).mean(-1)
    found = srrl(jnp.asarray(student), jnp.asarray(teacher), kernel, bias, feature_weight=2.0, logit_weight=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
