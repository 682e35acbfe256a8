"""Rotary positions: scores know distances alone; frequencies of longer texts."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers import rope


def test_scores_depend_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (6,)) for i in (0, 1))
    by = rope.rotation(jnp.arange(5), rope.frequencies(6))
    turned = [rope.rotate(jnp.tile(x, (1, 5, 1)), by)[0] for x in (q, k)]
    scores = np.asarray(turned[0] @ turned[1].T)
    for shift in range(4):
        np.testing.assert_allclose(np.diag(scores, shift), np.diag(scores, shift)[0], rtol=1e-4, atol=1e-5)


def test_planes_are_the_halves_of_a_head():
    by = rope.rotation(jnp.asarray([3]), rope.frequencies(4, base=100.0))
    found = rope.rotate(jnp.asarray([[[1.0, 2.0, 3.0, 4.0]]]), by)[0, 0]
    expected = [(1 + 3j) * np.exp(3j), (2 + 4j) * np.exp(0.3j)]
    np.testing.assert_allclose(found, [z.real for z in expected] + [z.imag for z in expected], rtol=1e-5)


def test_angles_of_bfloat16_heads_are_exact():
    """Position 4001 has its own angle although bfloat16 rounds the number to 4000."""
    x = jnp.ones((1, 1, 2), jnp.bfloat16)
    turned = rope.rotate(x, rope.rotation(jnp.asarray([4001]), rope.frequencies(2)))
    assert turned.dtype == jnp.bfloat16
    expected = [math.cos(4001) - math.sin(4001), math.cos(4001) + math.sin(4001)]
    np.testing.assert_allclose(np.asarray(turned[0, 0], np.float32), expected, rtol=1e-2)


def test_longer_texts_turn_slower():
    plain = rope.frequencies(64, 5e5)
    np.testing.assert_allclose(rope.frequencies(64, 5e5, {"type": "linear", "factor": 4.0}), plain / 4)
    limits = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    found = rope.frequencies(64, 5e5, {"rope_type": "llama3", "factor": 8.0, **limits})
    wavelength = 2 * math.pi / plain
    np.testing.assert_allclose(found[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    np.testing.assert_allclose(found[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and np.all((found < plain) & (found > plain / 8), where=between)
    share = (8192 / wavelength - 1) / 3
    np.testing.assert_allclose(found[between], ((1 - share) * plain / 8 + share * plain)[between])


def test_what_cannot_be_turned_is_refused():
    for arguments, message in (
        ((5,), "even number of channels a head, not 5"),
        ((4, 1e4, {"rope_type": "ntk"}), "rope_type 'ntk' is none of"),
        ((4, 1e4, {"rope_type": "llama3", "factor": 8.0}), "llama3 needs low_freq_factor"),
    ):
        with pytest.raises(ValueError, match=message):
            rope.frequencies(*arguments)
