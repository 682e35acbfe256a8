"""CBQ's coarse-to-fine pre-processing: outliers of weights are cut off, those of activations scaled down.

Coarse: values beyond T = Q3 + reach (Q3 - Q1) are candidates, with Q1 and Q3 two quantiles of all values. Fine: the
sorted candidates split in two where the gap between both parts is large and the part that stays varies little,

    largest  gap^2 - variance(those that stay)       Criterion PAPER
    largest  gap - variance(those that stay)         Criterion OFFICIAL

and what lies beyond the largest one that stays is an outlier. A single candidate does not split and is one. Of more,
one stays at least: of two large values and no other candidate only one is an outlier, in the public code too. Weights
have no outliers afterwards (`truncate`); a channel of activations that has some is divided by

    sqrt(largest magnitude / largest that stays)     PAPER
    (value / largest that stays)^0.7, the larger of those of its maximum and its minimum     OFFICIAL

and the weights that read it are multiplied by the same (`smoothquant.fold`).

Sources: Ding et al. 2025, CBQ (arXiv 2312.07950, section 3.3); the code that is public holds the activations' half,
Ascend/msmodelslim `msmodelslim/pytorch/llm_ptq/anti_outlier/cbq.py` (commit 3de0a3c4), and differs from the paper.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.layers.norm import accumulation_dtype


@dataclasses.dataclass(frozen=True)
class Criterion:
    """What counts as an outlier, and how far it is scaled down.

    Fields:
      quantiles: Q1 and Q3, as shares of the values.
      reach: of the coarse stage, lambda_1 of the paper.
      spread: weight of the variance in the fine stage, lambda_2 of the paper.
      squared: the gap counts with its square.
      exponent: of the scale of a channel.
      sides: largest and smallest values of channels are two sets; else their magnitudes are one.
    Raises:
      ValueError: quantiles that are not two ascending shares.
    """

    quantiles: tuple[float, float] = (0.25, 0.75)
    reach: float = 1.5
    spread: float = 1.0
    squared: bool = True
    exponent: float = 0.5
    sides: bool = False

    def __post_init__(self):
        low, high = self.quantiles
        if not 0 <= low <= high <= 1:
            raise ValueError(f"quantiles: {self.quantiles} are not two ascending shares from 0 to 1")


PAPER = Criterion()
OFFICIAL = Criterion(quantiles=(0.2, 0.8), squared=False, exponent=0.7, sides=True)


class Cut(NamedTuple):
    """Where outliers begin: all values above `limit`. All are scalars.

    coarse: T, values above which are candidates.
    limit: the largest value that stays. Comparing with it tells outliers in any case, even where `threshold` is T.
    threshold: what the fine stage ends with: `limit`, or T where fewer than two candidates left it nothing to split.
    count: values behind the split, int32; more than are above `limit` if one equals it.
    """

    coarse: jax.Array
    limit: jax.Array
    threshold: jax.Array
    count: jax.Array


def cut(values: jax.Array, rule: Criterion = PAPER, fewest: bool = True) -> Cut:
    """Finds the outliers at the upper end of an array of any shape, in float32 or better.

    Args:
      fewest: of splits that are equally good, the one with the fewest outliers; else the one with the most.
    Raises:
      ValueError: no values.
    """
    if not values.size:
        raise ValueError("values: an empty array has no outliers")
    x = jnp.sort(values.ravel().astype(accumulation_dtype(values)))
    low, high = (_quantile(x, share) for share in rule.quantiles)
    coarse = high + rule.reach * (high - low)
    candidate = x > coarse
    following = jnp.append(x[1:], x[-1])
    gap = following - x  # of the split behind each value
    metric = (gap**2 if rule.squared else gap) - rule.spread * _variances(x, candidate)
    lawful = candidate.at[-1].set(False)  # neither part may be empty
    metric = jnp.where(lawful, metric, -jnp.inf)
    best = x.size - 1 - jnp.argmax(metric[::-1]) if fewest else jnp.argmax(metric)
    fine = jnp.any(lawful)
    last = jnp.where(fine, best, x.size - 1 - jnp.sum(candidate))
    limit = x[last]
    return Cut(coarse, limit, jnp.where(fine, limit, coarse), jnp.int32(x.size - 1 - last))


def truncate(w: jax.Array, rule: Criterion = PAPER) -> jax.Array:
    """Weights whose magnitudes end at the largest one that is no outlier, in their dtype."""
    limit = cut(jnp.abs(w), rule).limit.astype(w.dtype)
    return jnp.clip(w, -limit, limit)


def factors(low: jax.Array, high: jax.Array, rule: Criterion = OFFICIAL) -> jax.Array:
    """By what each channel of activations is divided, (K,), 1 or more: 1 for channels without outliers.

    Args:
      low, high: smallest and largest value of each channel over the calibration set, (K,).
    """
    if not rule.sides:
        return _factors(jnp.maximum(jnp.abs(low), jnp.abs(high)), rule, fewest=True)
    # The official search goes from the largest value down on both sides, and keeps the first of equal splits.
    return jnp.maximum(_factors(high, rule, fewest=True), _factors(-low, rule, fewest=False))


def _factors(values: jax.Array, rule: Criterion, fewest: bool) -> jax.Array:
    """Scales of one side; 1 where the largest that stays is not positive and so is no measure of a magnitude."""
    values = values.astype(accumulation_dtype(values))
    limit = cut(values, rule, fewest).limit
    outlier = (values > limit) & (limit > 0)
    return jnp.where(outlier, jnp.where(outlier, values / limit, 1.0) ** rule.exponent, 1.0)


def _quantile(x: jax.Array, share: float) -> jax.Array:
    """A quantile of sorted numbers, linear between neighbours.

    The position is found in Python: float32, in which `jnp.quantile` finds it, does not count beyond 2^24 weights.
    """
    position = share * (x.size - 1)
    below = math.floor(position)
    return x[below] + (x[math.ceil(position)] - x[below]) * (position - below)


def _variances(x: jax.Array, counted: jax.Array) -> jax.Array:
    """The unbiased variance of the counted numbers up to each one; 0 of a single one.

    Counts, means and squared deviations of neighbouring runs are merged (Chan et al. 1979): sums of squares would lose
    small variances of large numbers in float32.
    """

    def merge(a, b):
        count = a[0] + b[0]
        share = b[0] / jnp.maximum(count, 1)
        apart = b[1] - a[1]
        return count, a[1] + apart * share, a[2] + b[2] + apart**2 * a[0] * share

    counts = counted.astype(x.dtype)
    count, _, squares = jax.lax.associative_scan(merge, (counts, jnp.where(counted, x, 0), jnp.zeros_like(x)))
    return squares / jnp.maximum(count - 1, 1)
