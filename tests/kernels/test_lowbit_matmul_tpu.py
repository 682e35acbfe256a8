"""The kernel of `lowbit_matmul` for TPUs, interpreted, against its meaning; compiled for TPUs of three kinds."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from research.core import sharding
from research.kernels.lowbit_matmul import Blocks, lowbit_matmul, pack_codes, tpu, tpu_plan
from research.kernels.lowbit_matmul.layout import PLANES, Packed, padded_rows
from research.pods import chips
from research.quantize import rules
from research.quantize.rules import Rule

F32, BF16 = jnp.float32, jnp.bfloat16
SMALL = Blocks(columns=128, rows=64, unrolled=2)


def drawn(m, k, n, bits, group, dtype=F32, zeros=True, scales=None, seed=0):
    """Inputs, a packed weight, a bias; scales of one, per column or per group of inputs, powers of two."""
    rng = np.random.default_rng([m, k, n, bits, seed])
    group = k if group is None else min(group, k)
    grid = (1, 1) if scales == "tensor" else (-(-k // group), n)
    codes = jnp.asarray(rng.integers(0, 2**bits, (k, n)), jnp.int32)
    scale = jnp.asarray(2.0 ** rng.integers(-3, 2, grid), F32)
    zero = jnp.asarray(rng.integers(0, 2**bits, grid), F32) if zeros else None
    planes = jax.jit(pack_codes, static_argnums=1)(codes, bits)
    weight = Packed(planes, scale, zero, None, bits, k if scales == "tensor" else group, k)
    return jnp.asarray(rng.normal(size=(m, k)), dtype), weight, jnp.asarray(rng.normal(size=n), dtype)


def both(x, weight, bias, **options):
    """XLA's form and the interpreted kernel, of one compilation."""
    run = lambda x, weight, bias: [
        lowbit_matmul(x, weight, bias, form=form, blocks=SMALL, **options) for form in ("xla", "interpret")
    ]
    expected, found = jax.jit(run)(x, weight, bias)
    assert found.dtype == expected.dtype == x.dtype and found.shape == expected.shape
    return np.asarray(expected.astype(F32)), np.asarray(found.astype(F32))


@settings(deadline=None, max_examples=7, derandomize=True)
@given(
    m=st.sampled_from([1, 3, 8, 21]),
    k=st.integers(1, 700),
    n=st.sampled_from([1, 5, 130]),
    bits=st.sampled_from(sorted(PLANES)),
    group=st.sampled_from([None, 32, 64, 128, 256, 512]),
    dtype=st.sampled_from([F32, BF16]),
    zeros=st.booleans(),
)
def test_products_of_real_inputs_are_those_of_the_reference(m, k, n, bits, group, dtype, zeros):
    expected, found = both(*drawn(m, k, n, bits, group, dtype, zeros))
    tolerance = 1e-2 if dtype == BF16 else 2e-6
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


@settings(deadline=None, max_examples=6, derandomize=True)
@given(
    m=st.sampled_from([1, 3, 21]),
    k=st.integers(1, 700),
    n=st.sampled_from([1, 130]),
    bits=st.sampled_from([(8, 8), (4, 8), (4, 4), (3, 8), (2, 4), (1, 2), (7, 6)]),
    group=st.sampled_from([None, 32, 128, 512]),
    zeros=st.booleans(),
    integers=st.booleans(),
)
def test_products_of_codes_are_exact(m, k, n, bits, group, zeros, integers):
    """Inputs whose scale is a power of two, and such scales of weights: no number is rounded, in any order."""
    x, weight, _ = drawn(m, k, n, bits[0], group, zeros=zeros)
    most = 2 ** (bits[1] - 1) - 1
    rng = np.random.default_rng(k)
    x = rng.integers(-most, most + 1, (m, k))
    x[:, rng.integers(k)] = most
    x = jnp.asarray(x, F32) * 2.0 ** jnp.arange(-2, m - 2, dtype=F32)[:, None]
    run = lambda x, weight: [
        lowbit_matmul(x, weight, activation_bits=bits[1], form="xla"),
        lowbit_matmul(x, weight, activation_bits=bits[1], form="interpret", blocks=SMALL._replace(integers=integers)),
    ]
    expected, found = jax.jit(run)(x, weight)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_one_scale_of_all_weights_and_inputs_in_another_order(activation_bits):
    x, weight, bias = drawn(3, 300, 5, 4, None, zeros=False, scales="tensor")
    weight = weight.replace(order=jnp.asarray(np.random.default_rng(1).permutation(300), jnp.int32))
    expected, found = both(x, weight, bias, activation_bits=activation_bits)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-6 * np.abs(expected).max())


def test_gradients_are_those_of_the_reference():
    x, weight, bias = drawn(4, 96, 6, 3, 32)

    def loss(form, x, weight, bias):
        return jnp.sum(jnp.square(lowbit_matmul(x, weight, bias, form=form, activation_bits=8)))

    run = lambda *operands: [jax.grad(loss, (1, 3))(form, *operands) for form in ("xla", "interpret")]
    expected, found = jax.jit(run)(x, weight, bias)
    for one, other in zip(found, expected, strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)


def test_a_mesh_agrees_with_one_device():
    x, weight, bias = drawn(8, 256, 6, 4, 128)
    mesh = sharding.mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def run(mesh, form, *operands):
        loss = lambda x, weight, bias: jnp.sum(
            jnp.square(lowbit_matmul(x, weight, bias, mesh=mesh, form=form, activation_bits=8))
        )
        return jax.jit(jax.value_and_grad(loss, (0, 2)))(*operands)

    expected = run(None, "xla", x, weight, bias)
    for form in (None, "interpret"):
        found = run(mesh, form, x, weight, bias)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6 * np.abs(other).max())
    with jax.set_mesh(mesh):  # 3 tokens do not divide
        assert lowbit_matmul(x[:3], weight, bias, mesh=mesh).shape == (3, 6)


def shaped(k, n, bits, group, place=None, zeros=True, dtype=BF16):
    """A packed weight without numbers."""
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    words = lambda width: (k, jnp.int8) if width == 8 else (padded_rows(k) * width // 32, jnp.int32)
    planes = tuple(of(dtype, rows, n) for rows, dtype in map(words, PLANES[bits]))
    grid = of(dtype, -(-k // group), n)
    return Packed(planes, grid, grid if zeros else None, None, bits, group, k)


@pytest.mark.parametrize("bits", sorted(PLANES))
def test_weights_are_stored_in_their_bits(bits):
    weight = drawn(1, 512, 64, bits, 128)[1]
    assert sum(plane.nbytes for plane in weight.planes) == 512 * 64 * bits // 8  # bits / 16 of bfloat16
    assert weight.nbytes == 512 * 64 * bits // 8 + 2 * 4 * 4 * 64  # and four groups' scales and zero points
    assert shaped(512, 64, bits, 128, dtype=F32).nbytes == weight.nbytes


def lowered(platform, x=F32, weight=None, **options):
    weight = shaped(256, 6, 4, 128) if weight is None else weight
    call = jax.jit(lambda x, w: lowbit_matmul(x, w, **options))
    operands = jax.ShapeDtypeStruct((8, weight.shape[0]), x), weight
    return call.trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def test_the_kernel_is_lowered_on_tpus_alone_and_by_default_on_a_mesh():
    mesh = sharding.mesh({"data": 4, "tensor": 2})
    assert "tpu_custom_call" not in lowered("cpu", form="kernel")
    for options in ({"form": "kernel"}, {"mesh": mesh}, {"mesh": mesh, "activation_bits": 8}):
        assert "tpu_custom_call" in lowered("tpu", **options)
    assert "tpu_custom_call" not in lowered("tpu")  # there are 8 devices, and no mesh
    assert "tpu_custom_call" not in lowered("tpu", jnp.float16, form="kernel")
    assert "tpu_custom_call" not in lowered("tpu", weight=shaped(256, 6, 4, 48), form="kernel")


def test_a_model_in_the_context_of_a_mesh_runs_the_kernel():
    model, x = nn.Dense(6), jnp.ones((8, 256))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"]
    settings = (Rule("", bits=4, group=128),)
    packed = jax.eval_shape(lambda p: rules.pack_params(rules.quantize_params(p, settings)), params)
    call = jax.jit(rules.apply(model))
    for rows in (8, 3):
        with jax.set_mesh(sharding.mesh({"data": 4, "tensor": 2})):
            traced = call.trace({"params": packed}, jax.ShapeDtypeStruct((rows, 256), F32))
            text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == (rows == 8)  # 3 rows do not divide


@pytest.mark.parametrize(
    "weight,rows,dtype,message",
    [
        (shaped(256, 6, 4, 48), 8, F32, "groups of 48 inputs neither divide 256"),
        (shaped(256, 6, 4, 32), 300, F32, "2100 rows more than tokens, of 1024"),
        (shaped(256, 6, 4, 32), 8, jnp.float16, "not float16"),
        (shaped(2**20, 128, 8, 128), 8, BF16, "bytes of VMEM"),
    ],
)
def test_what_the_kernel_does_not_take_is_said(weight, rows, dtype, message):
    x = jax.ShapeDtypeStruct((rows, weight.shape[0]), dtype)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x, w: lowbit_matmul(x, w, form="interpret"), x, weight)
    assert jax.eval_shape(lambda x, w: lowbit_matmul(x, w, form="xla"), x, weight).shape == (rows, weight.shape[1])


def test_few_tokens_are_few_rows():
    """A group's inputs take a row of their own: of one token in what eight rows cost anyway."""
    rows = lambda m, group, dtype=BF16: (
        tpu_plan.plan(jax.ShapeDtypeStruct((m, 4096), dtype), shaped(4096, 256, 4, group), None, Blocks()).rows
    )
    assert [rows(1, g) for g in (4096, 128, 32)] == [8, 8, 8]
    assert [rows(16, g) for g in (4096, 128, 32)] == [16, 32, 128]
    assert rows(1, 128, F32) == 24
    assert rows(4096, 4096) == rows(4096, 128) == 256


# K, N, bits, group, activation bits, tokens.
COMPILED = [
    (4096, 4096, 4, 128, None, 1),
    (11008, 640, 3, 64, None, 16),
    (512, 384, 8, 512, None, 300),
    (100, 1, 1, 32, None, 3),
    (96, 130, 6, 32, 8, 3),
    (4096, 512, 8, 4096, 8, 16),
    (1024, 512, 4, 128, 4, 17),
    (1024, 512, 2, 512, 8, 1),
]


@pytest.mark.libtpu
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_kernel_compiles_for_tpus(topology):
    """All in one program, and one on a mesh; no weight in real numbers is held outside of the kernels."""
    devices = chips.devices(chips.parse(topology))
    one = NamedSharding(sharding.mesh({"data": -1}, devices[:1]), PartitionSpec())
    x = lambda m, k, dtype=BF16, place=one: jax.ShapeDtypeStruct((m, k), dtype, sharding=place)
    weights = [shaped(k, n, bits, group, one) for k, n, bits, group, *_ in COMPILED]
    inputs = [x(m, k, F32 if m == 3 else BF16) for k, *_, m in COMPILED]
    cores = tpu.BLOCKS.get(devices[0].device_kind, Blocks())

    def call(inputs, weights):
        return [
            lowbit_matmul(x, w, activation_bits=bits, form="kernel", blocks=cores)
            for x, w, (*_, bits, _) in zip(inputs, weights, COMPILED, strict=True)
        ]

    text = jax.jit(call).lower(inputs, weights).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == len(COMPILED)
    assert not re.search(r"(f32|bf16)\[(4096,4096|11008,640|512,384|4096,512|1024,512)\]", text)

    mesh = sharding.mesh({"data": 2, "tensor": 2}, devices)
    place = lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))
    weight = shaped(512, 512, 4, 128, place(None, "tensor"))
    text = (
        jax.jit(lambda x, w: lowbit_matmul(x, w, mesh=mesh, blocks=cores))
        .lower(x(16, 512, place=place(("data", "fsdp"))), weight)
        .compile()
        .as_text()
    )
    assert 'custom_call_target="tpu_custom_call"' in text and "all-gather" not in text
