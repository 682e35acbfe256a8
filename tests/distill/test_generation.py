"""MGD and ViTKD: what is masked, what is generated, what counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.distill import generation, losses

RNG = np.random.default_rng(0)
STUDENT, TEACHER = (jnp.asarray(RNG.normal(size=(3, 4, 4, c)), jnp.float32) for c in (5, 6))


def test_masks_remove_the_stated_share():
    uniform = jnp.asarray(RNG.uniform(size=(50, 1, 1, 200)), jnp.float32)
    np.testing.assert_allclose(1 - jnp.mean(generation.channel_mask(uniform)), 0.15, atol=0.01)
    np.testing.assert_allclose(1 - jnp.mean(generation.spatial_mask(uniform)), 0.65, atol=0.01)
    removed = generation.removed_tokens(uniform[:, 0, 0, :15], 0.4)
    np.testing.assert_array_equal(jnp.sum(removed, -1), 15 - int(15 * 0.6))
    kept = np.where(np.asarray(removed) > 0, -1, np.asarray(uniform[:, 0, 0, :15]))
    assert np.all(kept.max(-1) < np.where(np.asarray(removed) > 0, uniform[:, 0, 0, :15], 2).min(-1))


def test_masked_channels_do_not_reach_the_output():
    module = generation.Masked(6)
    variables = module.init(jax.random.key(0), TEACHER, jnp.ones((1, 1, 1, 1)))
    assert "align" not in variables["params"]
    mask = jnp.asarray([1.0, 0, 1, 1, 0, 1])[None, None, None, :]
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(module.apply(variables, x, mask))))(TEACHER)
    assert np.any(gradient[..., 0]) and not np.any(gradient[..., [1, 4]])


def test_mgd_is_a_weighted_sum_of_squares():
    generated = TEACHER + 0.5
    np.testing.assert_allclose(generation.mgd(generated, TEACHER, alpha=2.0), np.full(3, 2 * 0.25 * 96), rtol=1e-5)
    with pytest.raises(ValueError, match="maps of one shape"):
        generation.mgd(STUDENT, TEACHER)


def test_only_removed_tokens_are_asked_of_the_generation():
    tokens = jnp.asarray(RNG.normal(size=(2, 9, 6)), jnp.float32)
    removed = jnp.asarray([[1, 0, 1, 0, 0, 0, 0, 0, 0]] * 2, jnp.float32)
    shallow = [tokens, 2 * tokens]
    known = [tokens + 1, 2 * tokens]
    options = {"alpha": 0.5, "beta": 3.0, "ratio": 0.25}
    found = generation.vitkd(shallow, tokens + 2, known, tokens, removed, **options)
    expected = 0.5 * 9 * 6 + 3.0 / 0.25 * 2 * 6 * 4
    np.testing.assert_allclose(found, [expected] * 2, rtol=1e-5)


def test_removed_tokens_are_hidden_from_the_generation():
    module = generation.TokenGeneration(7)
    tokens = jnp.asarray(RNG.normal(size=(2, 9, 6)), jnp.float32)
    removed = jnp.asarray([[0, 1, 0, 0, 1, 0, 0, 0, 1]] * 2, jnp.float32)
    variables = module.init(jax.random.key(0), [tokens], tokens, removed)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(module.apply(variables, [tokens], x, removed)[1])))(tokens)
    np.testing.assert_array_equal(np.any(gradient, axis=-1), np.asarray(removed) == 0)
    with pytest.raises(ValueError, match="drop class tokens"):
        module.init(jax.random.key(0), [tokens], tokens[:, :8], removed[:, :8])


@pytest.mark.parametrize("mask", ["channel", "spatial"])
def test_the_hint_draws_anew_with_every_key(mask):
    hint, endpoints = losses.HINTS["mgd"](mask=mask), ({"stage1": STUDENT}, {"stage1": TEACHER})
    params, state = hint.init(jax.random.key(0), *endpoints)
    apply = jax.jit(lambda key: hint.apply(params, state, *endpoints, key=key)[0])
    assert apply(jax.random.key(1)) == apply(jax.random.key(1)) != apply(jax.random.key(2))
    with pytest.raises(ValueError, match="random key"):
        hint.apply(params, state, *endpoints)
    with pytest.raises(ValueError, match="'channel' or 'spatial'"):
        losses.HINTS["mgd"](mask="both")
