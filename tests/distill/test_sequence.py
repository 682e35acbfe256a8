"""Divergences of language models against scipy's, their limits, and which tokens count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from research.distill import sequence

RNG = np.random.default_rng(1)
STUDENT, TEACHER = (jnp.asarray(x, jnp.float32) for x in 2 * RNG.normal(size=(2, 3, 4, 7)))
S, T = (softmax(np.asarray(z, np.float64), -1) for z in (STUDENT, TEACHER))
LABELS = jnp.asarray(RNG.integers(0, 7, (3, 4)), jnp.int32).at[0, :2].set(-100)


def kl(p, q):
    return rel_entr(p, q).sum(-1)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (sequence.forward_kl(STUDENT, TEACHER, entropy=True), kl(T, S)),
        (sequence.reverse_kl(STUDENT, TEACHER), kl(S, T)),
        (sequence.symmetric_kl(STUDENT, TEACHER, lam=0.3, entropy=True), 0.7 * kl(T, S) + 0.3 * kl(S, T)),
        (sequence.total_variation(STUDENT, TEACHER), np.abs(S - T).sum(-1) / 2),
        (sequence.skewed_kl(STUDENT, TEACHER, lam=0.2, entropy=True), kl(T, 0.2 * T + 0.8 * S)),
        (sequence.skewed_reverse_kl(STUDENT, TEACHER, lam=0.2), kl(S, 0.2 * S + 0.8 * T)),
        (sequence.jsd(STUDENT, TEACHER, beta=0.0), kl(T, S)),
        (sequence.jsd(STUDENT, TEACHER, beta=1.0), kl(S, T)),
    ],
)
def test_each_is_scipys(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_generalised_jsd_is_that_of_the_mixture():
    m = 0.3 * T + 0.7 * S
    expected = 0.3 * kl(T, m) + 0.7 * kl(S, m)
    np.testing.assert_allclose(sequence.jsd(STUDENT, TEACHER, beta=0.3), expected, rtol=1e-4)
    np.testing.assert_allclose(sequence.js(STUDENT, TEACHER, lam=0.7), expected, rtol=1e-4)


def test_jsd_at_a_temperature():
    softer = sequence.jsd(STUDENT / 2, TEACHER / 2)
    np.testing.assert_allclose(sequence.jsd(STUDENT, TEACHER, temperature=2.0), softer, rtol=1e-6)


def test_the_mean_is_over_tokens_that_count():
    values = sequence.reverse_kl(STUDENT, TEACHER)
    used = np.asarray(LABELS) != -100
    np.testing.assert_allclose(sequence.token_mean(values, LABELS), np.asarray(values)[used].mean(), rtol=1e-6)
    np.testing.assert_allclose(sequence.token_mean(values), np.sum(values) / 3, rtol=1e-6)
    np.testing.assert_allclose(
        sequence.token_mean(values, LABELS, count=5), np.asarray(values)[used].sum() / 5, rtol=1e-6
    )
    assert sequence.token_mean(values, jnp.full((3, 4), -100)) == 0


LOSSES = ("forward_kl", "reverse_kl", "symmetric_kl", "js", "jsd", "total_variation", "skewed_kl", "skewed_reverse_kl")


@pytest.mark.parametrize("name", LOSSES)
def test_excluded_tokens_of_the_vocabulary_contribute_nothing(name):
    excluded = jnp.where(jnp.arange(7) == 3, -jnp.inf, STUDENT), jnp.where(jnp.arange(7) == 5, -jnp.inf, TEACHER)
    function = lambda s: jnp.sum(getattr(sequence, name)(s, excluded[1]))
    value, gradient = jax.jit(jax.value_and_grad(function))(excluded[0])
    assert np.isfinite(value) and np.all(np.isfinite(gradient)) and not np.any(gradient[..., 3])
