"""NKD, WSLD and USKD against direct computations, and standardised logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from research.distill.label_aware import nkd, uskd, wsld, wsld_weight
from research.distill.logits import kd
from research.distill.standardized import lskd, lskd_and_labels, standardize

B, C = 7, 6
RNG = np.random.default_rng(3)
STUDENT, TEACHER = RNG.normal(size=(2, B, C)).astype(np.float32) * 2
LABELS = RNG.integers(0, C, B)
ARRAYS = tuple(map(jnp.asarray, (STUDENT, TEACHER, LABELS.astype(np.int32))))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nkd_splits_the_soft_cross_entropy(temperature):
    expected = []
    for s, t, y in zip(STUDENT, TEACHER, LABELS, strict=True):
        rest_s, rest_t = np.delete(s, y), np.delete(t, y)
        target = -softmax(t)[y] * log_softmax(s)[y]
        others = -softmax(rest_t / temperature) @ log_softmax(rest_s / temperature)
        expected.append(target + 0.7 * temperature**2 * others)
    np.testing.assert_allclose(nkd(*ARRAYS, temperature=temperature, gamma=0.7), expected, rtol=1e-5)


def test_wsld_spares_examples_on_which_the_student_is_ahead():
    losses = [-log_softmax(z, -1)[np.arange(B), LABELS] for z in (STUDENT, TEACHER)]
    weight = 1 - np.exp(-losses[0] / losses[1])
    np.testing.assert_allclose(wsld_weight(*ARRAYS), weight, rtol=1e-4)
    soft = kd(*ARRAYS[:2], temperature=3.0, entropy=False)
    np.testing.assert_allclose(wsld(*ARRAYS, temperature=3.0, alpha=1.5), 1.5 * weight * soft, rtol=1e-4)
    # The weight is a constant: the gradient is the divergence's, weighted.
    gradient = jax.grad(lambda s: jnp.sum(wsld(s, *ARRAYS[1:], temperature=3.0, alpha=1.0)))(ARRAYS[0])
    plain = jax.grad(lambda s: jnp.sum(kd(s, ARRAYS[1], temperature=3.0)))(ARRAYS[0])
    np.testing.assert_allclose(gradient, weight[:, None] * plain, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("loss", [nkd, wsld])
def test_labels_are_asked_for(loss):
    with pytest.raises(ValueError, match="needs the labels"):
        loss(*ARRAYS[:2])


def _uskd(logits, weak, labels, alpha, beta, mu):
    """Written along the paper, an example at a time."""
    rows = np.arange(len(labels))
    square = softmax(logits, -1)[rows, labels] ** 2
    total = 0.0
    for n, y in enumerate(labels):
        log_s, p_w = log_softmax(logits[n]), softmax(weak[n])
        total -= alpha * (1 + square[n] - square.mean()) * log_s[y]
        smooth = 0.9 * np.eye(C)[y] + 0.1 / C
        total -= mu * smooth @ log_softmax(weak[n])
        order = np.argsort(-(p_w / (1 - p_w[y] + 1e-6) + log_s / (1 - log_s[y] + 1e-6)), kind="stable")
        zipf = np.zeros(C)
        zipf[order] = 1 / (1 + np.arange(C))
        zipf = np.delete(zipf, y)
        total -= beta * (zipf / zipf.sum()) @ log_softmax(np.delete(logits[n], y))
    return total / len(labels)


def test_uskd_is_its_three_terms():
    weights = {"alpha": 0.8, "beta": 0.3, "mu": 0.2}
    expected = _uskd(STUDENT, TEACHER, LABELS, **weights)
    np.testing.assert_allclose(uskd(*ARRAYS, **weights), expected, rtol=1e-5)
    one_hot = jax.nn.one_hot(ARRAYS[2], C)
    # As a distribution the label has a second class, of weight zero, which leaves the other classes.
    terms = {"alpha": 1.0, "beta": 0.0, "mu": 1.0}
    np.testing.assert_allclose(uskd(*ARRAYS[:2], one_hot, **terms), uskd(*ARRAYS, **terms), rtol=1e-5)


def test_uskd_of_two_classes_and_mixed_labels_is_finite():
    mixed = jnp.asarray([[0.3, 0.7], [1.0, 0.0]])
    logits = jnp.asarray([[1.0, -1.0], [2.0, 0.5]])
    value, gradient = jax.value_and_grad(uskd)(logits, logits, mixed)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))


def test_standardised_logits_have_unit_spread():
    z = standardize(ARRAYS[0])
    np.testing.assert_allclose(jnp.mean(z, -1), 0, atol=1e-6)
    np.testing.assert_allclose(np.std(z, -1, ddof=1), 1, rtol=1e-5)


def test_lskd_ignores_shift_and_scale_of_either_network():
    moved = lskd(3 * ARRAYS[0] + 5, 0.2 * ARRAYS[1] - 1)
    np.testing.assert_allclose(moved, lskd(*ARRAYS[:2]), rtol=1e-4)


def test_torchdistills_lskd_asks_the_labels_of_the_plain_logits():
    found = lskd_and_labels(*ARRAYS, temperature=3.0, alpha=0.25)
    hard = -log_softmax(STUDENT, -1)[np.arange(B), LABELS]
    np.testing.assert_allclose(found, 0.25 * hard + 0.75 * lskd(*ARRAYS[:2], temperature=3.0), rtol=1e-5)
