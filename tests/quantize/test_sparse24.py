"""2:4 masks against brute force, and their compressed form."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize import sparse24

W = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)


def test_the_two_largest_of_four_are_kept():
    mask = np.asarray(sparse24.best_1d(jnp.asarray(W)))
    largest = np.argsort(np.abs(W).reshape(8, 4, 4), axis=-1)[..., 2:]
    expected = np.zeros((8, 4, 4), np.uint8)
    np.put_along_axis(expected, largest, 1, -1)
    np.testing.assert_array_equal(mask, expected.reshape(8, 16))


def test_the_best_tile_is_that_of_all_masks():
    rows = [p for p in itertools.product((0, 1), repeat=4) if sum(p) == 2]
    squares = [np.array(s) for s in itertools.product(rows, repeat=4) if (np.sum(s, axis=0) == 2).all()]
    assert len(squares) == len(sparse24.patterns_2d()) == 90
    mask = np.asarray(sparse24.best_2d(jnp.asarray(W)))
    for i, j in itertools.product(range(2), range(4)):
        tile = np.s_[4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
        best = max((np.abs(W[tile]) * s).sum() for s in squares)
        np.testing.assert_allclose((np.abs(W[tile]) * mask[tile]).sum(), best, rtol=1e-6)
    greedy = sparse24.greedy_2d(W)
    assert np.abs(W * greedy).sum() <= np.abs(W * mask).sum() * (1 + 1e-6)
    assert greedy.reshape(2, 4, 16).sum(1).max() <= 2 and greedy.reshape(8, 4, 4).sum(2).max() <= 2


def test_compression_halves_and_gives_back():
    w, mask = jnp.asarray(W), sparse24.best_1d(jnp.asarray(W))
    compressed = sparse24.compress(w, mask)
    assert compressed.values.shape == compressed.index.shape == (8, 8)
    np.testing.assert_array_equal(sparse24.decompress(compressed), w * mask.astype(w.dtype))
    greedy = jnp.asarray(sparse24.greedy_2d(W))
    np.testing.assert_array_equal(sparse24.decompress(sparse24.compress(w, greedy)), w * greedy.astype(w.dtype))


def test_rows_that_do_not_divide_are_refused_or_kept():
    with pytest.raises(ValueError, match="multiple of 4, not of 6"):
        sparse24.best_1d(jnp.zeros((4, 6)))
    np.testing.assert_array_equal(sparse24.greedy_2d(W[:6, :7])[:, 4:], 1)
