"""Relational losses: invariances, degenerate batches, and the batch they see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.spatial.distance
import scipy.special
import scipy.stats

from research.distill.relations import cc, cc_kernel, pkt, rkd, rkd_angle, rkd_distance, simple_recipe, sp

RNG = np.random.default_rng(0)
STUDENT = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)
TEACHER = jnp.asarray(RNG.normal(size=(9, 6)), jnp.float32)
SAME_WIDTH = jnp.asarray(RNG.normal(size=(9, 4)), jnp.float32)


def test_rkd_distances_are_scipys():
    found = [scipy.spatial.distance.cdist(x, x) for x in (STUDENT, TEACHER)]
    expected = optax.huber_loss(*(jnp.asarray(d / d[d > 0].mean()) for d in found))
    np.testing.assert_allclose(rkd_distance(STUDENT, TEACHER), jnp.mean(expected), rtol=1e-4)


def test_rkd_angles_are_the_cosines_at_every_anchor():
    def cosines(x):
        x, size = np.asarray(x, np.float64), len(x)
        out = np.zeros((size,) * 3)
        for i, j, k in np.ndindex(*out.shape):
            a, b = x[j] - x[i], x[k] - x[i]
            if i != j and i != k:
                out[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return out

    # More anchors than are held at a time.
    student, teacher = (np.tile(x, (2, 1)) + 0.1 * RNG.normal(size=(18, 1)) for x in (STUDENT, TEACHER))
    student, teacher = (x.astype(np.float32) for x in (student, teacher))
    expected = np.mean(optax.huber_loss(cosines(student), cosines(teacher)))
    np.testing.assert_allclose(rkd_angle(jnp.asarray(student), jnp.asarray(teacher)), expected, rtol=1e-4)


def test_rkd_is_invariant_to_rotation_scale_and_shift():
    rotation = jnp.asarray(scipy.stats.ortho_group.rvs(4, random_state=0), jnp.float32)
    moved = 3.0 * STUDENT @ rotation + 7.0
    np.testing.assert_allclose(rkd(moved, TEACHER), rkd(STUDENT, TEACHER), rtol=1e-4)
    np.testing.assert_allclose(rkd(moved, STUDENT), 0, atol=1e-6)


@pytest.mark.parametrize(
    "loss", [rkd, cc, cc_kernel, sp, pkt, simple_recipe, lambda s, t: cc_kernel(s, t, kernel="bilinear")]
)
def test_gradients_are_finite_where_distances_are_zero(loss):
    twin, point = STUDENT.at[1].set(STUDENT[0]), 0 * STUDENT
    function = jax.jit(jax.value_and_grad(loss))
    for student, teacher in ((STUDENT, STUDENT), (twin, SAME_WIDTH), (point, SAME_WIDTH)):
        value, gradient = function(student, teacher)
        assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize("loss", [rkd, cc, cc_kernel, sp, pkt, simple_recipe])
def test_bfloat16_features_are_accumulated_in_float32(loss):
    low = STUDENT.astype(jnp.bfloat16), SAME_WIDTH.astype(jnp.bfloat16)
    np.testing.assert_allclose(loss(*low), loss(*(x.astype(jnp.float32) for x in low)), rtol=1e-6)
    assert loss(*low).dtype == jnp.float32


def test_cc_pairs_each_example_with_the_next():
    delta = np.abs(np.asarray(STUDENT) - np.asarray(SAME_WIDTH))
    expected = 0.02 * np.mean([delta[i] @ delta[i + 1] for i in range(8)])
    np.testing.assert_allclose(cc(STUDENT, SAME_WIDTH), expected, rtol=1e-5)
    order = np.asarray([0, 2, 4, 6, 8, 1, 3, 5, 7])
    assert abs(float(cc(STUDENT[order], SAME_WIDTH[order])) / expected - 1) > 1e-3


def test_cc_trains_both_embeddings_and_the_kernel_form_the_student_only():
    assert np.any(jax.grad(cc, argnums=1)(STUDENT, SAME_WIDTH))
    assert not np.any(jax.grad(cc_kernel, argnums=1)(STUDENT, SAME_WIDTH))


def test_the_taylor_series_approaches_the_gaussian_kernel_of_unit_vectors():
    x, y = (z / jnp.linalg.norm(z, axis=-1, keepdims=True) for z in (STUDENT, SAME_WIDTH))
    gram = lambda z: np.exp(-0.4 * scipy.spatial.distance.cdist(z, z, "sqeuclidean"))
    expected = np.linalg.norm(gram(x) - gram(y)) / 81
    np.testing.assert_allclose(cc_kernel(x, y, order=12), expected, rtol=1e-4)


def test_sp_compares_rows_of_gram_matrices():
    def similarity(x):
        x = np.asarray(x, np.float64).reshape(9, -1) @ np.asarray(x, np.float64).reshape(9, -1).T
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    expected = np.sum((similarity(TEACHER) - similarity(STUDENT)) ** 2) / 81
    np.testing.assert_allclose(sp(STUDENT, TEACHER), expected, rtol=1e-4)
    np.testing.assert_allclose(sp(STUDENT.reshape(9, 2, 1, 2), TEACHER), expected, rtol=1e-4)


def test_pkt_is_the_divergence_of_cosine_affinities():
    def affinity(x):
        cosine = (1 + 1 - scipy.spatial.distance.cdist(x, x, "cosine")) / 2
        return cosine / cosine.sum(1, keepdims=True)

    expected = np.mean(scipy.special.rel_entr(affinity(TEACHER), affinity(STUDENT)))
    np.testing.assert_allclose(pkt(STUDENT, TEACHER), expected, rtol=1e-3)


def test_the_simple_recipe_is_a_log_sum_of_powers():
    difference = np.abs(np.asarray(STUDENT) - np.asarray(SAME_WIDTH))
    for exponent in (1.0, 4.0):
        expected = np.log((difference**exponent).sum())
        np.testing.assert_allclose(simple_recipe(STUDENT, SAME_WIDTH, exponent=exponent), expected, rtol=1e-5)


def test_an_unknown_kernel_and_a_batch_of_one_are_refused():
    with pytest.raises(ValueError, match="'gaussian' or 'bilinear'"):
        cc_kernel(STUDENT, SAME_WIDTH, kernel="rbf")
    for loss in (cc, rkd):
        with pytest.raises(ValueError, match="two or more"):
            loss(STUDENT[:1], SAME_WIDTH[:1])
