"""CTKD: the learned temperature, its reversed gradient, its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill import hints, losses
from research.distill.logits import kd
from research.distill.numerics import scale_gradient
from research.distill.temperature import THETA, ctkd, strength, temperature

STUDENT, TEACHER = (jnp.asarray(np.random.default_rng(k).normal(size=(4, 6)), jnp.float32) for k in range(2))


def test_it_starts_at_a_temperature_of_15_6():
    np.testing.assert_allclose(temperature(jnp.asarray(THETA)), 15.62, atol=5e-3)


def test_the_value_is_kd_at_the_learned_temperature():
    theta = jnp.asarray(-1.3)
    expected = kd(STUDENT, TEACHER, temperature=temperature(theta, low=2.0, span=5.0))
    np.testing.assert_array_equal(ctkd(STUDENT, TEACHER, theta, low=2.0, span=5.0), expected)


@pytest.mark.parametrize("factor", [-1.0, -0.25, 0.0])
def test_theta_climbs_where_the_student_descends(factor):
    loss = lambda s, theta, factor: jnp.mean(ctkd(s, TEACHER, theta, strength=factor))
    own, of_theta = jax.grad(loss, (0, 1))(STUDENT, jnp.asarray(0.5), factor)
    plain, plain_theta = jax.grad(loss, (0, 1))(STUDENT, jnp.asarray(0.5), 1.0)
    np.testing.assert_array_equal(own, plain)
    np.testing.assert_allclose(of_theta, factor * plain_theta, rtol=1e-6)


def test_scaling_a_gradient_leaves_the_value_exactly():
    x = jnp.asarray([0.1, 1e8, -3.3], jnp.float32)
    value, pullback = jax.vjp(lambda x: scale_gradient(x, -0.3), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_allclose(pullback(jnp.ones(3))[0], -0.3 * np.ones(3), rtol=1e-6)


def test_the_schedule_goes_from_nothing_to_reversal():
    epochs = np.arange(1, 8)
    cosine = strength(epochs, epochs=5)
    np.testing.assert_allclose(cosine, -(1 - np.cos(np.pi * np.minimum(epochs, 5) / 5)) / 2, rtol=1e-6)
    np.testing.assert_allclose(strength(epochs, epochs=5, shape="linear"), -np.minimum(epochs, 4) / 5, rtol=1e-6)
    assert strength(0.0) == 0 and strength(99.0) == -1
    with pytest.raises(ValueError, match="'cosine' or 'linear'"):
        strength(1.0, shape="step")


def test_as_a_hint_theta_is_a_parameter_that_starts_untouched():
    hint = losses.HINTS["ctkd"](epochs=4)
    assert isinstance(hint, hints.Hint)
    student, teacher = {"logits": STUDENT}, {"logits": TEACHER}
    params, state = hint.init(jax.random.key(0), student, teacher)
    gradients = [
        jax.grad(lambda p, epoch=epoch: hint.apply(p, state, student, teacher, epoch=epoch)[0])(params)["theta"]
        for epoch in (-1, 0, 9)
    ]
    assert gradients[0] == 0 and abs(gradients[2]) > abs(gradients[1]) > 0
