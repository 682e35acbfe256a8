"""Label losses against optax, hard, smoothed and soft."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.distill.ground_truth import binary_cross_entropy, cross_entropy, hard, targets

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)) * 3, jnp.float32)
LABELS = jnp.asarray([5, 0, 2, 2], jnp.int32)
SOFT = jax.nn.softmax(jnp.asarray(np.random.default_rng(1).normal(size=(4, 6)), jnp.float32))


def test_cross_entropy_of_hard_and_soft_labels_is_optax():
    hard_labels = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS), hard_labels, rtol=1e-6)
    np.testing.assert_allclose(cross_entropy(LOGITS, SOFT), optax.softmax_cross_entropy(LOGITS, SOFT), rtol=1e-6)


def test_smoothing_is_timms_mix_of_the_label_and_the_mean_over_classes():
    log_p = np.asarray(jax.nn.log_softmax(LOGITS))
    expected = -0.9 * log_p[np.arange(4), LABELS] - 0.1 * log_p.mean(-1)
    np.testing.assert_allclose(cross_entropy(LOGITS, LABELS, smoothing=0.1), expected, rtol=1e-5)
    np.testing.assert_allclose(targets(LABELS, 6, 0.1), optax.smooth_labels(jax.nn.one_hot(LABELS, 6), 0.1), rtol=1e-6)


def test_binary_cross_entropy_averages_or_sums_over_classes():
    each = optax.sigmoid_binary_cross_entropy(LOGITS, SOFT)
    np.testing.assert_allclose(binary_cross_entropy(LOGITS, SOFT), jnp.mean(each, -1), rtol=1e-6)
    np.testing.assert_allclose(binary_cross_entropy(LOGITS, SOFT, sum_classes=True), jnp.sum(each, -1), rtol=1e-6)


def test_threshold_makes_soft_targets_binary():
    mixed = 0.6 * jax.nn.one_hot(LABELS, 6) + 0.4 * jax.nn.one_hot(LABELS[::-1], 6)
    expected = optax.sigmoid_binary_cross_entropy(LOGITS, (mixed > 0.3).astype(jnp.float32))
    found = binary_cross_entropy(LOGITS, mixed, threshold=0.3)
    np.testing.assert_allclose(found, jnp.mean(expected, -1), rtol=1e-6)


def test_hard_labels_of_soft_targets():
    np.testing.assert_array_equal(hard(LABELS), LABELS)
    np.testing.assert_array_equal(hard(jnp.asarray([[0.2, 0.4, 0.4], [1.0, 0.0, 0.0]])), [1, 0])


def test_an_impossible_class_that_is_not_asked_for_costs_nothing():
    logits = jnp.asarray([[0.0, 1.0, -jnp.inf]])
    value, gradient = jax.value_and_grad(lambda z: cross_entropy(z, jnp.asarray([1]))[0])(logits)
    np.testing.assert_allclose(value, np.log1p(np.exp(-1)), rtol=1e-6)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("labels, smoothing, message", [(SOFT[:, :5], 0.0, "6 classes take"), (SOFT, 0.1, "already")])
def test_labels_that_do_not_fit_are_refused(labels, smoothing, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(LOGITS, labels, smoothing=smoothing)
