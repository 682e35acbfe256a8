"""AB, OFD, VID and factor transfer against direct computations and simulations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from research.distill import factors, losses
from research.distill.activations import Likelihood, ab, margins, ofd, vid

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (jnp.asarray(x, jnp.float32) for x in 2 * RNG.normal(size=(2, 3, 4, 4, 5)))


def test_ab_pulls_neurons_beyond_the_margin_on_the_teachers_side():
    student = jnp.asarray([-2.0, -0.5, 0.5, 2.0] * 2).reshape(1, 1, 2, 4)
    teacher = jnp.asarray([-1.0] * 4 + [1.0] * 4).reshape(1, 1, 2, 4)
    # Off: beyond -1 costs nothing. On: beyond 1 costs nothing.
    expected = [0, 0.5**2, 1.5**2, 3**2, 3**2, 1.5**2, 0.5**2, 0]
    np.testing.assert_allclose(ab(student, teacher), [sum(expected)], rtol=1e-6)
    gradient = jax.grad(lambda s: jnp.sum(ab(s, teacher, margin=2.0)))(student)
    assert np.all(gradient[0, 0, 0, 1:] > 0) and np.all(gradient[0, 0, 1, :3] < 0)


def test_margins_are_the_mean_of_what_relu_cuts_off():
    scale, bias = np.asarray([1.0, -2.0, 0.5, 1.0, 0.0, 0.0]), np.asarray([0.3, -1.0, 0.0, 4.0, -0.7, 0.7])
    expected = []
    for s, b in zip(np.abs(scale), bias, strict=True):
        if s == 0:
            expected.append(min(b, 0))
        elif scipy.stats.norm.cdf(-b / s) > 1e-3:
            expected.append(scipy.stats.truncnorm(-np.inf, -b / s, b, s).mean())
        else:
            expected.append(-3 * s)
    found = margins(jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_ofd_spares_a_student_that_is_low_enough():
    margin = jnp.full(5, -0.8)
    expected = np.zeros(3)
    for index in np.ndindex(*STUDENT.shape):
        s, t = float(STUDENT[index]), float(TEACHER[index])
        target = max(t, -0.8)
        expected[index[0]] += (s - target) ** 2 if t > 0 or s > target else 0
    np.testing.assert_allclose(ofd(STUDENT, TEACHER, margin), expected, rtol=1e-5)


def test_the_hint_of_ofd_takes_margins_from_norms_or_from_the_batch():
    endpoints = {"stage1": STUDENT}, {"stage1": TEACHER}
    norms = [(jnp.full(5, 2.0), jnp.zeros(5))]
    values = []
    for options in ({}, {"norms": norms}):
        hint = losses.HINTS["ofd"](**options)
        values.append(hint.apply(*hint.init(jax.random.key(0), *endpoints), *endpoints)[0])
    # The teacher is drawn from N(0, 2^2), so the batch's margins are close to those of the norm.
    np.testing.assert_allclose(*values, rtol=0.1)
    assert values[0] != values[1]
    with pytest.raises(ValueError, match="norms of 2 stages for 1"):
        losses.HINTS["ofd"](norms=norms * 2).init(jax.random.key(0), *endpoints)


def test_vid_is_a_gaussian_likelihood():
    module = Likelihood(5, variance=3.0)
    variables = module.init(jax.random.key(0), STUDENT)
    mean, variance = module.apply(variables, STUDENT)
    np.testing.assert_allclose(variance, 3.0, rtol=1e-5)
    log = scipy.stats.norm(np.asarray(mean), np.sqrt(3)).logpdf(np.asarray(TEACHER)).mean((1, 2, 3))
    np.testing.assert_allclose(vid(mean, variance, TEACHER), -log - np.log(2 * np.pi) / 2, rtol=1e-4)


@pytest.mark.parametrize(("order", "whole"), [(1, False), (2, False), (1, True)])
def test_factors_are_compared_at_unit_length(order, whole):
    def view(x):
        x = np.asarray(x)
        x = (x if whole else (x**2).mean(-1)).reshape(3, -1)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    expected = (np.abs(view(STUDENT) - view(TEACHER)) ** order).mean(-1)
    found = factors.factor(STUDENT, TEACHER, order=order, whole=whole)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_ft_trains_the_paraphraser_first_and_then_keeps_it():
    hint, key = losses.HINTS["ft"](init_epochs=2), jax.random.key(0)
    endpoints = {"stage1": STUDENT}, {"stage1": TEACHER}
    params, state = hint.init(key, *endpoints)
    apply = jax.jit(
        jax.value_and_grad(lambda p, state, epoch: hint.apply(p, state, *endpoints, epoch=epoch), has_aux=True)
    )
    moved = jax.tree.map(lambda x: x + 0.1, params)
    (_, new), first = apply(moved, state, 1)
    assert any(np.any(g) for g in jax.tree.leaves(first["paraphraser"]))
    assert not any(np.any(g) for g in jax.tree.leaves(first["translator"]))
    jax.tree.map(np.testing.assert_array_equal, new["paraphraser"], moved["paraphraser"])
    (_, kept), second = apply(params, new, 2)
    assert not any(np.any(g) for g in jax.tree.leaves(second["paraphraser"]))
    assert any(np.any(g) for g in jax.tree.leaves(second["translator"]))
    jax.tree.map(np.testing.assert_array_equal, kept["paraphraser"], new["paraphraser"])


@pytest.mark.parametrize("name", ["ab", "fsp"])
def test_methods_of_a_first_stage_fall_silent(name):
    hint = losses.HINTS[name](init_epochs=2)
    endpoints = [{"stage1": x, "stage2": x[:, ::2, ::2]} for x in (STUDENT, TEACHER)]
    state = hint.init(jax.random.key(0), *endpoints)
    apply = jax.jit(lambda epoch: hint.apply(*state, *endpoints, epoch=epoch)[0])
    assert apply(1) > 0 and apply(2) == 0
