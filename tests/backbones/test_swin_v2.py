"""Swin V2's attention, position bias and start, by their meaning. Its numbers are checked by tests/port."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import input_spec, swin_v2
from research.core import optim
from research.layers.attention import Attention
from research.port import names

SMALL = {"img_size": (28, 20), "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 4), "window_size": 3}
SMALL |= {"num_classes": 5}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 28, 20, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(swin_v2.build(**SMALL).init)(jax.random.key(0), images)


def test_offsets_are_log_spaced_and_odd():
    table = swin_v2.log_spaced_offsets((3, 2)).reshape(5, 3, 2)
    np.testing.assert_allclose(table[:, 0, 0], [-np.log2(9) / 3, -np.log2(5) / 3, 0, np.log2(5) / 3, np.log2(9) / 3])
    np.testing.assert_allclose(table[0, :, 1], [-np.log2(9) / 3, 0, np.log2(9) / 3])
    np.testing.assert_allclose(table, -table[::-1, ::-1])


def test_a_larger_window_extends_the_offsets_it_was_trained_with():
    before, after = swin_v2.log_spaced_offsets((4, 4)), swin_v2.log_spaced_offsets((6, 6), pretrained=4)
    np.testing.assert_allclose(after.reshape(11, 11, 2)[2:9, 2:9], before.reshape(7, 7, 2))
    assert np.abs(after).max() > np.abs(before).max()
    assert np.array_equal(swin_v2.log_spaced_offsets((1, 1)), [[0, 0]])


def test_blocks_start_as_the_identity(variables, images):
    logits, endpoints = jax.jit(swin_v2.build(**SMALL).apply)(variables, images)
    np.testing.assert_array_equal(endpoints["stage1"], endpoints["patch_embed"])
    assert logits.shape == (2, 5) and endpoints["stage2"].shape == (2, 4, 3, 16)
    assert endpoints["tokens"].shape == (2, 12, 16)


def test_cosine_attention_forgets_the_length_of_its_queries_and_keys():
    module, x = Attention(2, key_bias=False, cosine=True), jax.random.normal(jax.random.key(0), (3, 5, 8))
    params = jax.jit(module.init)(jax.random.key(1), x)["params"]
    np.testing.assert_allclose(params["logit_scale"], np.full((2, 1, 1), np.log(10)), rtol=1e-6)
    kernel = params["qkv"]["kernel"]
    longer = {**params, "qkv": {"kernel": kernel.at[:, :16].multiply(7.0)}}
    apply = jax.jit(lambda p, x: module.apply({"params": p}, x))
    np.testing.assert_allclose(apply(longer, x), apply(params, x), rtol=1e-4, atol=1e-6)
    # The factor stops growing at 100.
    scaled = lambda value: apply({**params, "logit_scale": jnp.full((2, 1, 1), value)}, x)
    np.testing.assert_array_equal(scaled(np.log(100.0)), scaled(9.0))


def test_keys_of_padding_have_no_direction_and_finite_gradients():
    module, x = Attention(1, key_bias=False, cosine=True), jnp.zeros((1, 4, 4)).at[0, 0].set(1.0)
    variables = jax.jit(module.init)(jax.random.key(1), x)
    gradient = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x)[0, 0])))(variables)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_official_checkpoints_merge_at_the_end_of_a_stage(variables):
    timm, official = (set(names.to_official(variables, rules)) for rules in swin_v2.NAMES.values())
    shared = {"layers.0.blocks.1.attn.cpb_mlp.2.weight", "layers.0.blocks.1.attn.logit_scale"}
    assert {"layers.1.downsample.reduction.weight", "head.fc.bias", *shared} <= timm
    assert {"layers.0.downsample.reduction.weight", "head.bias", *shared} <= official
    state = names.to_official(variables, swin_v2.NAMES["official"])
    for buffer in ("attn_mask", "attn.relative_position_index", "attn.relative_coords_table"):
        state[f"layers.0.blocks.1.{buffer}"] = np.zeros(3)
    back = names.from_official(variables, state, swin_v2.NAMES["official"], ignore=swin_v2.IGNORED)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_weight_decay_spares_what_timm_spares(variables):
    decayed = optim.decayed(variables["params"], swin_v2.NO_DECAY)["layers_0_blocks_0"]
    assert not decayed["position"]["cpb_mlp_0"]["kernel"] and not decayed["attn"]["logit_scale"]
    assert decayed["attn"]["qkv"]["kernel"]


def test_inputs_follow_the_name():
    assert input_spec("swinv2_base_window12to24_192to384") == input_spec("swinv2_tiny_window8_256")._replace(
        size=384, crop=1.0
    )
