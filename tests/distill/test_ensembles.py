"""Several teachers, MEAL V2's discriminator, FunMatch's distances and mixup."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import log_softmax, softmax

from research.core import scope
from research.distill import ensembles
from research.distill.logits import kd

B, C, K = 6, 9, 3
RNG = np.random.default_rng(0)
STUDENT = jnp.asarray(RNG.normal(size=(B, C)), jnp.float32)
TEACHERS = jnp.asarray(RNG.normal(size=(K, B, C)), jnp.float32)


def test_meal_is_cross_entropy_with_the_mean_probability():
    soft = softmax(np.asarray(TEACHERS), -1).mean(0)
    np.testing.assert_allclose(ensembles.soft_label(TEACHERS), soft, rtol=1e-5)
    expected = -(soft * log_softmax(np.asarray(STUDENT), -1)).sum(-1)
    np.testing.assert_allclose(ensembles.meal(STUDENT, TEACHERS), expected, rtol=1e-5)
    one = -(softmax(np.asarray(TEACHERS[0]), -1) * log_softmax(np.asarray(STUDENT), -1)).sum(-1)
    np.testing.assert_allclose(ensembles.meal(STUDENT, TEACHERS[0]), one, rtol=1e-5)


def test_the_discriminator_narrows_twice_and_knows_both_sides():
    module = ensembles.Discriminator(3)
    variables = module.init(jax.random.key(0), STUDENT)
    widths = [variables["params"][f"conv{k}"]["kernel"].shape for k in (1, 2, 3)]
    assert widths == [(9, 3), (3, 1), (1, 2)]
    own, known = jnp.asarray([[2.0, 0.5]]), jnp.asarray([[0.0, 1.5]])
    expected = optax.sigmoid_binary_cross_entropy(jnp.asarray([2.0, 0.5, 0.0, 1.5]), jnp.asarray([1.0, 0, 0, 1]))
    np.testing.assert_allclose(ensembles.discriminate(own, known), [jnp.mean(expected)], rtol=1e-6)
    with pytest.raises(ValueError, match="leave no unit"):
        ensembles.Discriminator(8).init(jax.random.key(0), STUDENT)


def test_funmatch_sums_the_teachers():
    expected = sum(kd(STUDENT, t, temperature=2.0) for t in TEACHERS)
    np.testing.assert_allclose(ensembles.funmatch(STUDENT, TEACHERS, temperature=2.0), expected, rtol=1e-5)


def test_distances_are_named():
    difference = np.asarray(STUDENT - TEACHERS[0])
    logs = log_softmax(np.asarray(STUDENT), -1) - log_softmax(np.asarray(TEACHERS[0]), -1)
    expected = {
        "l2": (difference**2).sum(-1),
        "euclidean": np.linalg.norm(difference, axis=-1),
        "logsoftmax_euclidean": np.linalg.norm(logs, axis=-1),
        "hard": optax.softmax_cross_entropy_with_integer_labels(STUDENT, jnp.argmax(TEACHERS[0], -1)),
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(ensembles.distance(STUDENT, TEACHERS[0], kind=kind), values, rtol=1e-5)
    with pytest.raises(ValueError, match="choose one of kl, l2"):
        ensembles.distance(STUDENT, STUDENT, kind="cosine")


def test_probabilities_below_the_clip_lose_part_of_their_entropy():
    sure = jnp.asarray([[30.0, 0.0, 0.0]])
    found = ensembles.distance(sure * 0, sure, clip=1e-3)
    p = softmax(np.asarray(sure, np.float64), -1)
    expected = (p * (np.log(np.maximum(p, 1e-3)) + np.log(3))).sum(-1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_agreement_is_of_the_teachers_class_with_the_students_best():
    student = jnp.asarray([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    teacher = jnp.asarray([[0.0, 9.0, 0.0], [9.0, 0.0, 0.0]])
    assert [ensembles.agreement(student, teacher, top=k).tolist() for k in (1, 2, 3)] == [[0, 0], [1, 0], [1, 1]]


@pytest.mark.parametrize("amount", [0.2, 0.8])
def test_mixup_is_the_same_on_one_device_and_on_several(amount):
    images = jnp.asarray(RNG.normal(size=(8, 2, 2, 3)), jnp.float32)
    expected = 0.8 * images + 0.2 * jnp.roll(images, 1, axis=0)
    np.testing.assert_allclose(ensembles.consistent_mixup(images, amount), expected, rtol=1e-5, atol=1e-6)

    def share(x):
        with scope.batch_axis("data"):
            return ensembles.consistent_mixup(x, amount)

    split = images.reshape(4, 2, 2, 2, 3)
    found = jax.pmap(share, "data", devices=jax.devices()[:4])(split)
    np.testing.assert_allclose(found.reshape(images.shape), expected, rtol=1e-5, atol=1e-6)
