"""T5's bias of attention scores by relative position, in buckets that widen with the distance.

Source: Raffel et al. 2020 (arXiv 1910.10683), section 2.1, and its code (Mesh TensorFlow's `relative_position_bucket`).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn


@functools.cache
def thresholds(buckets: int, max_distance: int) -> np.ndarray:
    """Smallest distance of each bucket from 1 on, for one direction: (buckets - 1,) int32.

    The first half of the buckets holds one distance each. Bucket e + k, with e that half, begins at the least n with
    floor(ln(n/e) / ln(max_distance/e) * (buckets - e)) >= k. It is found in whole numbers, since the logarithms of
    floating-point numbers can miss distances that lie on a boundary.

    Raises:
      ValueError: fewer than two buckets, or all distances up to `max_distance` have a bucket of their own.
    """
    exact, wide = buckets // 2, buckets - buckets // 2
    if buckets < 2 or max_distance <= exact:
        raise ValueError(
            f"relative positions: {buckets} buckets a direction for distances up to {max_distance}; there must be two "
            "or more, and distances beyond half of them"
        )
    begins, n = list(range(1, exact + 1)), exact
    for k in range(1, wide):
        while n**wide * exact**k < exact**wide * max_distance**k:
            n += 1
        begins.append(n)
    return np.array(begins, np.int32)


def bucket(offset: jax.Array, buckets: int = 32, max_distance: int = 128, *, bidirectional: bool) -> jax.Array:
    """Bucket of every `offset` (key position less query position, int): int32 in [0, buckets).

    With `bidirectional` the second half of the buckets is for keys after the query; otherwise these share bucket 0.
    """
    side = buckets // 2 if bidirectional else buckets
    distance = jnp.abs(offset) if bidirectional else jnp.maximum(-offset, 0)
    begins = jnp.asarray(thresholds(side, max_distance), offset.dtype)
    found = jnp.sum(distance[..., None] >= begins.reshape(*[1] * offset.ndim, -1), axis=-1, dtype=jnp.int32)
    return found + jnp.where(offset > 0, side, 0).astype(jnp.int32) if bidirectional else found


class BucketBias(nn.Module):
    """A learned number for each bucket and head: positions of queries (M,) and keys (N,) -> (heads, M, N)."""

    num_heads: int
    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = True
    table_init: Callable = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        table = self.param("embedding", self.table_init, (self.buckets, self.num_heads))
        index = bucket(
            keys[None, :] - queries[:, None], self.buckets, self.max_distance, bidirectional=self.bidirectional
        )
        return jnp.moveaxis(table[index], -1, 0)
