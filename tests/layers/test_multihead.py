"""Attention of language models against NumPy, and what tokens see with padding and a cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers import multihead
from research.layers.multihead import KeyValues, MultiHead


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("kv_heads, scaled, bias_heads", [(4, True, 1), (2, True, 4), (2, False, 1), (4, False, 4)])
def test_heads_attend_as_in_numpy(kv_heads, scaled, bias_heads):
    """Also while training, when no weight happens to be dropped."""
    module = MultiHead(
        4, 3, kv_heads, use_bias=True, scaled=scaled, dropout=1e-9, kernel_init=jax.nn.initializers.normal(1)
    )
    x, other = (jax.random.normal(jax.random.key(i), (2, n, 5)) for i, n in ((0, 3), (1, 6)))
    bias = jax.random.normal(jax.random.key(2), (2, bias_heads, 3, 6))
    look = lambda m, train: m(x, m.keys_values(other), bias, train=train)

    @jax.jit
    def run(key):
        variables = module.init(key, method=lambda m: look(m, False))
        outputs = [
            module.apply(variables, train, method=look, rngs={"dropout": jax.random.key(4)}) for train in (False, True)
        ]
        return variables, outputs

    variables, outputs = run(jax.random.key(3))
    params = jax.tree.map(np.asarray, variables["params"])
    dense = lambda name, y: np.asarray(y) @ params[name]["kernel"] + params[name]["bias"]
    split = lambda y: y.reshape(2, -1, y.shape[-1] // 3, 3).swapaxes(1, 2)
    q, k, v = split(dense("q_proj", x)), split(dense("k_proj", other)), split(dense("v_proj", other))
    k, v = (np.repeat(y, 4 // kv_heads, axis=1) for y in (k, v))
    weights = softmax(q @ k.swapaxes(-1, -2) * (3**-0.5 if scaled else 1.0) + np.asarray(bias))
    expected = dense("o_proj", (weights @ v).swapaxes(1, 2).reshape(2, 3, 12))
    for found in outputs:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def steps():
    """Contexts of a text of five slots, the first row with two of padding, read at once and in two steps."""

    @jax.jit
    def run():
        mask = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        whole, _ = multihead.causal_context(5, mask)
        cache = multihead.empty_cache(1, 2, 1, 6, 1)
        first, cache = multihead.causal_context(3, mask[:, :3], cache)
        second, cache = multihead.causal_context(2, None, cache)
        return whole, first, second, cache

    return run()


def test_padding_is_seen_by_none_and_counts_for_none(steps):
    whole = steps[0]
    np.testing.assert_array_equal(whole.positions, [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]])
    causal = np.tri(5, dtype=bool)
    np.testing.assert_array_equal(whole.visible[1, 0], causal)
    np.testing.assert_array_equal(whole.visible[0, 0], causal & (np.arange(5) >= 2))


def test_a_text_read_in_steps_sees_what_it_saw_at_once(steps):
    whole, first, second, cache = steps
    joined = np.concatenate([first.visible, second.visible], axis=2)
    np.testing.assert_array_equal(joined[..., :5], whole.visible)
    assert not joined[..., 5].any()
    np.testing.assert_array_equal(np.concatenate([first.positions, second.positions], 1), whole.positions)
    np.testing.assert_array_equal(second.slots, [3, 4])
    assert int(cache.length) == 5 and cache.seen.tolist() == [
        [False, False, True, True, True, False],
        [True] * 5 + [False],
    ]


def test_new_keys_are_written_behind_the_old_ones():
    past = KeyValues(*(jnp.full((1, 1, 4, 2), value) for value in (1.0, 2.0)))
    new = KeyValues(*(jnp.full((1, 1, 2, 2), value, jnp.bfloat16) for value in (3.0, 4.0)))
    found = jax.jit(multihead.remember)(past, new, jnp.asarray([1, 2], jnp.int32))
    np.testing.assert_array_equal(found.keys[0, 0, :, 0], [1, 3, 3, 1])
    np.testing.assert_array_equal(found.values[0, 0, :, 0], [2, 4, 4, 2])
    assert multihead.remember(None, new, jnp.arange(2)) is new
