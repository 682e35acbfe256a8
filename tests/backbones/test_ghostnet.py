"""GhostNet's cheap channels, attention and endpoints. Its numbers are checked by tests/port."""

import jax
import jax.numpy as jnp
import pytest

from research.backbones import create, ghostnet


def test_endpoints_are_the_last_map_at_each_resolution():
    model = create("ghostnetv2_100")
    shapes = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0][1], jnp.zeros((1, 224, 192, 3)))
    found = {name: value.shape[1:] for name, value in shapes.items()}
    assert [found[f"stage{k}"] for k in (1, 2, 3, 4)] == [(56, 48, 24), (28, 24, 40), (14, 12, 112), (7, 6, 160)]
    assert (found["stem"], found["features"], found["pooled"]) == ((112, 96, 16), (7, 6, 960), (1280,))


def test_attention_starts_with_the_third_block():
    shapes = jax.eval_shape(create("ghostnetv2_100").init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    plain = {name for name, tree in shapes.items() if "ghost1" in tree and "short_conv_0" not in tree["ghost1"]}
    assert plain == {"blocks_0_0", "blocks_1_0"}


def test_an_odd_number_of_channels_cuts_the_cheap_half():
    module, x = ghostnet.Ghost(5), jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    variables = jax.jit(module.init, static_argnums=2)(jax.random.key(1), x, False)
    assert variables["params"]["primary_conv_0"]["kernel"].shape == (1, 1, 3, 3)
    assert variables["params"]["cheap_operation_0"]["kernel"].shape == (3, 3, 1, 3)
    assert module.apply(variables, x, False).shape == (2, 4, 4, 5)


def test_images_too_small_for_the_attention_are_refused():
    with pytest.raises(ValueError, match="attention over a 1x1 map.*33 pixels"):
        jax.eval_shape(create("ghostnetv2_100").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


def test_a_third_version_is_refused():
    with pytest.raises(ValueError, match="version: 'v3'"):
        ghostnet.build(version="v3")
