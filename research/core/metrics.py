"""Metrics as (sum, count) pairs: exact over padded examples, unequal batches and any sharding.

A metric is a dict entry name -> (sum, count) of two scalars. Sums add up over batches and devices; the ratio is taken
once, at the end. A vector of sums is a metric over bins: the sum of their absolute values over the count.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

Pair = tuple[jax.Array, jax.Array]


def mean(values: jax.Array, mask: jax.Array | None = None) -> Pair:
    """The pair of a per-example quantity.

    Args:
      values: (B,) per-example values; a masked example's may be anything, NaN included.
      mask: (B,), 1 for real examples and 0 for padding; None counts all.
    """
    dtype = jnp.float64 if values.dtype == jnp.float64 else jnp.float32
    values = jnp.asarray(values, dtype)
    if mask is None:
        return jnp.sum(values), jnp.asarray(values.size, dtype)
    weights = jnp.asarray(mask, dtype)
    return jnp.sum(jnp.where(weights > 0, values, 0) * weights), jnp.sum(weights)


def topk_correct(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, k: int = 1) -> Pair:
    """How many real examples have their label among the `k` largest logits, and how many there are.

    Ties go to the lower class, as in a stable sort; a row with NaN or infinity is wrong.

    Args:
      logits: (B, C); labels: (B,) int; mask: (B,) as in `mean`.
    """
    return mean(_correct(logits, labels, k), mask)


def _correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype)[None, :]
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    before = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    return (jnp.sum(before, axis=-1) < k) & jnp.all(jnp.isfinite(logits), axis=-1)


def calibration_gaps(logits: jax.Array, labels: jax.Array, mask: jax.Array | None = None, bins: int = 15) -> Pair:
    """Confidence less accuracy, summed in `bins` equal bins of confidence, (bins,), and the number of real examples.

    Finished, it is the expected calibration error of Guo et al. 2017 (arXiv 1706.04599, eq. 3). A bin holds (low, high]
    and a row with NaN or infinity is fully confident and wrong.

    Args:
      logits: (B, C); labels: (B,) int; mask: (B,) as in `mean`.
    """
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    confidence = jnp.where(finite, jnp.max(jax.nn.softmax(logits.astype(dtype)), axis=-1), 1)
    own = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    weights = jnp.ones_like(confidence) if mask is None else mask.astype(dtype)
    gaps = weights * (confidence - _correct(logits, labels, 1).astype(dtype))
    return jnp.zeros(bins, dtype).at[own].add(gaps), jnp.sum(weights)


def merge(*metrics: Mapping[str, Pair]) -> dict[str, Pair]:
    """Sums of the pairs of several batches; a name may be missing in some of them.

    Values already on the host add up in float64, so that a long evaluation loses nothing.
    """
    wide = lambda value: value if isinstance(value, jax.Array) else np.float64(value)
    total: dict[str, Pair] = {}
    for found in metrics:
        for name, pair in found.items():
            value, count = map(wide, pair)
            old = total.get(name)
            total[name] = (value, count) if old is None else (old[0] + value, old[1] + count)
    return total


def finish(metrics: Mapping[str, Pair]) -> dict[str, float]:
    """The ratios, as Python floats on the host, in float64; a metric that counted nothing is NaN."""
    fetched = {name: tuple(map(np.float64, pair)) for name, pair in jax.device_get(dict(metrics)).items()}
    ratio = lambda total, count: float((np.sum(np.abs(total)) if np.ndim(total) else total) / count)
    return {name: ratio(total, count) if count else float("nan") for name, (total, count) in fetched.items()}
