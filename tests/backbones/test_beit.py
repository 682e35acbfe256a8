"""BEiT's positions, initial values and unfolding of tokens. Its numbers are checked by tests/port."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.backbones import beit
from research.backbones.beit import unpatchify
from research.core import optim

SMALL = {"img_size": (24, 16), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
SMALL |= {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1}


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 24, 16, 3))


@pytest.fixture(scope="module")
def variables(images):
    return jax.jit(beit.build(**SMALL).init)(jax.random.key(0), images)


def test_endpoints_are_named_and_shaped(variables, images):
    logits, endpoints = jax.eval_shape(beit.build(**SMALL).apply, variables, images)
    assert logits.shape == (2, 5)
    shapes = {key: value.shape[1:] for key, value in endpoints.items()}
    assert shapes == {k: (7, 64) for k in ("block01", "block02", "tokens")} | {"patch_embed": (6, 64), "pooled": (64,)}


def test_every_block_has_a_table_and_no_key_bias(variables):
    params = variables["params"]
    assert "pos_embed" not in params
    for name in ("blocks_0", "blocks_1"):
        assert params[name]["position"]["relative_position_bias_table"].shape == (5 * 3 + 3, 2)
        assert set(params[name]["attn"]) == {"qkv", "proj", "q_bias", "v_bias"}
        assert set(params[name]["attn"]["qkv"]) == {"kernel"}


def test_initial_values_shrink_with_depth(variables):
    params = variables["params"]
    for depth, name in enumerate(("blocks_0", "blocks_1"), start=1):
        for layer in (params[name]["attn"]["proj"], params[name]["mlp"]["fc2"]):
            np.testing.assert_allclose(jnp.std(layer["kernel"]), 0.02 / math.sqrt(2 * depth), rtol=0.1)
    np.testing.assert_allclose(jnp.std(params["head"]["kernel"]), 0.02 * 0.001, rtol=0.15)


def test_pooling_leaves_the_class_token_out(variables, images):
    _, endpoints = jax.jit(beit.build(**SMALL).apply)(variables, images)
    mean = np.asarray(endpoints["tokens"])[:, 1:].mean(1)
    normalised = (mean - mean.mean(-1, keepdims=True)) / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(endpoints["pooled"], normalised, rtol=1e-3, atol=1e-4)


def test_weight_decay_spares_what_timm_spares(variables):
    decayed = optim.decayed(variables["params"], beit.NO_DECAY)
    assert not decayed["cls_token"] and not decayed["blocks_1"]["position"]["relative_position_bias_table"]
    assert decayed["blocks_1"]["mlp"]["fc1"]["kernel"]


@pytest.mark.parametrize("p", [1, 2])
def test_unpatchify_puts_every_patch_in_its_place(p):
    rows, columns, channels = 2, 3, 4
    image = np.arange(2 * rows * p * columns * p * channels).reshape(2, rows * p, columns * p, channels)
    tokens = [
        image[:, y * p : y * p + p, x * p : x * p + p].reshape(2, -1) for y in range(rows) for x in range(columns)
    ]
    tokens = jnp.asarray(np.stack(tokens, axis=1))
    np.testing.assert_array_equal(unpatchify(tokens, p, (rows, columns)), image)
    with_class = jnp.concatenate([-tokens[:, :1], tokens], axis=1)
    np.testing.assert_array_equal(unpatchify(with_class, p, (rows, columns)), image)


@pytest.mark.parametrize("count, channels, p", [(6, 8, 2), (9, 6, 2)])
def test_tokens_that_do_not_unfold_are_refused(count, channels, p):
    with pytest.raises(ValueError, match=f"{count} tokens of {channels} channels"):
        unpatchify(jnp.zeros((1, count, channels)), p)
