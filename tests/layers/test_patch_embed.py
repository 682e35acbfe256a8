"""Patch embedding as the matrix product it is, and its sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.patch_embed import PatchEmbed, grid


def test_is_a_product_with_every_patch():
    images = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    module = PatchEmbed(5, (3, 2))
    tokens, variables = module.init_with_output(jax.random.key(1), images)
    kernel, bias = (np.asarray(variables["params"]["proj"][k]) for k in ("kernel", "bias"))
    assert tokens.shape == (2, 3, 4, 5)
    patch = np.asarray(images)[1, 3:6, 4:6].ravel()
    np.testing.assert_allclose(tokens[1, 1, 2], patch @ kernel.reshape(-1, 5) + bias, atol=1e-5)


def test_a_remainder_is_left_out():
    images = jnp.zeros((1, 11, 17, 3))
    tokens, _ = PatchEmbed(4, 4).init_with_output(jax.random.key(0), images)
    assert tokens.shape[1:3] == grid((11, 17), 4) == (2, 4)


def test_initial_values_are_those_of_a_torch_convolution():
    params = PatchEmbed(512, 4).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]["proj"]
    bound = 48**-0.5
    for value in params.values():
        assert bound * 0.98 < float(jnp.max(jnp.abs(value))) <= bound
        np.testing.assert_allclose(jnp.std(value), bound / 3**0.5, rtol=0.05)


def test_another_image_size_names_both_and_the_remedy():
    with pytest.raises(ValueError, match=r"32x24 .* built for 32x32.*img_size=\(32, 24\)"):
        PatchEmbed(4, 8, image=32).init(jax.random.key(0), jnp.zeros((1, 32, 24, 3)))
