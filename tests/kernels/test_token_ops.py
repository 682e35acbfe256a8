"""`token_select`, `token_matching` and `ppt_reduce`: interpreted kernels against their meaning, in one suite."""

import functools
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from research.core import sharding
from research.kernels import mosaic
from research.kernels.mosaic import Blocks
from research.kernels.ppt_reduce import ppt_reduce
from research.kernels.token_matching import token_matching
from research.kernels.token_select import token_select
from research.layers import token_moves
from research.pods import chips

F32, BF16 = jnp.float32, jnp.bfloat16
WIDTH, KEY = 12, 8


class Drawn(NamedTuple):
    """Tokens, scores with ties and the class token's above all, sizes, keys of which some are alike."""

    x: jax.Array
    scores: jax.Array
    size: jax.Array
    metric: jax.Array


def draw(tokens, dtype=F32, batch=2, width=WIDTH, seed=0) -> Drawn:
    rng = np.random.default_rng([tokens, seed])
    scores = rng.integers(0, max(tokens // 3, 2), (batch, tokens)) / 8.0
    scores[:, 0] = 2 * tokens
    metric = rng.normal(size=(batch, tokens, KEY))
    metric[:, tokens // 2 :] = metric[:, : tokens - tokens // 2]
    scores[0] /= 4  # of a smaller variance
    scores[0, 0] = 2 * tokens
    arrays = rng.normal(size=(batch, tokens, width)), scores, rng.integers(1, 5, (batch, tokens)), metric
    return Drawn(*[jnp.asarray(a, t) for a, t in zip(arrays, (dtype, F32, F32, F32), strict=True)])


def threshold(drawn: Drawn) -> float:
    """Between the variances of the images."""
    return float(np.mean(np.var(np.asarray(drawn.scores)[:, 1:], axis=1, ddof=1)))


def select(d: Drawn, r, **options):
    return token_select(d.x, d.scores, d.scores.shape[1] - r, d.size, **options)


def fuse(d: Drawn, r, **options):
    return token_select(d.x, d.scores[:, 1:], d.scores.shape[1] - 1 - r, d.size, fuse=True, **options)


def matching(d: Drawn, r, **options):
    return token_matching(d.x, d.metric, r, d.size, **options)


OPS: dict[str, Callable] = {
    "select": select,
    "fuse": fuse,
    "matching": matching,
    "matching_class": functools.partial(matching, class_token=True),
    "matching_distilled": functools.partial(matching, class_token=True, distill_token=True),
    "ppt": lambda d, r, t, **options: ppt_reduce(d.x, d.size, d.scores, d.metric, r, t, **options),
}


def fast(function):
    """`function` jitted for a single call: interpreted kernels take long to optimise."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def run(name, drawn, r, form, limit=None, **options):
    """One op, jitted; PPT's threshold lies between the variances of the images."""
    limits = (threshold(drawn) if limit is None else limit,) if name == "ppt" else ()
    return fast(lambda *d: OPS[name](Drawn(*d), r, *limits, form=form, **options))(*drawn)


def assert_equal(name, found, expected):
    """Moves and sizes exactly, kept tokens to the bit, merged and fused ones but for rounding."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for field in token_moves.Moves._fields:
        one, other = getattr(found.moves, field), getattr(expected.moves, field)
        assert one.dtype == other.dtype == jnp.int32
        np.testing.assert_array_equal(one, other, err_msg=field)
    np.testing.assert_array_equal(found.size, expected.size)
    assert found.x.dtype == expected.x.dtype and found.x.shape == expected.x.shape
    tolerance = 1e-2 if found.x.dtype == BF16 else 2e-6
    one, other = found.x.astype(F32), expected.x.astype(F32)
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)
    if name in ("select", "fuse"):
        whole = one.shape[1] - (name == "fuse")
        np.testing.assert_array_equal(one[:, :whole], other[:, :whole])
    if name == "ppt":
        np.testing.assert_array_equal(found.pruned, expected.pruned)
        np.testing.assert_array_equal(found.variance, expected.variance)


# Tokens, how many go, dtype: odd and even counts, most that can go, DeiT's.
CASES = [(5, 1, BF16), (16, 100, F32), (197, 50, BF16)]


@pytest.mark.parametrize("tokens,r,dtype", CASES)
@pytest.mark.parametrize("name", OPS)
def test_the_kernel_is_its_reference(name, tokens, r, dtype):
    drawn, r = draw(tokens, dtype), min(r, tokens - 1 if name in ("select", "fuse") else (tokens - 2) // 2)
    expected, found = (run(name, drawn, r, form, blocks=Blocks(1)) for form in ("xla", "interpret"))
    assert_equal(name, found, expected)
    if name == "ppt":
        assert found.pruned.tolist() == [False, True]
