"""Gradients through rounding against the published formulas, and fake quantisation against the real one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize import fake, grids
from research.quantize.grids import Form, Grid
from research.quantize.quantized import dequantize, quantize
from research.quantize.smoothquant import factors, fold

X = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)


@pytest.mark.parametrize(
    "form",
    [Form(4, group=8), Form(3, per_tensor=True), Form(8, axis=-1, rule="absmax"), Form(2, group=12, pad=True)],
    ids=str,
)
def test_fake_and_real_agree_and_the_gradient_passes(form):
    y, back = jax.vjp(lambda x: fake.fake_quantize(x, form), jnp.asarray(X))
    np.testing.assert_array_equal(y, dequantize(quantize(jnp.asarray(X), form)))
    np.testing.assert_array_equal(back(jnp.ones_like(y))[0], np.ones_like(X))  # codes at the ends count too


def test_numbers_beyond_the_range_have_no_gradient():
    grid = Grid(jnp.ones((1, 1)), jnp.ones((1, 1)))
    x = jnp.asarray([[-1.4], [-1.6], [2.4], [2.6]])
    slope = jax.grad(lambda x: jnp.sum(fake.fake_quantize(x, Form(2), grid)))(x)
    np.testing.assert_array_equal(slope[:, 0], [1, 0, 1, 0])


def test_the_step_of_lsq_has_the_published_gradient():
    x, step = jnp.asarray(X[:, 0]), jnp.float32(0.3)
    low, high = -4, 3
    v = X[:, 0] / 0.3
    expected = np.where(v <= low, low, np.where(v >= high, high, np.round(v) - v))
    for examples, scale in ((None, 1.0), (32, (32 * 3) ** -0.5)):
        found = jax.grad(lambda s, e=examples: jnp.sum(fake.lsq(x, s, 3, True, e)))(step)
        np.testing.assert_allclose(found, expected.sum() * scale, rtol=1e-4)
    slopes = jax.grad(lambda x: jnp.sum(fake.lsq(x, step, 3, True)))(x)
    np.testing.assert_array_equal(slopes, (v >= low) & (v <= high))
    np.testing.assert_array_equal(fake.lsq(x, step, 3, True, 32), fake.lsq(x, step, 3, True))


def test_clipping_that_is_wide_open_is_the_grid_itself():
    form = Form(3, group=8, rule="omniquant")
    wide = jnp.full((4, 6), 40.0)
    np.testing.assert_array_equal(
        fake.learnable_clip(jnp.asarray(X), wide, wide, form), fake.fake_quantize(jnp.asarray(X), form)
    )
    with pytest.raises(ValueError, match="rule: 'gptq' has no learnable clipping"):
        fake.learnable_clip(jnp.asarray(X), wide, wide, Form(3, group=8))


def test_quotients_are_those_of_numpy_under_jit():
    m = np.abs(X).max(0, keepdims=True)
    steps = jax.jit(lambda m: grids.divide(m + m, 3))(m)
    np.testing.assert_array_equal(steps, (m + m) / np.float32(3))
    np.testing.assert_array_equal(jax.jit(grids.divide)(X, steps), X / np.asarray(steps))


def test_smoothing_changes_no_product():
    x, scale = X[:6], np.linspace(0.5, 2, 6).astype(np.float32)
    kernels = [jnp.asarray(X[6:12]), jnp.asarray(X[12:18])]
    by = factors(jnp.abs(x * scale).max(0), kernels)
    (folded,), smoothed = fold([jnp.asarray(scale)], kernels, by)
    for before, after in zip(kernels, smoothed, strict=True):
        np.testing.assert_allclose((x * folded[None]) @ after, (x * scale) @ before, rtol=1e-4, atol=1e-5)
