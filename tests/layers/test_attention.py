"""Attention against its definition in NumPy, and what must not change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers.attention import Attention, attend


def draw(*shape, seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def softmax_attention(q, k, v, bias=0.0):
    q, k, v, bias = (np.asarray(x, np.float64) for x in (q, k, v, bias))
    scores = q @ np.swapaxes(k, -1, -2) / np.sqrt(q.shape[-1]) + bias
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


@pytest.mark.parametrize("bias", [None, (3, 5, 7), (2, 1, 5, 7), (1, 3, 5, 1)])
def test_is_softmax_attention(bias):
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 8, seed=2)
    added = None if bias is None else draw(*bias, seed=3)
    expected = softmax_attention(q, k, v, 0.0 if bias is None else added)
    np.testing.assert_allclose(attend(q, k, v, added), expected, rtol=2e-5, atol=2e-6)


def test_gradient_is_that_of_softmax_attention():
    q, k, v = (draw(2, 2, 6, 4, seed=s) for s in range(3))

    def plain(q, k, v):
        return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 2, axis=-1) @ v

    gradient = lambda f: jax.grad(lambda *t: jnp.sum(jnp.sin(f(*t))), argnums=(0, 1, 2))(q, k, v)
    for ours, expected in zip(gradient(attend), gradient(plain), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_huge_scores_stay_finite():
    q, k, v = (1e3 * draw(1, 1, 4, 8, seed=s) for s in range(3))
    values, gradient = jax.value_and_grad(lambda q: jnp.sum(attend(q, k, v)))(q)
    assert np.isfinite(values) and np.all(np.isfinite(gradient))


def test_bfloat16_is_summed_in_float32():
    # 4096 equal weights: a bfloat16 sum would stop growing at 256.
    k, v = jnp.zeros((1, 1, 4096, 8), jnp.bfloat16), jnp.ones((1, 1, 4096, 8), jnp.bfloat16)
    result = jax.jit(attend)(k[:, :, :1], k, v)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), 1.0, rtol=1e-2)


def test_more_leading_axes_are_a_larger_batch():
    module = Attention(2)
    x = draw(2, 3, 5, 8)
    variables = module.init(jax.random.key(0), x)
    flat = module.apply(variables, x.reshape(6, 5, 8))
    np.testing.assert_allclose(module.apply(variables, x), flat.reshape(x.shape), atol=1e-6)


def test_a_bias_of_all_keys_changes_nothing():
    x = 3 * draw(2, 5, 8)
    without, full = Attention(2, key_bias=False), Attention(2)
    params = without.init(jax.random.key(0), x)["params"]
    q, v = draw(8, seed=1), draw(8, seed=2)
    params = {**params, "q_bias": q, "v_bias": v}
    expected = without.apply({"params": params}, x)
    qkv = {**params["qkv"], "bias": jnp.concatenate([q, 7 * draw(8, seed=3), v])}
    np.testing.assert_allclose(full.apply({"params": {"qkv": qkv, "proj": params["proj"]}}, x), expected, atol=1e-5)
    assert float(jnp.max(jnp.abs(expected - without.apply({"params": {**params, "q_bias": 0 * q}}, x)))) > 1e-5


def test_channels_that_do_not_divide_into_heads_are_refused():
    with pytest.raises(ValueError, match="num_heads=3"):
        Attention(3).init(jax.random.key(0), draw(1, 4, 8))
