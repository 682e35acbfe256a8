"""Adaptors and losses of feature maps, against plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill.features import ABF, ConvReg, Review, adaptive_pool, hcl, mse, nearest, review

RNG = np.random.default_rng(0)


def maps(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("size, out", [((7, 5), (4, 2)), ((8, 8), (4, 4)), ((5, 3), (1, 1)), ((3, 6), (2, 4))])
def test_adaptive_pool_averages_torchs_bins(size, out):
    x = maps(2, *size, 3)
    expected = np.zeros((2, *out, 3))
    for i, j in np.ndindex(*out):
        top, bottom = i * size[0] // out[0], -(-(i + 1) * size[0] // out[0])
        left, right = j * size[1] // out[1], -(-(j + 1) * size[1] // out[1])
        expected[:, i, j] = np.asarray(x)[:, top:bottom, left:right].mean((1, 2))
    np.testing.assert_allclose(adaptive_pool(x, out), expected, rtol=1e-5, atol=1e-6)


def test_nearest_takes_the_floor():
    x = jnp.arange(12.0).reshape(1, 3, 4, 1)
    found = nearest(x, (7, 2))[0, ..., 0]
    np.testing.assert_array_equal(found[:, 0], [0, 0, 0, 4, 4, 8, 8])
    np.testing.assert_array_equal(found[0], [0, 2])


@pytest.mark.parametrize("student, teacher", [((8, 6), (4, 3)), ((3, 5), (6, 10)), ((6, 6), (6, 6)), ((7, 9), (5, 4))])
def test_conv_reg_reaches_the_teachers_map(student, teacher):
    x = maps(2, *student, 3)
    module = ConvReg(5, teacher)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    out, new = jax.jit(functools.partial(module.apply, mutable=["batch_stats"]))(variables, x)
    assert out.shape == (2, *teacher, 5) and np.all(out >= 0)
    assert np.any(new["batch_stats"]["bn"]["mean"])


def test_the_transposed_convolution_is_the_adjoint_of_the_strided_one():
    module = ConvReg(2, (8, 8), relu=False)
    x, y = maps(1, 4, 4, 3), maps(1, 8, 8, 2)
    kernel = module.init(jax.random.key(0), x)["params"]["conv"]["kernel"]
    up = jax.lax.conv_transpose(x, kernel, (2, 2), ((2, 2), (2, 2)), transpose_kernel=True)
    down = jax.lax.conv_general_dilated(y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(jnp.vdot(up, y), jnp.vdot(x, down), rtol=1e-4)


@pytest.mark.parametrize("student, teacher", [((4, 4), (7, 7)), ((8, 8), (4, 5)), ((6, 4), (5, 5))])
def test_conv_reg_refuses_sizes_it_cannot_reach(student, teacher):
    with pytest.raises(ValueError, match="ConvReg"):
        jax.eval_shape(ConvReg(5, teacher).init, jax.random.key(0), maps(2, *student, 3))


def test_mse_is_a_mean_for_each_example_and_holds_the_teacher_constant():
    student, teacher = maps(3, 4, 4, 2), maps(3, 4, 4, 2)
    expected = np.square(np.asarray(student) - np.asarray(teacher)).mean((1, 2, 3))
    np.testing.assert_allclose(mse(student, teacher), expected, rtol=1e-5)
    assert not np.any(jax.grad(lambda t: jnp.sum(mse(student, t)))(teacher))


@pytest.mark.parametrize(
    "side, terms", [(1, {}), (2, {1: 0.5}), (4, {2: 0.5, 1: 0.25}), (9, {4: 0.5, 2: 0.25, 1: 0.125})]
)
def test_hcl_weighs_the_pooled_sizes_below_the_map(side, terms):
    student, teacher = maps(2, side, side, 3), maps(2, side, side, 3)
    total = mse(student, teacher)
    for size, weight in terms.items():
        total += weight * mse(adaptive_pool(student, (size, size)), adaptive_pool(teacher, (size, size)))
    np.testing.assert_allclose(hcl(student, teacher), total / (1 + sum(terms.values())), rtol=1e-5)


def test_review_gives_maps_of_the_teachers_shapes_from_unequal_sizes():
    student = [maps(2, 13, 13, 3), maps(2, 7, 7, 6), maps(2, 1, 1, 9)]
    shapes = [(14, 14, 4), (7, 7, 5), (1, 1, 8)]
    module = Review(max_mid=7)
    shape = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), student, shapes))
    assert [x.shape for x in shape[0]] == [(2, *s) for s in shapes]
    params = shape[1]["params"]
    assert params["abfs_0"]["conv1"]["kernel"].shape == (1, 1, 9, 7) and "attention" not in params["abfs_0"]
    assert params["abfs_2"]["attention"]["kernel"].shape == (1, 1, 14, 2)


def test_the_deepest_level_reaches_the_shallowest():
    shallow, deep, shapes = maps(5, 2, 2, 3), maps(5, 1, 1, 6), [(2, 2, 3), (1, 1, 6)]
    module, target = Review(), maps(5, 2, 2, 3)

    @jax.jit
    def gradient(key):
        def shallowest(deep):
            (out, _), _ = module.init_with_output(key, [shallow, deep], shapes)
            return jnp.vdot(out, target)

        return jax.grad(shallowest)(deep)

    assert np.any(jnp.abs(gradient(jax.random.key(0))) > 1e-3)


def test_review_sums_its_levels():
    levels = [(maps(2, 5, 5, 3), maps(2, 5, 5, 3)), (maps(2, 1, 1, 4), maps(2, 1, 1, 4))]
    np.testing.assert_allclose(review(*zip(*levels, strict=True)), sum(hcl(*level) for level in levels), rtol=1e-6)


def test_adaptors_compute_in_their_dtype():
    module = ABF(4, 5, (2, 2), dtype=jnp.bfloat16)
    out, fused = jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, None)[0], maps(2, 2, 2, 3))
    assert out.dtype == fused.dtype == jnp.bfloat16
