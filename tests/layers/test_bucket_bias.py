"""T5's buckets against the published formula, at their edges and as a layer."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.layers import bucket_bias


def published(offset, buckets, max_distance, bidirectional):
    """Mesh TensorFlow's formula in float32, in which the boundaries at powers of two come out exact."""
    found, n = 0, -offset
    if bidirectional:
        buckets //= 2
        found, n = (buckets if n < 0 else 0), abs(n)
    n, exact = max(n, 0), buckets // 2
    if n < exact:
        return found + n
    ratio = np.log(np.float32(n / exact)) / np.float32(math.log(max_distance / exact))
    return found + min(exact + int(ratio * np.float32(buckets - exact)), buckets - 1)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("buckets, max_distance", [(32, 128), (16, 20), (6, 11)])
def test_buckets_are_the_published_ones(buckets, max_distance, bidirectional):
    offsets = np.arange(-150, 151, dtype=np.int32)
    found = bucket_bias.bucket(jnp.asarray(offsets), buckets, max_distance, bidirectional=bidirectional)
    expected = [published(int(offset), buckets, max_distance, bidirectional) for offset in offsets]
    np.testing.assert_array_equal(found, expected)


def test_edges_of_the_published_sizes():
    """Distances 16, 32 and 64 lie on boundaries and open a bucket of their own."""
    begins = bucket_bias.thresholds(16, 128)
    assert list(begins[:8]) == list(range(1, 9))
    assert {16, 32, 64} <= set(begins.tolist()) and begins[-1] == 91


def test_the_layer_looks_up_every_pair():
    module = bucket_bias.BucketBias(3, 8, 16)
    queries, keys = jnp.arange(2, 4, dtype=jnp.int32), jnp.arange(5, dtype=jnp.int32)
    variables = module.init(jax.random.key(0), queries, keys)
    found, table = module.apply(variables, queries, keys), variables["params"]["embedding"]
    assert found.shape == (3, 2, 5)
    for m, n in np.ndindex(2, 5):
        np.testing.assert_array_equal(found[:, m, n], table[published(n - (m + 2), 8, 16, True)])


def test_too_few_distances_are_refused():
    with pytest.raises(ValueError, match="16 buckets a direction for distances up to 8"):
        bucket_bias.bucket(jnp.zeros((1,), jnp.int32), 32, 8, bidirectional=True)
