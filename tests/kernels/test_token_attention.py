"""The kernel, interpreted, against its meaning; the meaning against what token reduction computed before."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.core import sharding
from research.kernels import token_attention as op
from research.kernels.token_attention import Blocks, token_attention, tpu
from research.layers import token_scores as scores
from research.pods import chips

F32, BF16 = jnp.float32, jnp.bfloat16
TOLERANCE = {F32: 2e-6, BF16: 2e-2}
# Tokens, most queries of one program, dtype, whether sizes are given.
CASES = [
    (5, None, F32, False),
    (5, None, BF16, True),
    (17, 16, F32, True),
    (17, 16, BF16, False),
    (197, 64, F32, False),
    (197, None, BF16, True),
]


def drawn(tokens, dtype=F32, batch=2, heads=2, dim=8, sized=True):
    """Queries, keys, values, and sizes or None."""
    rng = np.random.default_rng(tokens)
    operands = [jnp.asarray(rng.normal(size=(batch, heads, tokens, dim)), dtype) for _ in range(3)]
    return *operands, jnp.asarray(rng.integers(1, 5, (batch, tokens)), jnp.float32) if sized else None


def both(*operands, **options):
    """XLA's form and the interpreted kernel."""
    run = lambda form: jax.jit(lambda *x: token_attention(*x, form=form, **options))(*operands)
    return run("xla"), run("interpret")


def assert_near(found, expected, tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens,queries,dtype,sized", CASES)
def test_the_kernel_is_its_reference(tokens, queries, dtype, sized):
    blocks = None if queries is None else Blocks(queries)
    expected, found = both(*drawn(tokens, dtype, sized=sized), blocks=blocks)
    assert_near(found, expected, TOLERANCE[dtype])


def test_probabilities_and_scores_are_those_of_all_probabilities():
    q, k, v, size = drawn(17)
    every = jax.nn.softmax(jnp.einsum("bhmd,bhnd->bhmn", q, k) / np.sqrt(8) + jnp.log(size)[:, None, None, :])
    found = token_attention(q, k, v, size, form="interpret")
    np.testing.assert_allclose(found.out, every @ v, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.row, every[:, :, 0], rtol=1e-5)
    np.testing.assert_allclose(found.keys, k.mean(1), rtol=1e-6, atol=1e-7)
    significance = scores.significance(q, k, v, scores.proportional(None, size))
    patches = found.weighted[:, 1:]
    np.testing.assert_allclose(patches / patches.sum(1, keepdims=True), significance, rtol=1e-5)


def test_without_class_row_nothing_of_it_is_computed():
    operands = drawn(17)
    expected, found = both(*operands, class_row=False)
    assert found.row is None and found.weighted is None
    assert_near(found, expected, 2e-6)
    assert_near(found.out, token_attention(*operands).out, 2e-6)


def test_a_bias_of_keys_hides_tokens():
    q, k, v, size = drawn(17)
    hidden = jnp.where(jnp.arange(17) < 12, 0.0, -jnp.inf)
    expected, found = both(q, k, v, size, hidden)
    assert_near(found, expected, 2e-6)
    assert not np.any(found.row[..., 12:]) and not np.any(found.weighted[:, 12:])
    shorter = token_attention(*[x[:, :, :12] for x in (q, k, v)], size[:, :12])
    np.testing.assert_allclose(found.out[:, :, :12], shorter.out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype,tolerance", [(F32, 1e-5), (BF16, 5e-2)])
def test_gradients_are_those_of_the_reference(dtype, tolerance):
    operands = drawn(17, dtype)
    seeds = [jnp.asarray(np.random.default_rng(9).normal(size=s), jnp.float32) for s in ((2, 2, 17, 8), (2, 17))]

    def loss(form, q, k, v, size):
        found = token_attention(q, k, v, size, form=form)
        return jnp.sum(found.out.astype(jnp.float32) * seeds[0]) + jnp.sum(found.weighted * seeds[1])

    gradients = [jax.jit(jax.grad(lambda *x, f=f: loss(f, *x), (0, 1, 2, 3)))(*operands) for f in ("xla", "interpret")]
    assert all(np.any(g) for g in gradients[0])
    assert_near(gradients[1], gradients[0], tolerance)


def test_a_mesh_agrees_with_one_device():
    q, k, v, size = drawn(17, batch=4, heads=4)
    bias = jnp.linspace(0, 1, 17)
    mesh = sharding.mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = [jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))) for x in (q, k, v)]

    def run(form, mesh, *operands):
        def loss(*x):
            found = token_attention(*x, bias, form=form, mesh=mesh)
            return jnp.sum(jnp.square(found.out)) + jnp.sum(found.keys[..., 0] * found.weighted), found

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(*operands)

    expected = run("xla", None, q, k, v, size)
    for form in (None, "interpret"):
        gradients, found = run(form, mesh, *placed, size)
        assert len(found.out.sharding.device_set) == 8
        assert_near((gradients, found), expected, 1e-5)


def lowered(platform, dtype=F32, **options):
    shape = jax.ShapeDtypeStruct((4, 2, 17, 8), dtype)
    traced = jax.jit(lambda *x: token_attention(*x, **options).out).trace(*[shape] * 3)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_only_on_tpus_the_kernel_is_lowered():
    for platform in ("cpu", "cuda"):
        assert "tpu_custom_call" not in lowered(platform, form="pallas")
    assert "tpu_custom_call" in lowered("tpu", form="pallas")


def test_by_default_there_is_a_kernel_where_a_mesh_is_given_and_operands_are_taken():
    mesh = sharding.mesh({"data": 4, "tensor": 2})
    assert "tpu_custom_call" in lowered("tpu", mesh=mesh)
    assert "tpu_custom_call" not in lowered("tpu", jnp.float16, mesh=mesh)
    assert "tpu_custom_call" not in lowered("tpu")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda q, k, v, s: (q, k[:, :, :4], v, s), "of one shape"),
        (lambda q, k, v, s: (q, k, v, s[:, :4]), "size"),
        (lambda q, k, v, s: (q.astype(jnp.float16), k, v, s), "float16"),
        (lambda q, k, v, s: (q, k, v, s, jnp.zeros((2, 5, 5))), "bias of keys alone"),
        (lambda q, k, v, s: tuple(jnp.zeros((1, 16, 4096, 64)) for _ in range(3)), "bytes of VMEM"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(change, message):
    with pytest.raises(ValueError, match=message):
        token_attention(*change(*drawn(5)), form="pallas")


def test_an_unknown_form_is_an_error():
    with pytest.raises(ValueError, match=f"none of {', '.join(op.FORMS)}"):
        token_attention(*drawn(5), form="mosaic")


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_tpus(topology):
    """At DeiT-S's 197 tokens of 6 heads of 64; on a mesh in float32, several blocks of queries and no sizes."""
    devices = chips.devices(chips.parse(topology))
    one = NamedSharding(sharding.mesh({"data": -1}, devices[:1]), PartitionSpec())
    four = sharding.mesh({"data": 2, "tensor": 2}, devices)
    split = NamedSharding(four, PartitionSpec(("data", "fsdp"), "tensor"))
    shaped = lambda shape, dtype, place: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    half = [shaped((2, 6, 197, 64), jnp.bfloat16, one)] * 3 + [shaped((2, 197), jnp.float32, one)]
    full = [shaped((2, 4, 300, 32), jnp.float32, split)] * 3
    for operands, mesh in ((half, None), (full, four)):
        call = jax.jit(lambda *x, mesh=mesh: token_attention(*x, form="pallas", mesh=mesh))
        text = call.lower(*operands).compile().as_text()
        assert "tpu_custom_call" in text
        tokens = operands[0].shape[2]
        assert f"{tokens},{tokens}]" not in text  # no array of all probabilities


def test_vmem_is_counted_in_whole_tiles():
    assert tpu.vmem_bytes((1, 1, 1, 1), jnp.float32, Blocks()) == (2 * 8 + 3) * 4096  # operands and results twice
    assert tpu.vmem_bytes((8, 12, 1024, 64), jnp.bfloat16, Blocks()) < Blocks().vmem
