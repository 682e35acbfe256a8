"""What the CIFAR networks do differently from their ImageNet relatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research import backbones
from research.backbones import cifar_wrn
from tests.backbones import drawn

IMAGE = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)


def outputs(name, image=IMAGE):
    model = backbones.create(name)
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], image)


@pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8"])
def test_a_hundred_classes_and_their_own_statistics(name):
    assert outputs(name)[0].shape == (2, 100)
    assert backbones.input_spec(name) == backbones.Input(32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 1.0)


def test_wide_preactivations_are_what_the_next_stage_reads():
    model = cifar_wrn.build(depth=10, num_classes=3)
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = drawn.variables(model, images)
    _, endpoints = jax.jit(model.apply)(variables, images)
    stats, params = (variables[kind]["block2_0"]["bn1"] for kind in ("batch_stats", "params"))
    expected = (np.asarray(endpoints["stage1"]) - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    expected = expected * params["scale"] + params["bias"]
    np.testing.assert_allclose(endpoints["stage1_preact"], expected, atol=1e-5)
    pooled = np.maximum(endpoints["stage3_preact"], 0).mean((1, 2))
    np.testing.assert_allclose(endpoints["pooled"], pooled, rtol=1e-5, atol=1e-6)


def test_a_wide_depth_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="6n"):
        cifar_wrn.build(depth=18)


@pytest.mark.parametrize("side, last", [(32, 4), (64, 4)])
def test_vgg_pools_once_more_on_larger_images(side, last):
    shape = outputs("vgg8", jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32))[1]["stage4"].shape
    assert shape == (2, last, last, 512)
