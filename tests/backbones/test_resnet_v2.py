"""BiT's standardised convolutions, norms and stem, by their meaning. Its numbers are checked by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import create, resnet_v2
from research.layers.norm import GroupNorm
from research.port import names


def test_filters_are_standardised():
    layer, x = resnet_v2.StdConv(4, 3), jax.random.normal(jax.random.key(0), (1, 6, 6, 2))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 2, 4))
    apply = jax.jit(lambda k: layer.apply({"params": {"kernel": k}}, x))
    np.testing.assert_allclose(apply(3 * kernel + 5), apply(kernel), rtol=1e-3, atol=1e-3)
    unit = (kernel - kernel.mean((0, 1, 2))[None, None, None]) / kernel.std((0, 1, 2))[None, None, None]
    expected = jax.lax.conv_general_dilated(x, unit, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(apply(kernel), expected, rtol=1e-4, atol=1e-4)


def test_group_norm_sees_one_example_and_one_group():
    layer, x = GroupNorm(2), jax.random.normal(jax.random.key(0), (3, 5, 4, 6))
    variables = {"params": {"scale": jnp.ones(6), "bias": jnp.zeros(6)}}
    y = np.asarray(layer.apply(variables, x)).reshape(3, 20, 2, 3)
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(y.std((1, 3)), 1, atol=1e-3)
    np.testing.assert_allclose(layer.apply(variables, x[:1]), layer.apply(variables, x)[:1], atol=1e-6)
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
        GroupNorm(4).apply(variables, x)


def test_the_stem_pools_against_zeros():
    model = resnet_v2.build(layers=(1,), channels=(16,), stem_chs=8, groupnorm_groups=2, num_classes=3)
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 3))
    variables = jax.jit(model.init)(jax.random.key(1), x)
    _, endpoints = jax.jit(model.apply)(variables, x)
    stem = np.pad(np.asarray(endpoints["stem"]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    corner = stem[0, :3, :3].max((0, 1))
    np.testing.assert_array_equal(endpoints["stem_pooled"][0, 0, 0], corner)
    assert corner.min() >= 0 > np.asarray(endpoints["stem"]).min()


def test_endpoints_and_the_head_that_is_a_convolution():
    model = create("resnetv2_50x1_bit")
    logits, endpoints = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x)[0], jnp.zeros((2, 224, 224, 3))
    )
    found = {name: value.shape[1:] for name, value in endpoints.items()}
    assert logits.shape == (2, 1000) and found["pooled"] == (2048,)
    assert found["stem"] == (112, 112, 64) and found["stem_pooled"] == (56, 56, 64)
    assert [found[f"stage{k}"] for k in range(1, 5)] == [(56, 56, 256), (28, 28, 512), (14, 14, 1024), (7, 7, 2048)]
    small = {"params": {"head_fc": {"kernel": np.zeros((4, 3)), "bias": np.zeros(3)}}}
    state = names.to_official(small, resnet_v2.NAMES["timm"])
    assert {name: array.shape for name, array in state.items()} == {
        "head.fc.weight": (3, 4, 1, 1),
        "head.fc.bias": (3,),
    }
