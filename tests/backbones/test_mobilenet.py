"""Networks of mobile blocks (MobileNetV2, V3, EfficientNet): notation, widths, endpoints, padding, initial weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import create, efficientnet, input_spec, mobilenet, mobilenet_v3
from research.layers import mobile
from tests.backbones import drawn

SMALL = {"stages": (("ds_r1_c8",), ("ir_r2_s2_e6_c8",), ("ir_r1_s2_e2_c16",)), "stem": 8, "head": 24, "num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 33, 18, 3))


@pytest.fixture(scope="module")
def variables(images):
    return drawn.variables(mobilenet.build(**SMALL), images)


@pytest.mark.parametrize("channels, width", [(3, 8), (11.2, 16), (12, 16), (24 * 1.4, 32), (160 * 1.4, 224), (16, 16)])
def test_widths_are_multiples_of_eight_and_lose_at_most_a_tenth(channels, width):
    assert mobile.round_width(channels) == width


def test_the_notation_of_blocks_is_read():
    read = mobile.row("ir_r2_k5_s2_e3.67_c40_se0.25_nhs_noskip")
    assert read == ("ir", 2, 5, 2, 3.67, 40, 0.25, "hard_swish", False)
    assert mobile.row("ds_c16") == mobile.Row("ds", channels=16)


@pytest.mark.parametrize("text, found", [("ir_r2_x5", "'x5'"), ("er_r1_k3", "'er'"), ("ds_nxx", "'nxx'")])
def test_a_block_there_is_not_is_refused(text, found):
    with pytest.raises(ValueError, match=f"'{text}'.*{found}"):
        efficientnet.build(stages=((text,),))


@pytest.mark.parametrize("changes, message", [({"act": "mish"}, "act: 'mish'"), ({"pad_type": "valid"}, "pad_type")])
def test_options_there_are_not_are_refused(changes, message):
    for family in (mobilenet, mobilenet_v3):
        with pytest.raises(ValueError, match=message):
            family.build(**changes)


def test_squeeze_excite_has_the_width_of_its_network():
    # 8 channels, expanded to 24: MobileNetV3 takes a quarter of 24 to the next multiple of 8, EfficientNet one of 8.
    stages, images = (("ir_r1_k3_s1_e3_c8_se0.25",),), jnp.zeros((1, 8, 8, 3))
    for family, width in ((mobilenet_v3, 8), (efficientnet, 2)):
        params = jax.eval_shape(family.build(stages=stages, stem=8).init, jax.random.key(0), images)["params"]
        assert params["blocks_0_0"]["se"]["conv_reduce"]["kernel"].shape == (1, 1, 24, width)


def test_the_head_of_v3_comes_after_the_pooling():
    model = create("mobilenetv3_small_100")
    shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0][1], jnp.zeros((1, 224, 224, 3)))
    found = {name: value.shape[1:] for name, value in shapes.items()}
    assert found["features"] == (7, 7, 576) and found["pooled"] == (1024,)
    assert [found[f"stage{k}"] for k in (1, 2, 3, 4)] == [(56, 56, 16), (28, 28, 24), (14, 14, 48), (7, 7, 96)]


def test_tensorflow_pads_the_odd_pixel_at_the_end():
    ones = {"params": {"kernel": jnp.ones((3, 3, 1, 1))}}
    counted = lambda same: mobile.depthwise(1, 3, 2, same=same).apply(ones, jnp.ones((1, 4, 4, 1)))[0, :, :, 0]
    np.testing.assert_array_equal(counted(True), [[9, 6], [6, 4]])
    np.testing.assert_array_equal(counted(False), [[4, 6], [6, 9]])


def test_inputs_follow_the_weights():
    assert input_spec("efficientnet_b3").size == 288 and input_spec("tf_efficientnet_b3").size == 300
    assert input_spec("tf_mobilenetv3_large_100").mean == (0.5, 0.5, 0.5)


def test_endpoints_are_the_maps_that_distillation_taps():
    # Shapes of the official feature list, indices 2, 5, 12 and 17 of Hao840/OFAKD's MobileNetV2.
    shapes = jax.eval_shape(
        lambda x: create("mobilenetv2_100").init_with_output(jax.random.key(0), x)[0][1], jnp.zeros((1, 224, 224, 3))
    )
    found = {name: shapes[name].shape[1:] for name in ("stage1", "stage2", "stage3", "features", "pooled")}
    assert found == {
        "stage1": (56, 56, 24),
        "stage2": (28, 28, 32),
        "stage3": (14, 14, 96),
        "features": (7, 7, 1280),
        "pooled": (1280,),
    }
    assert shapes["stage4"].shape == (1, 7, 7, 320)


def test_odd_images_and_narrow_networks_keep_the_head(variables, images):
    logits, endpoints = jax.jit(mobilenet.build(**SMALL).apply)(variables, images)
    assert logits.shape == (4, 5)
    assert {name: x.shape[1:3] for name, x in endpoints.items() if x.ndim == 4} == {
        "stem": (17, 9),
        "stage1": (9, 5),
        "stage2": (5, 3),
        "features": (5, 3),
    }
    half = jax.eval_shape(mobilenet.build(**SMALL, width=0.5).init, jax.random.key(0), images)["params"]
    assert half["conv_head"]["kernel"].shape == (1, 1, 8, 24)


def test_initial_weights_follow_the_recipe():
    params = jax.jit(mobilenet.build(**{**SMALL, "stem": 64, "num_classes": 400}).init)(
        jax.random.key(0), jnp.zeros((1, 8, 8, 3))
    )["params"]
    depthwise = params["blocks_0_0"]["conv_dw"]["kernel"]
    assert np.std(depthwise) == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert np.std(params["conv_stem"]["kernel"]) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    assert 0.9 / 20 < np.max(np.abs(params["classifier"]["kernel"])) <= 1 / 20


def test_training_moves_the_running_statistics_and_groups_see_only_themselves(variables, images):
    def forward(group):
        model = mobilenet.build(**SMALL, bn_group=group)
        return jax.jit(lambda x: model.apply(variables, x, train=True, mutable=["batch_stats"]))

    (grouped, _), updates = forward(2)(images)
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), updates["batch_stats"], variables["batch_stats"])
    assert min(jax.tree.leaves(moved)) > 0
    (alone, _), _ = forward(None)(images[:2])
    np.testing.assert_allclose(grouped[:2], alone, rtol=1e-4, atol=1e-4)
