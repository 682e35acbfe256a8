"""Outliers against a plain search over all splits, and what is left of them in weights and activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.quantize.cfp import OFFICIAL, PAPER, Criterion, cut, factors, truncate
from research.quantize.smoothquant import fold

CHANNELS = 40
cut = jax.jit(cut, static_argnames=("rule", "fewest"))
factors = jax.jit(factors, static_argnames="rule")


def searched(values, rule):
    """(largest that stays, threshold, number of outliers), one split after the other, in float64."""
    values = np.sort(values.astype(np.float64))
    low, high = np.quantile(values, rule.quantiles)
    coarse = high + rule.reach * (high - low)
    candidates = values[values > coarse]
    if len(candidates) < 2:
        return values[values <= coarse].max(), coarse, len(candidates)
    best = None
    for kept in range(1, len(candidates)):
        gap = candidates[kept] - candidates[kept - 1]
        variance = candidates[:kept].var(ddof=1) if kept > 1 else 0.0
        metric = (gap**2 if rule.squared else gap) - rule.spread * variance
        if best is None or metric > best[0]:
            best = metric, candidates[kept - 1], len(candidates) - kept
    return best[1], best[1], best[2]


def channels(seed, large=(), small=()):
    rng = np.random.default_rng(seed)
    low, high = -rng.uniform(1, 3, CHANNELS), rng.uniform(1, 3, CHANNELS)
    places = rng.permutation(CHANNELS)
    high[places[: len(large)]] = large
    low[places[-len(small) or CHANNELS :]] = small
    return low.astype(np.float32), high.astype(np.float32)


PLANTED = [((), ()), ((50.0,), ()), ((40.0, 42.0, 9.0, 8.5), (-70.0, -12.0, -11.0)), ((9.0, 9.5, 10.0), (-2e4, -1e4))]


@pytest.mark.parametrize("large, small", PLANTED, ids=["none", "one", "both sides", "far apart"])
def test_factors_are_those_of_a_search_over_all_splits(large, small):
    low, high = channels(1, large, small)
    expected = np.ones(CHANNELS)
    for values in (high, -low):
        limit, threshold, count = searched(values, OFFICIAL)
        found = cut(jnp.asarray(values), OFFICIAL)
        np.testing.assert_allclose([found.limit, found.threshold], [limit, threshold], rtol=1e-6)
        assert found.count == count
        expected = np.maximum(expected, np.where(values > limit, (np.maximum(values, 0) / limit) ** 0.7, 1))
    np.testing.assert_allclose(factors(low, high), expected, rtol=1e-5)
    largest = np.maximum(-low, high)
    limit, _, count = searched(largest, PAPER)
    assert cut(jnp.asarray(largest)).count == count
    found = factors(low, high, PAPER)
    np.testing.assert_allclose(found, np.where(largest > limit, (largest / limit) ** 0.5, 1), rtol=1e-5)
    assert (found == 1).sum() == CHANNELS - count


def test_channels_of_one_sign_are_scaled_by_their_own_side_only():
    """After a ReLU all minima are 0, which measures no magnitude; the other way round, all maxima."""
    _, high = channels(2, large=(30.0,))
    zero = np.zeros_like(high)
    scales = factors(zero, high)
    assert (scales > 1).sum() == 1
    np.testing.assert_array_equal(scales, factors(-high, zero))
    np.testing.assert_array_equal(factors(zero, zero), np.ones(CHANNELS))


def test_equal_maxima_stay():
    low, high = channels(3, large=(20.0,) * 4)
    np.testing.assert_array_equal(factors(low, high), np.ones(CHANNELS))


def test_small_variances_of_large_numbers_count_in_float32():
    """Numbers around 4096 that vary by 0.1: sums of squares in float32 have errors of more than their variance."""
    kept, rng = 4096 + np.float32(0.1) * np.arange(20, dtype=np.float32), np.random.default_rng(4)
    values = np.concatenate([rng.uniform(0, 1, CHANNELS - 22), kept, [4099.5, 4099.7]]).astype(np.float32)
    rule = Criterion(quantiles=(0.0, 0.25), spread=0.5)
    assert cut(jnp.asarray(values), rule).count == searched(values, rule)[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_end_where_outliers_begin(dtype):
    rng = np.random.default_rng(5)
    w = rng.normal(0, 0.02, (16, 24))
    w[[1, 4, 9], [2, 2, 7]] = 0.9, -1.1, 1.0
    w = jnp.asarray(w, dtype)
    cleaned = jax.jit(truncate)(w)
    assert cleaned.dtype == dtype
    wide, found = np.asarray(w, np.float32), np.asarray(cleaned, np.float32)
    limit = searched(np.abs(wide).ravel(), PAPER)[0]
    np.testing.assert_array_equal(found, np.clip(wide, -limit, limit))
    assert (found != wide).sum() == 3 and limit < 0.1


def test_folded_factors_leave_the_products():
    low, high = channels(6, large=(40.0,), small=(-30.0,))
    x, norm, kernel = (
        np.random.default_rng(7).normal(size=shape) for shape in ((5, CHANNELS), CHANNELS, (CHANNELS, 3))
    )
    scales = factors(low, high)
    (scaled,), (folded,) = fold([jnp.float32(norm)], [jnp.float32(kernel)], scales)
    found = (x * np.asarray(scaled)) @ np.asarray(folded)
    np.testing.assert_allclose(found, (x * norm) @ kernel, rtol=1e-4, atol=1e-4)
    assert jnp.max(high / scales) < 0.5 * high.max()


def test_what_is_refused():
    with pytest.raises(ValueError, match="values: an empty array"):
        cut(jnp.zeros(0))
    with pytest.raises(ValueError, match=r"quantiles: \(0.8, 0.2\) are not two ascending shares"):
        Criterion(quantiles=(0.8, 0.2))
