"""MLLD: its correlations, and what the official code makes of two views."""

import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

from research.distill.logits import kd
from research.distill.multilevel import Views, batch_correlation, class_correlation, mlld, multilevel

B, C = 5, 3
RNG = np.random.default_rng(0)
STUDENT, TEACHER = (jnp.asarray(x, jnp.float32) for x in RNG.normal(size=(2, B, C)))


def test_correlations_are_those_of_the_probabilities():
    s, t = (softmax(np.asarray(z) / 2, -1) for z in (STUDENT, TEACHER))
    classes, batch = ((a @ b for a, b in pairs) for pairs in (((s.T, s), (t.T, t)), ((s, s.T), (t, t.T))))
    for function, (own, known), count in ((class_correlation, classes, C), (batch_correlation, batch, B)):
        expected = np.sum((own - known) ** 2) / count
        np.testing.assert_allclose(function(STUDENT, TEACHER, temperature=2.0), expected, rtol=1e-4)


def test_one_view_is_the_sum_over_temperatures():
    expected = sum(
        jnp.mean(kd(STUDENT, TEACHER, temperature=t))
        + 2 * class_correlation(STUDENT, TEACHER, temperature=t)
        + 3 * batch_correlation(STUDENT, TEACHER, temperature=t)
        for t in (1.0, 4.0)
    )
    found = multilevel(STUDENT, TEACHER, temperatures=(1.0, 4.0), class_weight=2.0, batch_weight=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_weak_terms_are_scaled_by_the_share_of_unsure_examples():
    # Of five distinct confidences three are not above the median, and two of three classes.
    views = [Views(z, z) for z in (STUDENT, TEACHER)]
    labels = jnp.zeros(B, jnp.int32)
    parts = mlld(*views, labels, temperature=4.0, kd_weight=1.0)
    whole = [
        sum(f(STUDENT, TEACHER, temperature=t) for t in (4.0, 3.0, 5.0, 2.0, 6.0)) for f in (_kd, batch_correlation)
    ]
    np.testing.assert_allclose(parts.kd, whole[0] * (3 / 5 + 1), rtol=1e-5)
    np.testing.assert_allclose(parts.batch, whole[1] * 3 / 5, rtol=1e-5)


def _kd(student, teacher, temperature):
    return jnp.mean(kd(student, teacher, temperature=temperature))
