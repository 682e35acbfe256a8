"""Logit losses: equality with optax, and what their definitions promise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.distill import losses
from research.distill.logits import bkd, dist, dkd, dkd_parts, hard, kd, kd_and_labels

B, C = 6, 5


def draw(*shape, seed=0, scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


STUDENT, TEACHER = draw(B, C, seed=1), draw(B, C, seed=2)
LABELS = jnp.asarray([0, 3, 1, 4, 4, 2], jnp.int32)
DIVERGENCES = ("kd", "dkd", "dist", "lskd", "multilevel", "reverse_kl", "js", "total_variation", "skewed_reverse_kl")


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_is_optax_kl_times_the_square_of_the_temperature(temperature):
    log_s, p_t = jax.nn.log_softmax(STUDENT / temperature), jax.nn.softmax(TEACHER / temperature)
    expected = temperature**2 * optax.kl_divergence(log_s, p_t)
    np.testing.assert_allclose(kd(STUDENT, TEACHER, temperature=temperature), expected, rtol=2e-5)


def test_soft_cross_entropy_form_differs_by_the_teachers_entropy_only():
    expected = optax.softmax_cross_entropy(STUDENT / 3.0, jax.nn.softmax(TEACHER / 3.0)) * 9
    np.testing.assert_allclose(kd(STUDENT, TEACHER, temperature=3.0, entropy=False), expected, rtol=1e-5)
    gradient = [jax.grad(lambda s, e=e: jnp.sum(kd(s, TEACHER, temperature=3.0, entropy=e)))(STUDENT) for e in (0, 1)]
    np.testing.assert_allclose(*gradient, rtol=1e-5)


def test_bkd_and_hard_are_optax_losses():
    binary = optax.sigmoid_binary_cross_entropy(STUDENT, jax.nn.softmax(TEACHER))
    np.testing.assert_allclose(bkd(STUDENT, TEACHER), jnp.mean(binary, -1), rtol=1e-6)
    expected = optax.softmax_cross_entropy_with_integer_labels(STUDENT, jnp.argmax(TEACHER, -1))
    np.testing.assert_allclose(hard(STUDENT, TEACHER), expected, rtol=1e-6)


def test_dkd_parts_are_optax_divergences_of_the_two_distributions():
    others = np.arange(C)[None, :] != np.asarray(LABELS)[:, None]
    own = {}
    for name, z in (("s", STUDENT), ("t", TEACHER)):
        p = np.asarray(jax.nn.softmax(z / 2))
        p_y = p[np.arange(B), LABELS]
        own[name] = np.stack([p_y, 1 - p_y], -1), jax.nn.softmax(np.asarray(z)[others].reshape(B, C - 1) / 2)
    target, rest = dkd_parts(STUDENT, TEACHER, LABELS, temperature=2.0)
    np.testing.assert_allclose(target, 4 * optax.kl_divergence(jnp.log(own["s"][0]), own["t"][0]), rtol=1e-4)
    np.testing.assert_allclose(rest, 4 * optax.kl_divergence(jnp.log(own["s"][1]), own["t"][1]), rtol=1e-4)


def test_torchdistill_returns_the_bare_divergence_without_labels_or_alpha():
    bare = kd(STUDENT, TEACHER, temperature=4.0) / 16
    for labels, alpha in ((None, 0.5), (LABELS, 0), (LABELS, None)):
        found = kd_and_labels(STUDENT, TEACHER, labels, temperature=4.0, alpha=alpha)
        np.testing.assert_allclose(found, bare, rtol=1e-6)
    mixed = kd_and_labels(STUDENT, TEACHER, LABELS, temperature=4.0, alpha=0.3, beta=2.0)
    labelled = 0.3 * optax.softmax_cross_entropy_with_integer_labels(STUDENT, LABELS)
    np.testing.assert_allclose(mixed, labelled + 2 * 16 * bare, rtol=1e-5)


def test_deits_mean_over_elements_is_a_class_count_weaker():
    np.testing.assert_allclose(kd(STUDENT, TEACHER, mean_classes=True), kd(STUDENT, TEACHER) / C, rtol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_logits_have_no_loss_and_no_gradient(name):
    mean = lambda s, t: jnp.mean(losses.LOSSES[name](s, t, LABELS))
    value, gradient = jax.jit(jax.value_and_grad(mean))(TEACHER, TEACHER)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_squaring_the_temperature_keeps_the_gradient():
    # For high temperatures the gradient of T^2 KL tends to (s - t) centred / C, and without T^2 it falls off as 1/T^2.
    limit = (STUDENT - jnp.mean(STUDENT, -1, keepdims=True) - TEACHER + jnp.mean(TEACHER, -1, keepdims=True)) / C
    grad = lambda square: jax.grad(lambda s: jnp.sum(kd(s, TEACHER, temperature=30.0, square=square)))(STUDENT)
    np.testing.assert_allclose(grad(True), limit, atol=7e-2)
    np.testing.assert_allclose(grad(False) * 30.0**2, grad(True), rtol=1e-3, atol=1e-5)


def test_dkd_with_the_teachers_own_weight_is_kd():
    # Zhao et al. 2022, eq. 6: KL = KL(b_t || b_s) + (1 - p_y of the teacher) KL(q_t || q_s).
    rest = 1 - jnp.take_along_axis(jax.nn.softmax(TEACHER / 4), LABELS[:, None], 1)[:, 0]
    decoupled = dkd(STUDENT, TEACHER, LABELS, temperature=4.0, alpha=1.0, beta=rest)
    np.testing.assert_allclose(decoupled, kd(STUDENT, TEACHER, temperature=4.0), rtol=1e-4)


def test_dkd_takes_the_largest_class_of_soft_labels():
    soft = 0.6 * jax.nn.one_hot(LABELS, C) + 0.4 * jax.nn.one_hot(LABELS[::-1], C)
    np.testing.assert_array_equal(dkd(STUDENT, TEACHER, soft), dkd(STUDENT, TEACHER, LABELS))


def test_dkd_of_two_classes_is_the_binary_divergence():
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(dkd(s, TEACHER[:, :2], LABELS % 2)))(STUDENT[:, :2])
    np.testing.assert_allclose(value, jnp.sum(kd(STUDENT[:, :2], TEACHER[:, :2])), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_dkd_needs_labels():
    with pytest.raises(ValueError, match="needs the labels"):
        dkd(STUDENT, TEACHER)


@settings(max_examples=15, deadline=None)
@given(scale=st.lists(st.floats(0.2, 1.0), min_size=B, max_size=B))
def test_dist_within_rows_is_invariant_to_affine_maps_of_each_row(scale):
    # Mixing a row's probabilities with the uniform distribution is affine and keeps them probabilities.
    a = jnp.asarray(scale, jnp.float32)[:, None]
    moved = jnp.log(a * jax.nn.softmax(STUDENT) + (1 - a) / C)
    rows = lambda s: dist(s, TEACHER, gamma=0.0)
    np.testing.assert_allclose(rows(moved), rows(STUDENT), rtol=1e-4, atol=1e-5)


def test_dist_between_rows_sees_the_batch():
    columns = lambda s, t: dist(s, t, beta=0.0)
    halves = (columns(STUDENT[:3], TEACHER[:3]) + columns(STUDENT[3:], TEACHER[3:])) / 2
    assert abs(float(columns(STUDENT, TEACHER) - halves)) > 1e-2
    order = np.random.default_rng(0).permutation(B)
    np.testing.assert_allclose(columns(STUDENT[order], TEACHER[order]), columns(STUDENT, TEACHER), rtol=1e-5)


def test_dist_takes_all_pixels_as_rows():
    maps = STUDENT.reshape(2, 1, 3, C), TEACHER.reshape(2, 1, 3, C)
    np.testing.assert_allclose(dist(*maps), dist(STUDENT, TEACHER), rtol=1e-6)


def test_dist_of_one_row_is_refused():
    with pytest.raises(ValueError, match="dist relates"):
        dist(STUDENT[:1], TEACHER[:1])


def test_classes_masked_out_by_minus_infinity_are_silent():
    masked = jnp.where(jnp.arange(C) == 2, -jnp.inf, STUDENT), jnp.where(jnp.arange(C) == 2, -jnp.inf, TEACHER)
    kept = np.asarray([0, 1, 3, 4])
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(kd(s, masked[1])))(masked[0])
    np.testing.assert_allclose(value, jnp.sum(kd(STUDENT[:, kept], TEACHER[:, kept])), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("name", [name for name in losses.LOSSES if name not in losses.RELATIONAL])
def test_padded_examples_are_masked_outside(name):
    function = losses.LOSSES[name]
    mask = jnp.asarray([1, 1, 1, 1, 0, 0], jnp.float32)

    def mean(student):
        return jnp.sum(mask * function(student, TEACHER, LABELS)) / jnp.sum(mask)

    value, gradient = jax.value_and_grad(mean)(STUDENT)
    np.testing.assert_allclose(value, jnp.mean(function(STUDENT[:4], TEACHER[:4], LABELS[:4])), rtol=1e-6)
    assert np.any(gradient[:4]) and not np.any(gradient[4:])


def test_relational_losses_are_those_that_return_scalars():
    ranks = {name: jax.eval_shape(f, STUDENT, TEACHER, LABELS).ndim for name, f in losses.LOSSES.items()}
    assert {name for name, rank in ranks.items() if rank == 0} == losses.RELATIONAL


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'dist'"):
        losses.pick(losses.LOSSES, "dits")
