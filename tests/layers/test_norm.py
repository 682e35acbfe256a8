"""Batch norm against PyTorch's definition and across devices; layer norm and GRN against theirs."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.core import scope
from research.layers.norm import GRN, BatchNorm, LayerNorm

BATCH = 16
LEAVES = (("batch_stats", "mean", "var"), ("params", "scale", "bias"))


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(0), (BATCH, 3, 4, 5)) * 2 + 1


def variables(images):
    scale, bias = jnp.linspace(0.5, 2, 5), jnp.linspace(-1, 1, 5)
    stats = {"mean": jnp.linspace(0, 1, 5), "var": jnp.linspace(1, 2, 5)}
    return {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}


@functools.partial(jax.jit, static_argnums=2)
def apply(variables, images, group=None):
    return BatchNorm(group=group).apply(variables, images, train=True, mutable=["batch_stats"])


def by_definition(variables, images):
    """PyTorch's batch norm in NumPy: biased variance to normalise, unbiased in the running statistics."""
    x, params, stats = np.asarray(images, np.float64), variables["params"], variables["batch_stats"]
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    unbiased = x.var((0, 1, 2), ddof=1)
    running = {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * unbiased}
    return y, running


def test_training_mode_is_the_definition(images):
    v = variables(images)
    expected, running = by_definition(v, images)
    y, updates = apply(v, images)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    for name in ("mean", "var"):
        np.testing.assert_allclose(updates["batch_stats"][name], running[name], rtol=1e-5)


def test_evaluation_uses_the_running_statistics(images):
    v = variables(images)
    (mean, var), (scale, bias) = (map(np.asarray, (v[kind][a], v[kind][b])) for kind, a, b in LEAVES)
    expected = (np.asarray(images) - mean) / np.sqrt(var + 1e-5) * scale + bias
    np.testing.assert_allclose(BatchNorm().apply(v, images, train=False), expected, atol=1e-5)


def test_groups_are_consecutive_examples(images):
    v = variables(images)
    parts = [by_definition(v, images[i : i + 4]) for i in range(0, BATCH, 4)]
    y, updates = apply(v, images, 4)
    np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), atol=1e-5)
    for name in ("mean", "var"):
        expected = np.mean([running[name] for _, running in parts], axis=0)
        np.testing.assert_allclose(updates["batch_stats"][name], expected, rtol=1e-5)


def test_groups_differ_from_the_global_batch(images):
    v = variables(images)
    assert float(jnp.max(jnp.abs(apply(v, images, 4)[0] - apply(v, images)[0]))) > 0.1


@pytest.mark.parametrize("group", [None, 2, 4, 16])
@pytest.mark.parametrize("devices", [2, 8])
def test_pmap_is_jit(images, group, devices):
    """Groups smaller than a device's share, equal to it and spread over several devices."""
    v = variables(images)

    def share(v, images):
        with scope.batch_axis("data"):
            return BatchNorm(group=group).apply(v, images, train=True, mutable=["batch_stats"])

    mapped = jax.pmap(share, "data", in_axes=(None, 0), devices=jax.devices()[:devices])
    y, updates = mapped(v, images.reshape(devices, -1, *images.shape[1:]))
    expected, expected_updates = apply(v, images, group)
    np.testing.assert_allclose(y.reshape(images.shape), expected, atol=1e-5)
    for name, value in expected_updates["batch_stats"].items():
        np.testing.assert_allclose(updates["batch_stats"][name], np.stack([value] * devices), rtol=1e-5)


@pytest.mark.parametrize("group", [None, 2, 8])
def test_a_sharded_batch_gives_the_same(images, group):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    v = variables(images)
    y, updates = apply(v, sharded, group)
    expected, expected_updates = apply(v, images, group)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), updates, expected_updates)


@pytest.mark.parametrize("group", [3, 5, 32])
def test_a_batch_that_does_not_divide_is_refused(images, group):
    with pytest.raises(ValueError, match=f"16 examples .* groups of {group}: change `bn_group`"):
        apply(variables(images), images, group)


def test_a_mean_far_from_zero_keeps_the_variance(images):
    v = variables(images)
    v["batch_stats"] = {"mean": jnp.full(5, 1000.0), "var": jnp.ones(5)}
    far, near = apply(v, images + 1000)[0], apply(variables(images), images)[0]
    np.testing.assert_allclose(far, near, atol=2e-3)


def test_bfloat16_keeps_statistics_in_float32(images):
    y, updates = BatchNorm(dtype=jnp.bfloat16).apply(
        variables(images), images.astype(jnp.bfloat16), train=True, mutable=["batch_stats"]
    )
    assert y.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(y.astype(jnp.float32), apply(variables(images), images)[0], atol=0.05)


def test_layer_norm_is_flax_layer_norm_in_float32(images):
    params = {"params": {"scale": jnp.linspace(0.5, 2, 5), "bias": jnp.linspace(-1, 1, 5)}}
    np.testing.assert_allclose(LayerNorm().apply(params, images), nn.LayerNorm().apply(params, images), atol=1e-5)
    narrow = LayerNorm(dtype=jnp.bfloat16).apply(params, images.astype(jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


def test_grn_is_its_equations(images):
    scale, bias = np.linspace(-1, 1, 5), np.linspace(0, 1, 5)
    x = np.asarray(images, np.float64)
    norm = np.sqrt((x**2).sum((1, 2), keepdims=True))
    expected = scale * (x * norm / (norm.mean(-1, keepdims=True) + 1e-6)) + bias + x
    params = {"params": {"scale": jnp.asarray(scale, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}
    np.testing.assert_allclose(GRN().apply(params, images), expected, rtol=1e-5, atol=1e-5)


def test_grn_of_a_dead_channel_has_a_finite_gradient(images):
    dead = images.at[..., 0].set(0)
    params = {"params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(GRN().apply(params, x))))(dead)
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(jnp.max(jnp.abs(gradient[..., 1:]))) > 0
