"""Resampled positions, against Pillow's bicubic filter and SciPy's interpolation."""

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy.interpolate import RegularGridInterpolator

from research.port import resample


@pytest.mark.parametrize("old, new", [(14, 24), (14, 7), (7, 9), (8, 13)])
def test_absolute_positions_are_resized_as_images(old, new):
    values = np.random.default_rng(0).normal(size=(old, old)).astype(np.float32)
    expected = np.asarray(Image.fromarray(values).resize((new, new + 2), Image.Resampling.BICUBIC))
    prefix = np.full((1, 2, 1), 9, np.float32)
    found = resample.absolute(np.concatenate([prefix, values.reshape(1, -1, 1)], 1), (new + 2, new), 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[:, :2], prefix)
    np.testing.assert_allclose(found[0, 2:, 0].reshape(new + 2, new), expected, atol=1e-5)


@pytest.mark.parametrize("old, new", [(14, 24), (14, 7), (3, 4)])
def test_sharp_weights_are_those_of_opencv(old, new):
    values = np.random.default_rng(0).normal(size=(old, old))
    weights = resample.sharp_cubic_weights(old, new)
    expected = cv2.resize(values, (new, new), interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(weights @ values @ weights.T, expected, atol=1e-5)  # whose weights are float32


def test_a_grid_that_is_not_square_must_be_stated():
    positions = np.zeros((1, 12, 3))
    with pytest.raises(ValueError, match="state the old grid"):
        resample.absolute(positions, (4, 4), 0)
    assert resample.absolute(positions, (4, 4), 0, old=(3, 4)).shape == (1, 16, 3)


@pytest.mark.parametrize("old, new", [(7, 12), (7, 5)])
def test_relative_positions_lie_in_a_geometric_progression(old, new):
    side = 2 * old - 1
    table = np.random.default_rng(0).normal(size=(side * side + 3, 2))
    found = resample.relative(table, (new, new), 3)
    np.testing.assert_array_equal(found[-3:], table[-3:])

    # The ratio whose sum reaches the far end of the new window, not below the original code's 1.01.
    reach = np.poly1d([1.0] * (old - 2) + [2.0 - new])
    ratio = max([1.01, *(root.real for root in reach.roots if abs(root.imag) < 1e-9)])
    steps = np.cumsum([ratio**i for i in range(old - 1)])
    points = np.concatenate([-steps[::-1], [0], steps])
    targets = np.clip(np.arange(1 - new, new), points[0], points[-1])
    at = np.stack(np.meshgrid(targets, targets, indexing="ij"), -1).reshape(-1, 2)
    for head in range(2):
        surface = RegularGridInterpolator((points, points), table[:-3, head].reshape(side, side))
        np.testing.assert_allclose(found[:-3, head], surface(at), atol=1e-4)


def test_an_equal_window_changes_nothing():
    table = np.random.default_rng(0).normal(size=(27 * 27, 4))
    np.testing.assert_allclose(resample.relative(table, (14, 14), 0), table, rtol=1e-12)


@pytest.mark.parametrize("length, grid, expected", [(169, (56, 56), ((7, 7), 0)), (732, (14, 14), ((14, 14), 3))])
def test_the_window_of_a_table(length, grid, expected):
    assert resample.window(length, grid) == expected


def test_the_window_is_the_grid_where_it_fits():
    assert resample.window(5 * 9 + 3, (3, 5)) == ((3, 5), 3)
    with pytest.raises(ValueError, match="table of 50"):
        resample.window(50, (3, 5))
