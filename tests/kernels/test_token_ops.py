"""`token_select`, `token_matching` and `ppt_reduce`: interpreted kernels against their meaning, in one suite."""

import functools
import importlib.util
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core import sharding
from research.kernels import mosaic
from research.kernels.mosaic import Blocks
from research.kernels.ppt_reduce import ppt_reduce
from research.kernels.token_matching import token_matching
from research.kernels.token_select import token_select
from research.layers import token_moves
from research.pods import chips

F32, BF16 = jnp.float32, jnp.bfloat16
WIDTH, KEY = 12, 16


class Drawn(NamedTuple):
    """Tokens, scores with ties and the class token's above all, sizes, keys.

    Those of few tokens are signs, whose cosines are exact in any order of summation and often equal.
    """

    x: jax.Array
    scores: jax.Array
    size: jax.Array
    metric: jax.Array


def draw(tokens, dtype=F32, batch=2, width=WIDTH, seed=0) -> Drawn:
    rng = np.random.default_rng([tokens, seed])
    scores = rng.integers(0, max(tokens // 3, 2), (batch, tokens)) / 8.0
    scores[:, 0] = 2 * tokens
    metric = rng.normal(size=(batch, tokens, KEY))
    metric = metric if tokens > 100 else np.sign(metric)
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


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, -2.0, np.inf, -np.inf, np.nan]), min_size=13, max_size=13))
def test_ranks_are_those_of_a_stable_sort(scores):
    """In one form as in the other, whatever the ties."""
    row = jnp.asarray([scores], F32)
    order = np.asarray(token_moves.ranked(row))[0]
    assert np.argsort(ranks(row)[0]).tolist() == order.tolist()
    cleaned = np.where(np.isnan(scores), -np.inf, scores)
    assert order.tolist() == sorted(range(13), key=lambda i: (-cleaned[i], i))


ranks = jax.jit(mosaic.ranks)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=6, max_size=6))
def test_float32_is_three_bfloat16(values):
    x = jnp.asarray([v if abs(v) > 2.0**-100 else 0.0 for v in values], F32)
    found = parts(x)
    assert [p.dtype for p in found] == [BF16] * 3
    np.testing.assert_array_equal(sum(p.astype(F32) for p in reversed(found)), x)


parts = jax.jit(mosaic.parts)


def gradients(name, drawn, r, form, limit):
    """Of a sum that depends on every number of the tokens and sizes, by the tokens, scores, sizes and keys."""

    def loss(*d):
        limits = (limit,) if name == "ppt" else ()
        done = OPS[name](Drawn(*d), r, *limits, form=form, blocks=Blocks(1))
        weights = jnp.asarray(np.random.default_rng(9).normal(size=done.x.shape), F32)
        return jnp.sum(done.x.astype(F32) * weights) + jnp.sum(done.size**2 * weights[..., 0])

    return fast(jax.grad(loss, (0, 1, 2, 3)))(*drawn)


@pytest.mark.parametrize("name", ["fuse", "matching_class", "ppt"])
def test_gradients_are_those_of_the_reference(name):
    drawn = draw(11)
    expected, found = (Drawn(*gradients(name, drawn, 4, form, threshold(drawn))) for form in ("xla", "interpret"))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert np.any(found.x) and np.any(found.size) and not np.any(found.metric)
    assert bool(np.any(found.scores)) == (name == "fuse")


@pytest.mark.parametrize("name,forms", [("fuse", (None,)), ("matching_class", (None,)), ("ppt", (None, "interpret"))])
def test_a_mesh_agrees_with_one_device(name, forms):
    drawn, mesh = draw(9, batch=8), sharding.mesh({"data": 2, "fsdp": 2, "tensor": 2})
    limit = threshold(drawn)
    expected = run(name, drawn, 3, "xla", limit)
    placed = Drawn(*[jax.device_put(a, sharding.batch_sharding(mesh)) for a in drawn])
    for form in forms:
        found = run(name, placed, 3, form, limit, mesh=mesh)
        assert found.x.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 3)
        assert_equal(name, found, expected)
    with pytest.raises(ValueError, match="6 images do not divide by the 4 devices"):
        run(name, draw(9, batch=6), 3, None, limit, mesh=mesh)


def lowered(name, platform, form=None, dtype=F32, **options):
    shapes = jax.eval_shape(lambda: draw(9, dtype, batch=8))
    limits = (0.1,) if name == "ppt" else ()
    traced = jax.jit(lambda *d: OPS[name](Drawn(*d), 3, *limits, form=form, **options).x).trace(*shapes)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("name", ["select", "matching", "ppt"])
def test_a_kernel_is_lowered_on_tpus_alone_and_by_default_on_a_mesh(name):
    mesh = sharding.mesh({"data": 8})
    for platform in ("cpu", "cuda"):
        assert "tpu_custom_call" not in lowered(name, platform, "pallas")
    assert "tpu_custom_call" in lowered(name, "tpu", "pallas")
    assert "tpu_custom_call" in lowered(name, "tpu", mesh=mesh)
    assert "tpu_custom_call" not in lowered(name, "tpu")
    assert "tpu_custom_call" not in lowered(name, "tpu", dtype=jnp.float16, mesh=mesh)


@pytest.mark.parametrize("name", OPS)
def test_nothing_goes_where_nothing_is_asked_to(name):
    drawn = draw(9)
    found = run(name, drawn, 0, "xla")
    if name == "fuse":  # a fused token of nothing
        assert not np.any(found.x[:, -1]) and not np.any(found.size[:, -1])
    if "matching" in name or name == "ppt":
        np.testing.assert_array_equal(found.x, drawn.x)
        np.testing.assert_array_equal(found.size, drawn.size)
        assert found.moves.drop.shape == (2, 0)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda d: select(d, 3, form="mosaic"), "none of xla, pallas, interpret"),
        (lambda d: select(d, 10), "keep=-1 is not between 0 and the 9"),
        (lambda d: select(d, 9), "leaves no token at all"),
        (lambda d: token_select(d.x, d.scores[:1], 3), "does not fit scores"),
        (lambda d: token_matching(d.x, d.metric[:, :4], 3), "does not fit metric"),
        (lambda d: matching(d, 3, distill_token=True), "needs class_token=True"),
        (lambda d: OPS["ppt"](d._replace(size=d.size[:, :3]), 3, 0.1), "does not fit size"),
        (lambda d: select(d._replace(x=d.x.astype(jnp.float16)), 3, form="pallas"), "float32 or bfloat16"),
        (lambda d: matching(d._replace(metric=d.metric.astype(BF16)), 3, form="pallas"), "the rest in float32"),
        (lambda d: OPS["ppt"](d, 3, 0.1, form="pallas", blocks=Blocks(vmem=2**10)), "bytes of VMEM of 1024"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw(9))


def test_as_many_images_share_a_program_as_divide_the_batch_and_fit():
    def images(batch, **options):
        shapes = jax.eval_shape(lambda: draw(197, BF16, batch, width=384))
        text = str(
            jax.make_jaxpr(lambda *d: select(Drawn(*d), 50, form="interpret", blocks=Blocks(**options)))(*shapes)
        )
        return int(re.search(r"grid=\((\d+),\)", text)[1])

    assert [images(8), images(6), images(7), images(8, images=8)] == [2, 2, 7, 1]
    assert images(8, vmem=13 * 2**18) == 8
    assert mosaic.refusal(jax.ShapeDtypeStruct((8, 577, 768), BF16), (), Blocks()) is None


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernels_compile_for_tpus(topology):
    """At DeiT-S's 197 tokens, on a mesh; also in float32 and with a distillation token."""
    mesh = sharding.mesh({"data": 2, "tensor": 2}, chips.devices(chips.parse(topology)))
    place = sharding.batch_sharding(mesh)
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct((2, 197, *shape), dtype, sharding=place)

    def call(*d):
        half, options = Drawn(*d), {"form": "pallas", "mesh": mesh}
        full = half._replace(x=half.x.astype(F32))
        ppt = OPS["ppt"](half, 50, 7e-5, **options)
        return fuse(half, 59, **options), OPS["matching_distilled"](full, 13, **options), ppt

    operands = shaped(BF16, 384), shaped(F32), shaped(F32), shaped(F32, 64)
    text = jax.jit(call).lower(*operands).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "sort(" not in text
